// CUDA twin of kernels/cpu/cross_entropy.h. A thread block takes a row, which forward and backward each read once.
//
// exp is ex2.approx of an argument rounded once: within 2^-22 for what weighs in a sum, far below the rounding of 16-bit logits.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/cross_entropy.h"

namespace megactl::cuda {

// Vectors a thread has under way at once.
constexpr int kUnroll = 4;
constexpr int kMostThreads = 512;

template <typename T>
constexpr int kWidth = 16 / sizeof(T);

// A row cut into elements up to the next 16-byte boundary, whole vectors, and the elements that are left.
struct Cut {
    int head, vectors, tail;
};

template <typename T>
__device__ __forceinline__ Cut cut_row(const T* row, int n, bool vectors) {
    constexpr int N = kWidth<T>;
    if (!vectors) return {n, 0, 0};
    const int misplaced = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % N);
    const int head = min((N - misplaced) % N, n);
    return {head, (n - head) / N, (n - head) % N};
}

// Calls single(column) for the elements outside the vectors and pack(i, vector) for the vectors, kUnroll of which are loaded together.
template <typename T, typename Single, typename Vector>
__device__ __forceinline__ void for_row(const T* row, const Cut& cut, const Single& single, const Vector& vector) {
    using V = Pack<T, kWidth<T>>;
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < cut.head; i += threads) single(i);
    const V* const packs = reinterpret_cast<const V*>(row + cut.head);
    int i = thread;
    for (; i + (kUnroll - 1) * threads < cut.vectors; i += kUnroll * threads) {
        V held[kUnroll];
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) held[k] = packs[i + k * threads];
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) vector(i + k * threads, held[k]);
    }
    for (; i < cut.vectors; i += threads) vector(i, packs[i]);
    const int first = cut.head + cut.vectors * kWidth<T>;
    for (int j = thread; j < cut.tail; j += threads) single(first + j);
}

template <typename C>
__device__ __forceinline__ SoftmaxSum<C> reduce_warp(SoftmaxSum<C> sum) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
        const C top = __shfl_xor_sync(0xffffffffu, sum.top, offset), total = __shfl_xor_sync(0xffffffffu, sum.total, offset);
        sum.merge(top, total);
    }
    return sum;
}

// The result is valid in the first warp.
template <typename C>
__device__ __forceinline__ SoftmaxSum<C> reduce_block(SoftmaxSum<C> sum) {
    __shared__ C tops[kMostThreads / 32], totals[kMostThreads / 32];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    sum = reduce_warp(sum);
    if (lane == 0) tops[warp] = sum.top, totals[warp] = sum.total;
    __syncthreads();
    if (warp == 0) {
        SoftmaxSum<C> other;
        if (lane < blockDim.x / 32) other.top = tops[lane], other.total = totals[lane];
        sum = reduce_warp(other);
    }
    return sum;
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads)
    forward_kernel(VocabularyShard shard, const T* __restrict__ logits, CrossEntropyRows out, bool loss) {
    using C = typename Compute<T>::type;
    const int64_t row = blockIdx.x;
    const T* const l = logits + row * shard.columns;
    SoftmaxSum<C> sum;
    C target = 0;
    if (threadIdx.x == 0) {
        const int64_t column = shard.column_of(out.labels[row]);
        if (column >= 0) target = load(l[column]);
    }
    const auto single = [&](int column) {
        const C value = load(l[column]);
        sum.raise(value);
        sum.total += exp_from_top(value, finite_top(sum.top));
    };
    const auto vector = [&](int, const Pack<T, kWidth<T>>& pack) {
        C value[kWidth<T>];
        C top = value[0] = load(pack.v[0]);
#pragma unroll
        for (int j = 1; j < kWidth<T>; ++j) value[j] = load(pack.v[j]), top = value[j] > top ? value[j] : top;
        // `top` may be NaN where the first value is: the comparison inside then leaves the maximum as it is, and NaN shows in the sum.
        sum.raise(top);
        const C shift = finite_top(sum.top);
        C part = 0;
#pragma unroll
        for (int j = 0; j < kWidth<T>; ++j) part += exp_from_top(value[j], shift);
        sum.total += part;
    };
    for_row(l, cut_row(l, static_cast<int>(shard.held), true), single, vector);
    sum = reduce_block(sum);
    if (threadIdx.x == 0) {
        static_cast<C*>(out.top)[row] = sum.top;
        static_cast<C*>(out.total)[row] = sum.total;
        static_cast<C*>(out.third)[row] = loss ? token_loss(sum, target) : target;
    }
}

template <typename T>
__device__ __forceinline__ void zero_row(T* out, int n) {
    using V = Pack<T, kWidth<T>>;
    const Cut cut = cut_row(out, n, true);
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const T zero = store<T>(typename Compute<T>::type(0));
    V zeros;
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) zeros.v[j] = zero;
    for (int i = thread; i < cut.head; i += threads) out[i] = zero;
    for (int i = thread; i < cut.vectors; i += threads) reinterpret_cast<V*>(out + cut.head)[i] = zeros;
    for (int i = n - cut.tail + thread; i < n; i += threads) out[i] = zero;
}

