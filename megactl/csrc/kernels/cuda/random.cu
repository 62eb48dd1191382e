// CUDA twins of kernels/cpu/random.h: the same words, hence the same elements kept, and the same arithmetic.
#include "kernels/cuda/packs.cuh"
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

// Which of elements [lane, lane + N) of a block are kept.
template <int N>
__device__ __forceinline__ void draw_kept(const Stream& stream, uint64_t block, int lane, uint32_t threshold, bool (&keep)[N]) {
    uint32_t words[4], seconds[4];
    const auto draw = [&](const Stream& from, uint32_t(&to)[4]) {
        philox(from, block, to);
        if (N == 4 && lane == 4) to[0] = to[2], to[1] = to[3];  // a runtime index would put the words into memory
    };
    draw(stream, words);
    const uint32_t upper = threshold >> 16;
    bool tie = false;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        keep[j] = half_word(words, j) > upper;
        tie |= half_word(words, j) == upper;
    }
    if (!tie) return;
    draw(drop_ties(stream), seconds);
#pragma unroll
    for (int j = 0; j < N; ++j) keep[j] |= half_word(words, j) == upper && half_word(seconds, j) >= (threshold & 0xffffu);
}

template <typename Settings>
__device__ __forceinline__ Stream dropout_stream(const Settings& s) {
    const int64_t seed = s.rng[0];
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), s.site, static_cast<uint32_t>(s.rng[1])};
}

// Element of the stream with which sample b of the local batch begins.
__device__ __forceinline__ uint64_t first_element(const Dropout& s, int64_t b) {
    return static_cast<uint64_t>(((s.rng[2] + b) * s.outer_size + s.outer_offset) * s.inner);
}

// N elements at `at`, which the stream counts from `element` on: a multiple of N, and on 16 bytes.
template <typename T, int N, bool kResidual>
__device__ __forceinline__ void drop_pack(const Stream& stream, uint32_t threshold, typename Compute<T>::type scale, uint64_t element,
                                          int64_t at, const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ y) {
    using C = typename Compute<T>::type;
    using P = RowPack<T, N>;
    const P in = load_once(reinterpret_cast<const P*>(x + at));
    P add;
    if (kResidual) add = load_once(reinterpret_cast<const P*>(residual + at));
    bool keep[N];
    draw_kept(stream, element >> 3, static_cast<int>(element & 7), threshold, keep);
    C v[N], r[N];
    widen(in, v);
    if (kResidual) widen(add, r);
#pragma unroll
    for (int j = 0; j < N; ++j) {
        v[j] = keep[j] ? v[j] * scale : C(0);
        if (kResidual) v[j] = r[j] + v[j];
    }
    *reinterpret_cast<P*>(y + at) = narrow<T>(v);
}

// What the run of elements first .. first + run, at x + offset, has of Philox block `item` of those it touches.
template <typename T>
__device__ __forceinline__ void drop_block(const Stream& stream, uint32_t threshold, typename Compute<T>::type scale, uint64_t first,
                                           int64_t run, int64_t item, int64_t offset, const T* __restrict__ x,
                                           const T* __restrict__ residual, T* __restrict__ y) {
    const uint64_t block = (first >> 3) + static_cast<uint64_t>(item);
    bool keep[8];
    draw_kept(stream, block, 0, threshold, keep);
#pragma unroll
    for (int lane = 0; lane < 8; ++lane) {
        const int64_t column = static_cast<int64_t>(8 * block + lane - first), at = offset + column;
        if (column < 0 || column >= run) continue;
        const auto v = keep[lane] ? load(x[at]) * scale : typename Compute<T>::type(0);
        y[at] = store<T>(residual ? load(residual[at]) + v : v);
    }
}

// A work item is N elements, 4 or 8, that start on a multiple of N and on 16 bytes.
template <typename T, int N, bool kResidual>
__global__ void dropout_kernel(Dropout s, const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ y) {
    const int64_t run = s.outer * s.inner, items = run / N;
    const Stream stream = dropout_stream(s);
    const auto scale = static_cast<typename Compute<T>::type>(s.scale);
    for (int64_t b = blockIdx.y; b < s.batch; b += gridDim.y) {
        const uint64_t first = first_element(s, b);
        for (int64_t item = thread_index(); item < items; item += thread_count()) {
            const uint64_t element = first + static_cast<uint64_t>(item * N);
            drop_pack<T, N, kResidual>(stream, s.threshold, scale, element, b * run + item * N, x, residual, y);
        }
    }
}

// Elements that lie anywhere. A work item is what a sample has of one Philox block; a sample that starts or ends inside a block shares it.
template <typename T>
__global__ void dropout_scattered_kernel(Dropout s, const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ y) {
    const int64_t run = s.outer * s.inner, items = run / 8 + 2;
    const Stream stream = dropout_stream(s);
    const auto scale = static_cast<typename Compute<T>::type>(s.scale);
    for (int64_t b = blockIdx.y; b < s.batch; b += gridDim.y) {
        const uint64_t first = first_element(s, b);
        for (int64_t item = thread_index(); item < items; item += thread_count()) {
            drop_block<T>(stream, s.threshold, scale, first, run, item, b * run, x, residual, y);
        }
    }
}

