// CUDA twins of kernels/cpu/gradients.h. Tensors of a list may have different types: a chunk belongs to one tensor, so its thread block
// does not diverge.
#include "kernels/cuda/gradients.h"
#include "kernels/cuda/lists.cuh"

namespace megactl::cuda {

constexpr int kListChunk = 8192;
// Thread blocks of the first pass: one wave on a Hopper, and a fixed number, so that the sum is the same on every GPU.
constexpr int kNormBlocks = 1024;
constexpr int kFinalThreads = 1024;

using Table = ListTable<ListTensor, kListTensors>;

// Calls single(pointer) for the elements of [begin, end) outside 16-byte vectors, and vector(pointer) for the vectors.
template <typename T, typename Single, typename Vector>
__device__ __forceinline__ void for_chunk(T* data, int64_t begin, int64_t end, const Single& single, const Vector& vector) {
    constexpr int N = 16 / sizeof(T);
    T *const first = data + begin;
    const int n = static_cast<int>(end - begin), thread = static_cast<int>(threadIdx.x);
    const int misplaced = static_cast<int>(reinterpret_cast<uintptr_t>(first) / sizeof(T) % N);
    const int head = min((N - misplaced) % N, n), vectors = (n - head) / N, done = head + vectors * N;
    if (thread < head) single(first + thread);
    Pack<T, N>* const packs = reinterpret_cast<Pack<T, N>*>(first + head);
#pragma unroll 4
    for (int i = thread; i < vectors; i += kThreads) vector(packs + i);
    if (thread < n - done) single(first + done + thread);
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// The result is valid in the first warp.
template <int kBlock>
__device__ __forceinline__ double block_sum(double value) {
    __shared__ double sums[kBlock / 32];
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    return threadIdx.x < 32 ? warp_sum(threadIdx.x < kBlock / 32 ? sums[threadIdx.x] : 0.0) : 0.0;
}

template <typename T>
__device__ __forceinline__ double chunk_squares(const ListTensor& tensor, const Chunk& chunk) {
    constexpr int N = 16 / sizeof(T);
    double sum = 0.0;
    const auto add = [&](T element) {
        const double value = static_cast<double>(load(element));
        sum = fma(value, value, sum);
    };
    const auto vector = [&](const Pack<T, N>* pack) {
        const Pack<T, N> held = *pack;
#pragma unroll
        for (int j = 0; j < N; ++j) add(held.v[j]);
    };
    for_chunk(static_cast<T*>(tensor.data), chunk.begin, chunk.end, [&](const T* p) { add(*p); }, vector);
    return sum;
}

__global__ void __launch_bounds__(kThreads) partial_norm_kernel(const __grid_constant__ Table table, double* partial) {
    double sum = 0.0;
    for (int64_t i = blockIdx.x; i < table.chunks; i += gridDim.x) {
        const Chunk chunk = find_chunk<kListChunk>(table, i);
        const ListTensor& tensor = table.entry[chunk.tensor];
        switch (tensor.type) {
            case Type::kDouble:
                sum += chunk_squares<double>(tensor, chunk);
                break;
            case Type::kFloat:
                sum += chunk_squares<float>(tensor, chunk);
                break;
            case Type::kBFloat16:
                sum += chunk_squares<__nv_bfloat16>(tensor, chunk);
                break;
            case Type::kFloat16:
                sum += chunk_squares<__half>(tensor, chunk);
                break;
        }
    }
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kFinalThreads) final_norm_kernel(const double* partial, int64_t count, double* out) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < count; i += kFinalThreads) sum += partial[i];
    sum = block_sum<kFinalThreads>(sum);
    if (threadIdx.x == 0) out[0] = sum;
}

template <typename T>
__device__ __forceinline__ void scale_chunk(const ListTensor& tensor, const Chunk& chunk, double by) {
    constexpr int N = 16 / sizeof(T);
    const auto factor = static_cast<typename Compute<T>::type>(by);
    const auto vector = [&](Pack<T, N>* pack) {
        Pack<T, N> held = *pack;
#pragma unroll
        for (int j = 0; j < N; ++j) held.v[j] = store<T>(load(held.v[j]) * factor);
        *pack = held;
    };
    for_chunk(static_cast<T*>(tensor.data), chunk.begin, chunk.end, [&](T* p) { *p = store<T>(load(*p) * factor); }, vector);
}

__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ Table table, Type factor_type, const void* given) {
    const double factor = factor_type == Type::kDouble ? *static_cast<const double*>(given) : *static_cast<const float*>(given);
    if (factor == 1.0) return;
    for (int64_t i = blockIdx.x; i < table.chunks; i += gridDim.x) {
        const Chunk chunk = find_chunk<kListChunk>(table, i);
        const ListTensor& tensor = table.entry[chunk.tensor];
        switch (tensor.type) {
            case Type::kDouble:
                scale_chunk<double>(tensor, chunk, factor);
                break;
            case Type::kFloat:
                scale_chunk<float>(tensor, chunk, factor);
                break;
            case Type::kBFloat16:
                scale_chunk<__nv_bfloat16>(tensor, chunk, factor);
                break;
            case Type::kFloat16:
                scale_chunk<__half>(tensor, chunk, factor);
                break;
        }
    }
}

int64_t squared_norm_scratch(int64_t count) { return (count + kListTensors - 1) / kListTensors * kNormBlocks; }

int squared_norm(const ListTensor* tensors, int64_t count, double* scratch, double* out, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    int64_t partials = 0;
    for_tables<kListTensors, kListChunk>(tensors, count, [&](const Table& table) {
        partial_norm_kernel<<<kNormBlocks, kThreads, 0, on>>>(table, scratch + partials);
        partials += kNormBlocks;
    });
    final_norm_kernel<<<1, kFinalThreads, 0, on>>>(scratch, partials, out);
    return cudaGetLastError();
}

int scale(const ListTensor* tensors, int64_t count, Type factor_type, const void* factor, void* stream) {
    for_tables<kListTensors, kListChunk>(tensors, count, [&](const Table& table) {
        const unsigned blocks = static_cast<unsigned>(table.chunks < 0x7fffffff ? table.chunks : 0x7fffffff);
        scale_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, factor_type, factor);
    });
    return cudaGetLastError();
}

}  // namespace megactl::cuda
