// CUDA twins of kernels/cpu/gelu.h. A thread owns N adjacent columns, so the bias, and in backward its gradient, stay in registers while
// the thread goes down the rows.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gelu.h"
#include "kernels/gelu.h"

namespace megactl::cuda {

// Rows a thread loads before it computes: bytes under way hide the latency of memory.
constexpr int kForwardRows = 4, kBackwardRows = 2;
// Thread blocks that must fit into a multiprocessor, for the same reason: at most 80 registers a thread, which no kernel here exceeds.
constexpr int kResident = 3;

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> pack_at(const T* p) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <typename T, int N, bool kTanh>
__global__ void __launch_bounds__(kThreads, kResident) bias_gelu_kernel(Gelu shape, const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y) {
    using C = typename Compute<T>::type;
    const int64_t column = thread_index() * N, step = static_cast<int64_t>(gridDim.y) * blockDim.y;
    if (column >= shape.columns) return;
    const Pack<T, N> packed = pack_at<T, N>(bias + column);
    C add[N];
#pragma unroll
    for (int j = 0; j < N; ++j) add[j] = load(packed.v[j]);
    for (int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; first < shape.rows; first += kForwardRows * step) {
        Pack<T, N> in[kForwardRows];
#pragma unroll
        for (int r = 0; r < kForwardRows; ++r) {
            if (first + r * step < shape.rows) in[r] = pack_at<T, N>(x + (first + r * step) * shape.columns + column);
        }
#pragma unroll
        for (int r = 0; r < kForwardRows; ++r) {
            if (first + r * step < shape.rows) {
                Pack<T, N> out;
#pragma unroll
                for (int j = 0; j < N; ++j) out.v[j] = store<T>(gelu<kTanh>(load(in[r].v[j]) + add[j]));
                *reinterpret_cast<Pack<T, N>*>(y + (first + r * step) * shape.columns + column) = out;
            }
        }
    }
}

// A thread block takes rows [blockIdx.y * rows_a_block, + rows_a_block) of blockDim.x * N columns and writes one row of `sums`.
template <typename T, int N, bool kTanh>
__global__ void __launch_bounds__(kThreads, kResident)
    bias_gelu_backward_kernel(Gelu shape, int64_t rows_a_block, const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ bias,
                              T* __restrict__ grad_x, typename Compute<T>::type* __restrict__ sums) {
    using C = typename Compute<T>::type;
    __shared__ C shared[kThreads * N];
    const int64_t column = thread_index() * N, begin = blockIdx.y * rows_a_block;
    const int64_t end = begin + rows_a_block < shape.rows ? begin + rows_a_block : shape.rows;
    const bool inside = column < shape.columns;
    C add[N], sum[N];
#pragma unroll
    for (int j = 0; j < N; ++j) add[j] = sum[j] = C(0);
    if (inside) {
        const Pack<T, N> packed = pack_at<T, N>(bias + column);
#pragma unroll
        for (int j = 0; j < N; ++j) add[j] = load(packed.v[j]);
        for (int64_t first = begin + threadIdx.y; first < end; first += kBackwardRows * blockDim.y) {
            Pack<T, N> grads[kBackwardRows], in[kBackwardRows];
#pragma unroll
            for (int r = 0; r < kBackwardRows; ++r) {
                const int64_t row = first + r * static_cast<int64_t>(blockDim.y), at = row * shape.columns + column;
                if (row < end) grads[r] = pack_at<T, N>(grad + at), in[r] = pack_at<T, N>(x + at);
            }
#pragma unroll
            for (int r = 0; r < kBackwardRows; ++r) {
                const int64_t row = first + r * static_cast<int64_t>(blockDim.y);
                if (row < end) {
                    Pack<T, N> out;
#pragma unroll
                    for (int j = 0; j < N; ++j) {
                        const C g = load(grads[r].v[j]) * gelu_slope<kTanh>(load(in[r].v[j]) + add[j]);
                        sum[j] += g;
                        out.v[j] = store<T>(g);
                    }
                    *reinterpret_cast<Pack<T, N>*>(grad_x + row * shape.columns + column) = out;
                }
            }
        }
    }
    // shared[y][j][x]: neighbours in x never meet in a bank.
#pragma unroll
    for (int j = 0; j < N; ++j) shared[(threadIdx.y * N + j) * blockDim.x + threadIdx.x] = sum[j];
    __syncthreads();
    if (threadIdx.y != 0 || !inside) return;
    for (int j = 0; j < N; ++j) {
        C total = C(0);
        for (unsigned lane = 0; lane < blockDim.y; ++lane) total += shared[(lane * N + j) * blockDim.x + threadIdx.x];
        sums[blockIdx.y * shape.columns + column + j] = total;
    }
}

// total[column] = sum of partial[block][column] over blocks, by 32 x 8 threads.
template <typename C>
__global__ void __launch_bounds__(kThreads) sum_blocks_kernel(int64_t blocks, int64_t columns, const C* __restrict__ partial, C* __restrict__ total) {
    __shared__ C shared[8][32];
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
    C sum = C(0);
    if (column < columns) {
#pragma unroll 4
        for (int64_t block = threadIdx.y; block < blocks; block += 8) sum += partial[block * columns + column];
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= columns) return;
    for (int lane = 1; lane < 8; ++lane) sum += shared[lane][threadIdx.x];
    total[column] = sum;
}

// 256 threads as columns x rows: as many side by side as the columns need, at most a warp.
inline dim3 gelu_block(int64_t packs) {
    unsigned x = 1;
    while (x < 32 && x < packs) x *= 2;
    return dim3(x, kThreads / x);
}

inline unsigned column_blocks(int64_t packs, const dim3& block) { return static_cast<unsigned>((packs + block.x - 1) / block.x); }

int64_t gelu_row_blocks(const Gelu& shape) {
    // About 4096 thread blocks keep every GPU busy to the end; 32 rows or more make the partial sums a small part of the traffic.
    const int64_t tiles = (shape.columns + 255) / 256, wanted = (4096 + tiles - 1) / tiles, most = (shape.rows + 31) / 32;
    return wanted < most ? wanted : most > 1 ? most : 1;
}

template <typename T, int N, bool kTanh>
int launch_gelu(const Gelu& shape, const T* x, const T* bias, T* y, cudaStream_t stream) {
    const int64_t packs = shape.columns / N;
    const dim3 block = gelu_block(packs);
    const int64_t wanted = (shape.rows + block.y * kForwardRows - 1) / (block.y * kForwardRows);
    const dim3 grid(column_blocks(packs, block), static_cast<unsigned>(wanted < 65535 ? wanted : 65535));
    bias_gelu_kernel<T, N, kTanh><<<grid, block, 0, stream>>>(shape, x, bias, y);
    return cudaGetLastError();
}

template <typename T, int N, bool kTanh>
int launch_gelu_backward(const Gelu& shape, const GeluBackward& t, cudaStream_t stream) {
    using C = typename Compute<T>::type;
    const int64_t packs = shape.columns / N, blocks = gelu_row_blocks(shape), rows = (shape.rows + blocks - 1) / blocks;
    const dim3 block = gelu_block(packs), grid(column_blocks(packs, block), static_cast<unsigned>(blocks));
    const auto total = static_cast<C*>(t.grad_bias);
    const auto sums = blocks == 1 ? total : static_cast<C*>(t.partial);
    bias_gelu_backward_kernel<T, N, kTanh><<<grid, block, 0, stream>>>(shape, rows, static_cast<const T*>(t.grad), static_cast<const T*>(t.x),
                                                                       static_cast<const T*>(t.bias), static_cast<T*>(t.grad_x), sums);
    if (const int error = cudaGetLastError()) return error;
    if (blocks > 1) {
        sum_blocks_kernel<C><<<static_cast<unsigned>((shape.columns + 31) / 32), dim3(32, 8), 0, stream>>>(blocks, shape.columns, sums, total);
    }
    return cudaGetLastError();
}

template <typename T>
int gelu_typed(const Gelu& shape, const void* x, const void* bias, void* y, void* stream) {
    constexpr int N = 16 / sizeof(T);
    const bool vectors = shape.columns % N == 0 && aligned(x) && aligned(bias) && aligned(y);
    const auto launch = vectors ? (shape.tanh ? launch_gelu<T, N, true> : launch_gelu<T, N, false>)
                                : (shape.tanh ? launch_gelu<T, 1, true> : launch_gelu<T, 1, false>);
    return launch(shape, static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), static_cast<cudaStream_t>(stream));
}