// kVectors: rows of `logits` and `out` lie alike to 16-byte boundaries.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kMostThreads)
    backward_kernel(VocabularyShard shard, const T* logits, CrossEntropyGradient given, T* out) {
    using C = typename Compute<T>::type;
    constexpr int N = kWidth<T>;
    const int64_t row = blockIdx.x;
    const int held = static_cast<int>(shard.held), columns = static_cast<int>(shard.columns);
    const T* const l = logits + row * shard.columns;
    T* const to = out + row * shard.columns;
    const C scale = static_cast<const C*>(given.scale)[row];
    if (scale == C(0)) {  // a masked token, whose logits need not be read
        zero_row(to, columns);
        return;
    }
    const C top = static_cast<const C*>(given.top)[row], factor = scale / static_cast<const C*>(given.total)[row];
    const int label = static_cast<int>(shard.column_of(given.labels[row]));
    const Cut cut = cut_row(l, held, kVectors);
    const auto single = [&](int column) {
        const C grad = exp_from_top(load(l[column]), top) * factor;
        to[column] = store<T>(column == label ? grad - scale : grad);
    };
    const auto vector = [&](int i, const Pack<T, N>& pack) {
        C grad[N];
#pragma unroll
        for (int j = 0; j < N; ++j) grad[j] = exp_from_top(load(pack.v[j]), top) * factor;
        const int place = label - cut.head - i * N;
        if (place >= 0 && place < N) {
#pragma unroll
            for (int j = 0; j < N; ++j) grad[j] -= j == place ? scale : C(0);
        }
        Pack<T, N> result;
#pragma unroll
        for (int j = 0; j < N; ++j) result.v[j] = store<T>(grad[j]);
        reinterpret_cast<Pack<T, N>*>(to + cut.head)[i] = result;
    };
    for_row(l, cut, single, vector);
    zero_row(to + held, columns - held);
}

// Enough threads for every one to have a few vectors, so that short rows do not spend their time in the reduction.
inline unsigned threads_for(int64_t columns, int64_t width) {
    unsigned threads = 64;
    while (threads < kMostThreads && threads * width * kUnroll < columns) threads *= 2;
    return threads;
}

template <typename T>
int forward_typed(const VocabularyShard& shard, const void* logits, const CrossEntropyRows& rows, bool loss, cudaStream_t stream) {
    const unsigned threads = threads_for(shard.columns, kWidth<T>);
    forward_kernel<T><<<static_cast<unsigned>(shard.rows), threads, 0, stream>>>(shard, static_cast<const T*>(logits), rows, loss);
    return cudaGetLastError();
}

template <typename T>
int backward_typed(const VocabularyShard& shard, const void* logits, const CrossEntropyGradient& rows, void* out, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(shard.rows), threads = threads_for(shard.columns, kWidth<T>);
    const bool vectors = reinterpret_cast<uintptr_t>(logits) % 16 == reinterpret_cast<uintptr_t>(out) % 16;
    if (vectors) {
        backward_kernel<T, true><<<blocks, threads, 0, stream>>>(shard, static_cast<const T*>(logits), rows, static_cast<T*>(out));
    } else {
        backward_kernel<T, false><<<blocks, threads, 0, stream>>>(shard, static_cast<const T*>(logits), rows, static_cast<T*>(out));
    }
    return cudaGetLastError();
}

int cross_entropy_forward(Type type, const VocabularyShard& shard, const void* logits, const CrossEntropyRows& rows, bool loss,
                          void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    switch (type) {
        case Type::kDouble:
            return forward_typed<double>(shard, logits, rows, loss, on);
        case Type::kFloat:
            return forward_typed<float>(shard, logits, rows, loss, on);
        case Type::kBFloat16:
            return forward_typed<__nv_bfloat16>(shard, logits, rows, loss, on);
        case Type::kFloat16:
            return forward_typed<__half>(shard, logits, rows, loss, on);
    }
    return cudaErrorInvalidValue;
}

int cross_entropy_backward(Type type, const VocabularyShard& shard, const void* logits, const CrossEntropyGradient& rows, void* out,
                           void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    switch (type) {
        case Type::kDouble:
            return backward_typed<double>(shard, logits, rows, out, on);
        case Type::kFloat:
            return backward_typed<float>(shard, logits, rows, out, on);
        case Type::kBFloat16:
            return backward_typed<__nv_bfloat16>(shard, logits, rows, out, on);
        case Type::kFloat16:
            return backward_typed<__half>(shard, logits, rows, out, on);
    }
    return cudaErrorInvalidValue;
}

}  // namespace megactl::cuda