// The same two for rows with places of their own. Index: uint32_t where it holds the number of work items, for a division by 64 bits
// takes about as long as drawing.
template <typename T, int N, bool kResidual, typename Index>
__global__ void dropout_rows_kernel(DropoutRows s, const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ y) {
    const Stream stream = dropout_stream(s);
    const auto scale = static_cast<typename Compute<T>::type>(s.scale);
    const Index each = static_cast<Index>(s.columns / N);
    const int64_t items = s.rows * (s.columns / N);
    for (int64_t item = thread_index(); item < items; item += thread_count()) {
        const int64_t row = static_cast<Index>(item) / each, column = (item - row * static_cast<int64_t>(each)) * N;
        const uint64_t element = static_cast<uint64_t>(s.ids[row] * s.columns + column);
        drop_pack<T, N, kResidual>(stream, s.threshold, scale, element, item * N, x, residual, y);
    }
}

template <typename T, typename Index>
__global__ void dropout_scattered_rows_kernel(DropoutRows s, const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ y) {
    const Stream stream = dropout_stream(s);
    const auto scale = static_cast<typename Compute<T>::type>(s.scale);
    const Index each = static_cast<Index>(s.columns / 8 + 2);
    const int64_t items = s.rows * (s.columns / 8 + 2);
    for (int64_t item = thread_index(); item < items; item += thread_count()) {
        const int64_t row = static_cast<Index>(item) / each, block = item - row * static_cast<int64_t>(each);
        const uint64_t first = static_cast<uint64_t>(s.ids[row] * s.columns);
        drop_block<T>(stream, s.threshold, scale, first, s.columns, block, row * s.columns, x, residual, y);
    }
}

constexpr int64_t kMostResident = 2048 / kThreads;  // thread blocks on a multiprocessor

template <typename T>
int dropout_typed(const Dropout& s, const void* x, const void* residual, void* y, void* stream) {
    constexpr int N = sizeof(T) == 2 ? 8 : 4;
    const auto xs = static_cast<const T*>(x), rs = static_cast<const T*>(residual);
    const auto ys = static_cast<T*>(y);
    const auto on = static_cast<cudaStream_t>(stream);
    const auto grid = [&](int64_t items, int64_t most = 0x7fffffff) {
        return dim3(blocks_for(items, most), static_cast<unsigned>(s.batch < 65535 ? s.batch : 65535));
    };
    const int64_t run = s.outer * s.inner;
    // The first sample is known to the device alone, so alignment must follow from the inner size.
    if (s.inner % N != 0 || !aligned(x) || !aligned(y) || !aligned(residual)) {
        dropout_scattered_kernel<T><<<grid(run / 8 + 2), kThreads, 0, on>>>(s, xs, rs, ys);
    } else if (residual) {
        dropout_kernel<T, N, true><<<grid(run / N), kThreads, 0, on>>>(s, xs, rs, ys);
    } else {
        // As many thread blocks as run at once: measured on H100, 5 % faster so, but with a residual slower.
        const int64_t resident = (kMostResident * processors() + s.batch - 1) / s.batch;
        dropout_kernel<T, N, false><<<grid(run / N, resident), kThreads, 0, on>>>(s, xs, nullptr, ys);
    }
    return cudaGetLastError();
}

template <typename T, typename Index>
void launch_rows(const DropoutRows& s, const T* x, const T* residual, T* y, cudaStream_t on) {
    constexpr int N = sizeof(T) == 2 ? 8 : 4;
    if (s.columns % N != 0 || !aligned(x) || !aligned(y) || !aligned(residual)) {
        dropout_scattered_rows_kernel<T, Index><<<blocks_for(s.rows * (s.columns / 8 + 2)), kThreads, 0, on>>>(s, x, residual, y);
    } else if (residual) {
        dropout_rows_kernel<T, N, true, Index><<<blocks_for(s.rows * (s.columns / N)), kThreads, 0, on>>>(s, x, residual, y);
    } else {
        const unsigned blocks = blocks_for(s.rows * (s.columns / N), kMostResident * processors());
        dropout_rows_kernel<T, N, false, Index><<<blocks, kThreads, 0, on>>>(s, x, nullptr, y);
    }
}

template <typename T>
int dropout_rows_typed(const DropoutRows& s, const void* x, const void* residual, void* y, void* stream) {
    const auto xs = static_cast<const T*>(x), rs = static_cast<const T*>(residual);
    const auto on = static_cast<cudaStream_t>(stream);
    // A row has at most columns work items, or the two that its ends may need.
    if (s.rows * (s.columns + 2) <= 0xffffffffll) {
        launch_rows<T, uint32_t>(s, xs, rs, static_cast<T*>(y), on);
    } else {
        launch_rows<T, uint64_t>(s, xs, rs, static_cast<T*>(y), on);
    }
    return cudaGetLastError();
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

int dropout_add_rows(Type type, const DropoutRows& settings, const void* x, const void* residual, void* y, void* stream) {
    switch (type) {
        case Type::kDouble:
            return dropout_rows_typed<double>(settings, x, residual, y, stream);
        case Type::kFloat:
            return dropout_rows_typed<float>(settings, x, residual, y, stream);
        case Type::kBFloat16:
            return dropout_rows_typed<__nv_bfloat16>(settings, x, residual, y, stream);
        case Type::kFloat16:
            return dropout_rows_typed<__half>(settings, x, residual, y, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace megactl::cuda