template <typename T>
int gelu_backward_typed(const Gelu& shape, const GeluBackward& t, void* stream) {
    constexpr int N = 16 / sizeof(T);
    const bool vectors = shape.columns % N == 0 && aligned(t.grad) && aligned(t.x) && aligned(t.bias) && aligned(t.grad_x);
    const auto launch = vectors ? (shape.tanh ? launch_gelu_backward<T, N, true> : launch_gelu_backward<T, N, false>)
                                : (shape.tanh ? launch_gelu_backward<T, 1, true> : launch_gelu_backward<T, 1, false>);
    return launch(shape, t, static_cast<cudaStream_t>(stream));
}

int bias_gelu(Type type, const Gelu& shape, const void* x, const void* bias, void* y, void* stream) {
    switch (type) {
        case Type::kDouble:
            return gelu_typed<double>(shape, x, bias, y, stream);
        case Type::kFloat:
            return gelu_typed<float>(shape, x, bias, y, stream);
        case Type::kBFloat16:
            return gelu_typed<__nv_bfloat16>(shape, x, bias, y, stream);
        case Type::kFloat16:
            return gelu_typed<__half>(shape, x, bias, y, stream);
    }
    return cudaErrorInvalidValue;
}

int bias_gelu_backward(Type type, const Gelu& shape, const GeluBackward& tensors, void* stream) {
    switch (type) {
        case Type::kDouble:
            return gelu_backward_typed<double>(shape, tensors, stream);
        case Type::kFloat:
            return gelu_backward_typed<float>(shape, tensors, stream);
        case Type::kBFloat16:
            return gelu_backward_typed<__nv_bfloat16>(shape, tensors, stream);
        case Type::kFloat16:
            return gelu_backward_typed<__half>(shape, tensors, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace megactl::cuda
