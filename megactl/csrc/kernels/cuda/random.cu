// CUDA twins of kernels/cpu/random.h: the same words, hence the same elements kept, and the same arithmetic.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/random.h"

namespace megactl::cuda {

__global__ void bits_kernel(Stream stream, uint64_t first, int64_t n, int64_t* out) {
    for (int64_t i = thread_index(); i < n; i += thread_count()) {
        uint32_t words[4];
        const uint64_t element = first + static_cast<uint64_t>(i);
        philox(stream, element >> 2, words);
        out[i] = words[element & 3];
    }
}

// A work item is one Philox block of one row; a row that starts or ends inside a block shares it with its neighbours.
template <typename T>
__global__ void normal_kernel(Stream stream, Rectangle rectangle, int64_t blocks_per_row, double std, T* out) {
    for (int64_t item = thread_index(); item < rectangle.rows * blocks_per_row; item += thread_count()) {
        const int64_t row = item / blocks_per_row, first = rectangle.row_start(row);
        const int64_t block = (first >> 2) + item % blocks_per_row;
        uint32_t words[4];
        double z[4];
        philox(stream, static_cast<uint64_t>(block), words);
        box_muller(words[0], words[1], z, z + 1);
        box_muller(words[2], words[3], z + 2, z + 3);
        for (int lane = 0; lane < 4; ++lane) {
            const int64_t column = 4 * block + lane - first;
            if (column >= 0 && column < rectangle.run) {
                out[row * rectangle.run + column] = store<T>(static_cast<typename Compute<T>::type>(z[lane] * std));
            }
        }
    }
}

// A work item is N consecutive elements, N a multiple of 4. kAligned: every item starts on a Philox block and on 16 bytes.
template <typename T, int N, bool kAligned, bool kResidual>
__global__ void dropout_kernel(Dropout s, const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ y) {
    using C = typename Compute<T>::type;
    const int64_t seed = s.rng[0], run = s.outer * s.inner, items = (run + N - 1) / N;
    const Stream stream{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), s.site,
                        static_cast<uint32_t>(s.rng[1])};
    const C scale = static_cast<C>(s.scale);
    for (int64_t b = blockIdx.y; b < s.batch; b += gridDim.y) {
        const uint64_t first = static_cast<uint64_t>(((s.rng[2] + b) * s.outer_size + s.outer_offset) * s.inner);
        for (int64_t item = thread_index(); item < items; item += thread_count()) {
            const int64_t column = item * N, at = b * run + column;
            const uint64_t element = first + static_cast<uint64_t>(column);
            uint32_t words[N + 4];
            const int phase = kAligned ? 0 : static_cast<int>(element & 3);
#pragma unroll
            for (int j = 0; j < N; j += 4) philox(stream, (element >> 2) + j / 4, words + j);
            if (!kAligned && phase) philox(stream, (element >> 2) + N / 4, words + N);
            if (kAligned) {
                const Pack<T, N> in = *reinterpret_cast<const Pack<T, N>*>(x + at);
                Pack<T, N> add, out;
                if (kResidual) add = *reinterpret_cast<const Pack<T, N>*>(residual + at);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    const C kept = words[j] >= s.threshold ? load(in.v[j]) * scale : C(0);
                    out.v[j] = store<T>(kResidual ? load(add.v[j]) + kept : kept);
                }
                *reinterpret_cast<Pack<T, N>*>(y + at) = out;
            } else {
                for (int j = 0; j < N && column + j < run; ++j) {
                    const C kept = words[phase + j] >= s.threshold ? load(x[at + j]) * scale : C(0);
                    y[at + j] = store<T>(kResidual ? load(residual[at + j]) + kept : kept);
                }
            }
        }
    }
}

template <typename T, int N, bool kAligned>
int launch_dropout(const Dropout& s, const T* x, const T* residual, T* y, cudaStream_t stream) {
    const dim3 grid(blocks_for((s.outer * s.inner + N - 1) / N), static_cast<unsigned>(s.batch < 65535 ? s.batch : 65535));
    if (residual) {
        dropout_kernel<T, N, kAligned, true><<<grid, kThreads, 0, stream>>>(s, x, residual, y);
    } else {
        dropout_kernel<T, N, kAligned, false><<<grid, kThreads, 0, stream>>>(s, x, nullptr, y);
    }
    return cudaGetLastError();
}

template <typename T>
int dropout_typed(const Dropout& s, const void* x, const void* residual, void* y, void* stream) {
    constexpr int N = sizeof(T) == 2 ? 8 : 4;
    const auto xs = static_cast<const T*>(x), rs = static_cast<const T*>(residual);
    const auto ys = static_cast<T*>(y);
    const auto on = static_cast<cudaStream_t>(stream);
    // The first sample is known to the device alone, so alignment must follow from the inner size.
    const bool vectors = s.inner % N == 0 && aligned(x) && aligned(y) && aligned(residual);
    return vectors ? launch_dropout<T, N, true>(s, xs, rs, ys, on) : launch_dropout<T, 4, false>(s, xs, rs, ys, on);
}

template <typename T>
int normal_typed(const Stream& words, const Rectangle& rectangle, double std, void* out, void* stream) {
    const int64_t blocks_per_row = rectangle.run / 4 + 2;
    normal_kernel<T><<<blocks_for(rectangle.rows * blocks_per_row), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        words, rectangle, blocks_per_row, std, static_cast<T*>(out));
    return cudaGetLastError();
}

int bits(const Stream& words, uint64_t first, int64_t n, int64_t* out, void* stream) {
    bits_kernel<<<blocks_for(n), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(words, first, n, out);
    return cudaGetLastError();
}

int normal(Type type, const Stream& words, const Rectangle& rectangle, double std, void* out, void* stream) {
    switch (type) {
        case Type::kDouble:
            return normal_typed<double>(words, rectangle, std, out, stream);
        case Type::kFloat:
            return normal_typed<float>(words, rectangle, std, out, stream);
        case Type::kBFloat16:
            return normal_typed<__nv_bfloat16>(words, rectangle, std, out, stream);
        case Type::kFloat16:
            return normal_typed<__half>(words, rectangle, std, out, stream);
    }
    return cudaErrorInvalidValue;
}

int dropout_add(Type type, const Dropout& settings, const void* x, const void* residual, void* y, void* stream) {
    switch (type) {
        case Type::kDouble:
            return dropout_typed<double>(settings, x, residual, y, stream);
        case Type::kFloat:
            return dropout_typed<float>(settings, x, residual, y, stream);
        case Type::kBFloat16:
            return dropout_typed<__nv_bfloat16>(settings, x, residual, y, stream);
        case Type::kFloat16:
            return dropout_typed<__half>(settings, x, residual, y, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace megactl::cuda
