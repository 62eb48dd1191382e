// CUDA twins of kernels/cpu/softmax.h. A row stays in the registers of one warp (up to 1024 keys) or of one thread block (up to 16384)
// and is read once; longer rows, rows that are not aligned, and double go through a kernel that reads a row several times.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/softmax.h"
#include "kernels/exponential.h"

namespace megactl::cuda {

constexpr int kWarp = 32, kWarpsABlock = 4;
constexpr int kBlockElements = 16;  // elements of a row in a thread's registers where a thread block holds it

// NaN is passed over: it comes back as soon as its power is taken.
struct Largest {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
    __device__ __forceinline__ double operator()(double a, double b) const { return fmax(a, b); }
};
struct Sum {
    template <typename C>
    __device__ __forceinline__ C operator()(C a, C b) const {
        return a + b;
    }
};

// Every thread of the row gets the same bits: butterflies add the same pairs in every lane, and all read the same partial results.
template <bool kBlock, typename C, typename Join>
__device__ __forceinline__ C over_row(C value, const Join& join) {
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) value = join(value, __shfl_xor_sync(0xffffffffu, value, lane));
    if constexpr (kBlock) {
        __shared__ C shared[kWarp];
        const unsigned warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
        __syncthreads();  // the results before this one have been read
        if (threadIdx.x % kWarp == 0) shared[warp] = value;
        __syncthreads();
        value = shared[0];
        for (unsigned other = 1; other < warps; ++other) value = join(value, shared[other]);
    }
    return value;
}

// Bit j: key column + j counts. Never reads the mask beyond what is visible.
template <int N>
__device__ __forceinline__ uint32_t allowed_bits(const Sight& seen, int64_t column) {
    const int64_t rest = seen.visible - column;
    if (rest <= 0) return 0u;
    uint32_t bits = rest >= N ? (1u << N) - 1u : (1u << static_cast<int>(rest)) - 1u;
    if (seen.mask) {
        // Rows of keys that are read in packs have a multiple of N keys, so a pack never leaves its row.
        const Pack<uint8_t, N> bytes = *reinterpret_cast<const Pack<uint8_t, N>*>(seen.mask + column);
        uint32_t unmasked = 0u;
#pragma unroll
        for (int j = 0; j < N; ++j) unmasked |= bytes.v[j] ? 1u << j : 0u;
        bits &= unmasked;
    }
    return bits;
}

// The row of this warp (or thread block), and its threads.
template <bool kBlock>
__device__ __forceinline__ int64_t row_here() {
    return kBlock ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// Element (p, j) of a thread is key (p * threads + thread) * N + j, so that a warp's loads are consecutive.
template <typename T, int N, int P, bool kBlock>
__global__ void __launch_bounds__(kBlock ? 1024 : kWarp * kWarpsABlock, kBlock || N == 1 ? 1 : 4) softmax_kernel(Softmax s, float scale, const T* scores, T* y) {
    const int64_t row = row_here<kBlock>();
    if (row >= s.rows) return;
    const Sight seen = sight(s, static_cast<uint32_t>(row));
    const int threads = kBlock ? blockDim.x : kWarp, keys = static_cast<int>(s.keys), first = threadIdx.x * N;
    uint32_t bits[P];
    Pack<T, N> in[P];
#pragma unroll
    for (int p = 0; p < P; ++p) bits[p] = allowed_bits<N>(seen, first + p * threads * N);
#pragma unroll
    for (int p = 0; p < P; ++p) {
        if (bits[p]) in[p] = *reinterpret_cast<const Pack<T, N>*>(scores + row * s.keys + first + p * threads * N);
    }
    const float sign = scale < 0.0f ? -1.0f : 1.0f, factor = scale * sign * static_cast<float>(kLog2E);
    float v[P][N], top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            v[p][j] = bits[p] >> j & 1u ? load(in[p].v[j]) * sign : -INFINITY;
            top = Largest()(top, v[p][j]);
        }
    }
    top = over_row<kBlock>(top, Largest());
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            v[p][j] = bits[p] >> j & 1u ? power_of_two((v[p][j] - top) * factor) : 0.0f;
            sum += v[p][j];
        }
    }
    const float share = 1.0f / over_row<kBlock>(sum, Sum());  // infinite where nothing is allowed; then nothing is multiplied by it
#pragma unroll
    for (int p = 0; p < P; ++p) {
        const int column = first + p * threads * N;
        if (column < keys) {
            Pack<T, N> out;
#pragma unroll
            for (int j = 0; j < N; ++j) out.v[j] = store<T>(bits[p] >> j & 1u ? v[p][j] * share : 0.0f);
            *reinterpret_cast<Pack<T, N>*>(y + row * s.keys + column) = out;
        }
    }
}

template <typename T, int N, int P, bool kBlock>
__global__ void __launch_bounds__(kBlock ? 1024 : kWarp * kWarpsABlock, kBlock || N == 1 ? 1 : 4)
    softmax_backward_kernel(Softmax s, float scale, const T* grad, const T* y, T* grad_scores) {
    const int64_t row = row_here<kBlock>();
    if (row >= s.rows) return;
    const Sight seen = sight(s, static_cast<uint32_t>(row));
    const int threads = kBlock ? blockDim.x : kWarp, keys = static_cast<int>(s.keys), first = threadIdx.x * N;
    uint32_t bits[P];
    Pack<T, N> grads[P], ys[P];
#pragma unroll
    for (int p = 0; p < P; ++p) bits[p] = allowed_bits<N>(seen, first + p * threads * N);
#pragma unroll
    for (int p = 0; p < P; ++p) {
        const int64_t at = row * s.keys + first + p * threads * N;
        if (bits[p]) grads[p] = *reinterpret_cast<const Pack<T, N>*>(grad + at), ys[p] = *reinterpret_cast<const Pack<T, N>*>(y + at);
    }
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
        for (int j = 0; j < N; ++j) sum = bits[p] >> j & 1u ? fmaf(load(grads[p].v[j]), load(ys[p].v[j]), sum) : sum;
    }
    sum = over_row<kBlock>(sum, Sum());
#pragma unroll
    for (int p = 0; p < P; ++p) {
        const int column = first + p * threads * N;
        if (column < keys) {
            Pack<T, N> out;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float value = scale * load(ys[p].v[j]) * (load(grads[p].v[j]) - sum);
                out.v[j] = store<T>(bits[p] >> j & 1u ? value : 0.0f);
            }
            *reinterpret_cast<Pack<T, N>*>(grad_scores + row * s.keys + column) = out;
        }
    }
}

// ---- Any row: a thread block goes over it three times (backward: twice), from the second time on through the caches. ----

__device__ __forceinline__ bool allowed(const Sight& seen, int64_t key) { return !seen.mask || seen.mask[key]; }

template <typename T>
__global__ void __launch_bounds__(kThreads) softmax_any_kernel(Softmax s, double scale, const T* scores, T* y) {
    using C = typename Compute<T>::type;
    const int64_t row = blockIdx.x;
    const Sight seen = sight(s, static_cast<uint32_t>(row));
    const T* const from = scores + row * s.keys;
    T* const to = y + row * s.keys;
    const C sign = scale < 0.0 ? C(-1) : C(1), factor = static_cast<C>(scale) * sign * static_cast<C>(kLog2E);
    C top = -static_cast<C>(INFINITY), sum = C(0);
    for (int64_t key = threadIdx.x; key < seen.visible; key += blockDim.x) {
        if (allowed(seen, key)) top = Largest()(top, load(from[key]) * sign);
    }
    top = over_row<true>(top, Largest());
    for (int64_t key = threadIdx.x; key < seen.visible; key += blockDim.x) {
        if (allowed(seen, key)) sum += power_of_two((load(from[key]) * sign - top) * factor);
    }
    const C share = C(1) / over_row<true>(sum, Sum());
    for (int64_t key = threadIdx.x; key < s.keys; key += blockDim.x) {
        const bool counts = key < seen.visible && allowed(seen, key);
        to[key] = store<T>(counts ? power_of_two((load(from[key]) * sign - top) * factor) * share : C(0));
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) softmax_backward_any_kernel(Softmax s, double scale, const T* grad, const T* y, T* grad_scores) {
    using C = typename Compute<T>::type;
    const int64_t row = blockIdx.x, at = row * s.keys;
    const Sight seen = sight(s, static_cast<uint32_t>(row));
    C sum = C(0);
    for (int64_t key = threadIdx.x; key < seen.visible; key += blockDim.x) {
        if (allowed(seen, key)) sum = multiply_add(load(grad[at + key]), load(y[at + key]), sum);
    }
    sum = over_row<true>(sum, Sum());
    for (int64_t key = threadIdx.x; key < s.keys; key += blockDim.x) {
        const bool counts = key < seen.visible && allowed(seen, key);
        grad_scores[at + key] = store<T>(counts ? static_cast<C>(scale) * load(y[at + key]) * (load(grad[at + key]) - sum) : C(0));
    }
}

// ---- Launches ----

// Which kernel a row goes to.
struct Plan {
    bool vectors;   // 16-byte loads
    int elements;   // of a row in a thread's registers; 0: any row
    int threads;    // of a thread block that holds a row; 0: a warp holds it
};

template <typename T>
Plan plan(const Softmax& s, bool all_aligned) {
    constexpr int N = 16 / sizeof(T);
    const bool vectors = all_aligned && s.keys % N == 0 && reinterpret_cast<uintptr_t>(s.mask) % N == 0;
    if (sizeof(T) == 8 || s.keys > 1024 * kBlockElements || (!vectors && s.keys > 1024)) return {false, 0, 0};
    if (s.keys <= 8 * kWarp) return {vectors, 8, 0};
    if (s.keys <= 16 * kWarp) return {vectors, vectors ? 16 : 32, 0};
    if (s.keys <= 32 * kWarp) return {vectors, 32, 0};
    int threads = 128;
    while (threads * kBlockElements < s.keys) threads *= 2;
    return {true, kBlockElements, threads};
}

// Calls use(Shape{}) with the constants of the plan as types.
template <int N, bool kBlock, int P>
struct Shape {
    static constexpr int kN = N, kP = P;
    static constexpr bool kWhole = kBlock;
};
template <typename T, typename Use>
int with_shape(const Plan& plan, const Use& use) {
    constexpr int N = 16 / sizeof(T);
    if (plan.threads) return use(Shape<N, true, kBlockElements / N>{});
    if (!plan.vectors) return plan.elements == 8 ? use(Shape<1, false, 8>{}) : use(Shape<1, false, 32>{});
    if (plan.elements == 8) return use(Shape<N, false, 8 / N>{});
    return plan.elements == 16 ? use(Shape<N, false, 16 / N>{}) : use(Shape<N, false, 32 / N>{});
}

inline dim3 row_threads(const Plan& plan) {
    return !plan.elements ? dim3(kThreads) : plan.threads ? dim3(static_cast<unsigned>(plan.threads)) : dim3(kWarp, kWarpsABlock);
}
inline unsigned row_blocks(const Plan& plan, int64_t rows) {
    const int64_t each = plan.elements && !plan.threads ? kWarpsABlock : 1;
    return static_cast<unsigned>((rows + each - 1) / each);
}

template <typename T>
int softmax_typed(const Softmax& s, double scale, const void* scores, void* y, void* stream) {
    const auto from = static_cast<const T*>(scores);
    const auto to = static_cast<T*>(y);
    const auto on = static_cast<cudaStream_t>(stream);
    const Plan how = plan<T>(s, aligned(scores) && aligned(y));
    const unsigned blocks = row_blocks(how, s.rows);
    if (!how.elements) {
        softmax_any_kernel<T><<<blocks, row_threads(how), 0, on>>>(s, scale, from, to);
        return cudaGetLastError();
    }
    if constexpr (sizeof(T) < 8) {
        return with_shape<T>(how, [&](auto shape) {
            using S = decltype(shape);
            softmax_kernel<T, S::kN, S::kP, S::kWhole><<<blocks, row_threads(how), 0, on>>>(s, static_cast<float>(scale), from, to);
            return static_cast<int>(cudaGetLastError());
        });
    }
    return cudaErrorInvalidValue;
}

template <typename T>
int softmax_backward_typed(const Softmax& s, double scale, const void* grad, const void* y, void* grad_scores, void* stream) {
    const auto grads = static_cast<const T*>(grad), ys = static_cast<const T*>(y);
    const auto to = static_cast<T*>(grad_scores);
    const auto on = static_cast<cudaStream_t>(stream);
    const Plan how = plan<T>(s, aligned(grad) && aligned(y) && aligned(grad_scores));
    const unsigned blocks = row_blocks(how, s.rows);
    if (!how.elements) {
        softmax_backward_any_kernel<T><<<blocks, row_threads(how), 0, on>>>(s, scale, grads, ys, to);
        return cudaGetLastError();
    }
    if constexpr (sizeof(T) < 8) {
        return with_shape<T>(how, [&](auto shape) {
            using S = decltype(shape);
            softmax_backward_kernel<T, S::kN, S::kP, S::kWhole><<<blocks, row_threads(how), 0, on>>>(s, static_cast<float>(scale), grads, ys, to);
            return static_cast<int>(cudaGetLastError());
        });
    }
    return cudaErrorInvalidValue;
}

int softmax(Type type, const Softmax& shape, double scale, const void* scores, void* y, void* stream) {
    switch (type) {
        case Type::kDouble:
            return softmax_typed<double>(shape, scale, scores, y, stream);
        case Type::kFloat:
            return softmax_typed<float>(shape, scale, scores, y, stream);
        case Type::kBFloat16:
            return softmax_typed<__nv_bfloat16>(shape, scale, scores, y, stream);
        case Type::kFloat16:
            return softmax_typed<__half>(shape, scale, scores, y, stream);
    }
    return cudaErrorInvalidValue;
}

int softmax_backward(Type type, const Softmax& shape, double scale, const void* grad, const void* y, void* grad_scores, void* stream) {
    switch (type) {
        case Type::kDouble:
            return softmax_backward_typed<double>(shape, scale, grad, y, grad_scores, stream);
        case Type::kFloat:
            return softmax_backward_typed<float>(shape, scale, grad, y, grad_scores, stream);
        case Type::kBFloat16:
            return softmax_backward_typed<__nv_bfloat16>(shape, scale, grad, y, grad_scores, stream);
        case Type::kFloat16:
            return softmax_backward_typed<__half>(shape, scale, grad, y, grad_scores, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace megactl::cuda
