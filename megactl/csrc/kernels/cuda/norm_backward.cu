// Gradients of LayerNorm and RMSNorm. One pass over memory gives grad_x and, for each thread block, the sums over its rows of the
// weight gradients; a second, small kernel adds these up. No atomics: the same bits in every run on a GPU.
#include "kernels/cuda/norm.cuh"

namespace megactl::cuda {

// Threads of a block where a thread holds one pack, with several rows beside each other where they are short: two blocks take all the
// registers of a multiprocessor, and that the rows of one wait for each other is hidden by the other.
constexpr int kSmallThreads = 512;

// The most threads that can hold P packs of N elements of two inputs and two sums each.
constexpr int most_threads(int n, int p) { return p == 1 ? kSmallThreads : p == 2 && n < 8 ? kMostThreads : 768; }

// Where the partial sums of a thread block go: [blocks, columns] for the weight, then as much for the bias.
template <typename C>
struct Partial {
    C *weight, *bias;
};

// Sums over a row from which its gradient follows: LayerNorm of a, a d, d (see row_gradient); RMSNorm of a x.
template <bool kRms>
constexpr int kSums = kRms ? 1 : 3;

template <bool kRms, typename C>
__device__ __forceinline__ void add_element(C (&sums)[kSums<kRms>], C a, C x, C mean) {
    if constexpr (kRms) {
        sums[0] = multiply_add(a, x, sums[0]);
    } else {
        const C d = x - mean;
        sums[0] += a;
        sums[1] = multiply_add(a, d, sums[1]);
        sums[2] += d;
    }
}

template <bool kRms, typename C>
__device__ __forceinline__ RowGradient<C> gradient_of(const C (&sums)[kSums<kRms>], RowNorm<C>& norm, C share) {
    if constexpr (kRms) {
        return {norm.rstd, C(0), norm.rstd * sums[0] * share};
    } else {
        return row_gradient(norm.rstd, sums[0], sums[1], sums[2], share, norm.offset);
    }
}

template <bool kRms, typename C>
__device__ __forceinline__ C normalised(const RowNorm<C>& norm, C x) {
    return kRms ? x * norm.rstd : norm(x);
}

// This thread block's row of partial sums: those of its rows beside each other, added in order.
template <int N, int P, typename C>
__device__ __forceinline__ void store_partial(const C (&v)[P][N], C* partial, int64_t columns) {
    C* const to = partial + blockIdx.x * columns;
    if constexpr (P == 1) {
        __shared__ C beside[kSmallThreads * N];
        const int column = threadIdx.x * N;
#pragma unroll
        for (int j = 0; j < N; ++j) beside[(threadIdx.y * blockDim.x + threadIdx.x) * N + j] = v[0][j];
        __syncthreads();
        if (threadIdx.y == 0 && column < columns) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                C total = v[0][j];
                for (int y = 1; y < blockDim.y; ++y) total += beside[(y * blockDim.x + threadIdx.x) * N + j];
                to[column + j] = total;
            }
        }
        __syncthreads();
    } else {
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const int column = (threadIdx.x + p * blockDim.x) * N;
            if (column >= columns) continue;
#pragma unroll
            for (int j = 0; j < N; ++j) to[column + j] = v[p][j];
        }
    }
}

// Thread block b takes rows b * blockDim.y, ... and every gridDim.x * blockDim.y-th after; blockDim.x threads hold a row.
template <typename T, typename W, bool kRms, int N, int P>
__global__ void __launch_bounds__(most_threads(N, P), P == 1 ? 2 : 1) backward_kernel(NormBackward t, Partial<typename Compute<T>::type> partial, bool vectors) {
    using C = typename Compute<T>::type;
    using Packed = RowPack<T, N>;
    constexpr bool kKeepWeight = P == 1;  // in registers
    constexpr bool kAddEarly = P < 4;     // grad_sum is read before the sums are known, which takes registers, too
    __shared__ WarpSums<kSums<kRms>, C> shared[2];
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    const W* const weights = static_cast<const W*>(t.weight);
    const C share = C(1) / static_cast<C>(t.columns);
    C weight[P][N] = {}, grad_weight[P][N] = {}, grad_bias[P][N] = {};
    if (kKeepWeight && threadIdx.x * N < t.columns) load_weights<N>(weights + threadIdx.x * N, vectors, weight[0]);
    // All rows of the block take part in each turn, since they share its barrier.
    int turn = 0;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < t.rows; first += step, turn ^= 1) {
        const int64_t row = first + threadIdx.y, start = row * t.columns;
        const bool active = row < t.rows;
        Packed grad[P], x[P], add[P];
        RowNorm<C> norm{C(0), C(0), C(0)};
        if (active) {
            if constexpr (!kRms) norm.mean = static_cast<const C*>(t.mean)[row];
            norm.rstd = static_cast<const C*>(t.rstd)[row];
        }
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const int column = (threadIdx.x + p * blockDim.x) * N;
            if (!active || column >= t.columns) continue;
            grad[p] = *reinterpret_cast<const Packed*>(static_cast<const T*>(t.grad_y) + start + column);
            x[p] = *reinterpret_cast<const Packed*>(static_cast<const T*>(t.x) + start + column);
            if (kAddEarly && t.grad_sum != nullptr) {
                add[p] = *reinterpret_cast<const Packed*>(static_cast<const T*>(t.grad_sum) + start + column);
            }
        }
        C sums[kSums<kRms>] = {};
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const int column = (threadIdx.x + p * blockDim.x) * N;
            if (!active || column >= t.columns) continue;
            if (!kKeepWeight) load_weights<N>(weights + column, vectors, weight[p]);
            C g[N], v[N];
            widen(grad[p], g), widen(x[p], v);
#pragma unroll
            for (int j = 0; j < N; ++j) add_element<kRms>(sums, g[j] * weight[p][j], v[j], norm.mean);
        }
        row_sums(sums, shared[turn]);
        const RowGradient<C> gradient = gradient_of<kRms>(sums, norm, share);
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const int column = (threadIdx.x + p * blockDim.x) * N;
            if (!active || column >= t.columns) continue;
            if (!kKeepWeight) load_weights<N>(weights + column, vectors, weight[p]);
            if (!kAddEarly && t.grad_sum != nullptr) {
                add[p] = *reinterpret_cast<const Packed*>(static_cast<const T*>(t.grad_sum) + start + column);
            }
            stay_packed(grad[p]), stay_packed(x[p]);
            C g[N], v[N];
            widen(grad[p], g), widen(x[p], v);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const C z = normalised<kRms>(norm, v[j]);
                v[j] = gradient(g[j] * weight[p][j], z);
                grad_weight[p][j] = multiply_add(g[j], z, grad_weight[p][j]);
                if constexpr (!kRms) grad_bias[p][j] += g[j];
            }
            if (t.grad_sum != nullptr) {
                widen(add[p], g);
#pragma unroll
                for (int j = 0; j < N; ++j) v[j] += g[j];
            }
            *reinterpret_cast<Packed*>(static_cast<T*>(t.grad_x) + start + column) = narrow<T>(v);
        }
    }
    store_partial<N, P>(grad_weight, partial.weight, t.columns);
    if constexpr (!kRms) store_partial<N, P>(grad_bias, partial.bias, t.columns);
}

// ---- Rows that do not fit in registers, or whose packs are not aligned: sums of rows first, then blocks of columns. ----

constexpr int kFactors = 3;  // of a row: mean_a, mean_az, offset

template <typename T, typename W, bool kRms>
__global__ void __launch_bounds__(kThreads) row_factors_kernel(NormBackward t, typename Compute<T>::type* factors) {
    using C = typename Compute<T>::type;
    __shared__ WarpSums<kSums<kRms>, C> shared[2];
    const C share = C(1) / static_cast<C>(t.columns);
    int turn = 0;
    for (int64_t row = blockIdx.x; row < t.rows; row += gridDim.x, turn ^= 1) {
        const T *const grad = static_cast<const T*>(t.grad_y) + row * t.columns, *const x = static_cast<const T*>(t.x) + row * t.columns;
        RowNorm<C> norm{kRms ? C(0) : static_cast<const C*>(t.mean)[row], static_cast<const C*>(t.rstd)[row], C(0)};
        C sums[kSums<kRms>] = {};
        for (int64_t column = threadIdx.x; column < t.columns; column += blockDim.x) {
            add_element<kRms>(sums, load(grad[column]) * load(static_cast<const W*>(t.weight)[column]), load(x[column]), norm.mean);
        }
        row_sums(sums, shared[turn]);
        const RowGradient<C> gradient = gradient_of<kRms>(sums, norm, share);
        if (threadIdx.x == 0) {
            C* const to = factors + row * kFactors;
            to[0] = gradient.mean_a, to[1] = gradient.mean_az, to[2] = norm.offset;
        }
    }
}

// A thread has one column of every gridDim.y-th row.
template <typename T, typename W, bool kRms>
__global__ void __launch_bounds__(kThreads) columns_kernel(NormBackward t, const typename Compute<T>::type* factors,
                                                           Partial<typename Compute<T>::type> partial) {
    using C = typename Compute<T>::type;
    const int64_t column = thread_index();
    if (column >= t.columns) return;
    const C weight = load(static_cast<const W*>(t.weight)[column]);
    C grad_weight = C(0), grad_bias = C(0);
    for (int64_t row = blockIdx.y; row < t.rows; row += gridDim.y) {
        const int64_t at = row * t.columns + column;
        const C* const factor = factors + row * kFactors;
        const RowNorm<C> norm{kRms ? C(0) : static_cast<const C*>(t.mean)[row], static_cast<const C*>(t.rstd)[row], factor[2]};
        const C g = load(static_cast<const T*>(t.grad_y)[at]), z = normalised<kRms>(norm, load(static_cast<const T*>(t.x)[at]));
        C grad_x = RowGradient<C>{norm.rstd, factor[0], factor[1]}(g * weight, z);
        if (t.grad_sum != nullptr) grad_x += load(static_cast<const T*>(t.grad_sum)[at]);
        static_cast<T*>(t.grad_x)[at] = store<T>(grad_x);
        grad_weight = multiply_add(g, z, grad_weight);
        grad_bias += g;
    }
    partial.weight[blockIdx.y * t.columns + column] = grad_weight;
    if constexpr (!kRms) partial.bias[blockIdx.y * t.columns + column] = grad_bias;
}

// ---- The second stage ----

// Sums of `blocks` rows of partial sums. 32 columns a thread block, so that a warp reads 32 numbers that lie together.
template <typename C>
__global__ void __launch_bounds__(kMostThreads) sum_partial_kernel(int64_t blocks, int64_t columns, Partial<C> partial, C* grad_weight,
                                                                   C* grad_bias) {
    __shared__ C sums[kWarp][kWarp + 1];
    const C* const from = blockIdx.y == 0 ? partial.weight : partial.bias;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
    C total = C(0);
    if (column < columns) {
#pragma unroll 8
        for (int64_t b = threadIdx.y; b < blocks; b += kWarp) total += from[b * columns + column];
    }
    sums[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    // Each warp takes a column: lane y has what row y summed.
    C v = sums[threadIdx.x][threadIdx.y];
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    const int64_t result = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.y;
    if (threadIdx.x == 0 && result < columns) (blockIdx.y == 0 ? grad_weight : grad_bias)[result] = v;
}

// ---- Launch ----

// How a backward pass is cut: `packs` of a thread, or 0 for rows that do not fit; `row_threads` for each of `rows` beside each other.
struct Plan {
    int packs, row_threads, rows;
    int64_t blocks;  // rows of partial sums
};

int64_t multiprocessors() {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count > 0 ? count : 1;
}

template <typename T>
Plan plan_of(const NormBackward& t) {
    constexpr int N = 16 / sizeof(T);
    const bool vectors = t.columns % N == 0 && aligned(t.grad_y) && aligned(t.x) && aligned(t.grad_sum) && aligned(t.grad_x);
    const int64_t packs = t.columns / N;
    Plan plan{0, 0, 1, 0};
    for (const int p : {1, 2, 4}) {
        const bool built = p < 4 || N < 8;
        if (plan.packs == 0 && vectors && built && packs <= static_cast<int64_t>(p) * most_threads(N, p)) plan.packs = p;
    }
    int64_t blocks = 1;
    if (plan.packs == 0) {
        const int64_t across = (t.columns + kThreads - 1) / kThreads;
        blocks = (8 * multiprocessors() + across - 1) / across;
    } else {
        plan.row_threads = round_to_warps((packs + plan.packs - 1) / plan.packs);
        if (plan.packs == 1) plan.rows = kSmallThreads / plan.row_threads;
        const int threads = plan.row_threads * plan.rows;
        blocks = multiprocessors() * (threads <= kSmallThreads && plan.packs == 1 ? 2 : 1);
    }
    const int64_t most = (t.rows + plan.rows - 1) / plan.rows;
    plan.blocks = blocks < most ? blocks : most > 0 ? most : 1;
    return plan;
}

template <typename T, typename W, bool kRms, int P>
void launch_packs(const Plan& plan, const NormBackward& t, const Partial<typename Compute<T>::type>& partial, cudaStream_t stream) {
    const dim3 threads(plan.row_threads, plan.rows);
    backward_kernel<T, W, kRms, 16 / sizeof(T), P><<<static_cast<unsigned>(plan.blocks), threads, 0, stream>>>(t, partial, aligned(t.weight));
}

template <typename T, typename W, bool kRms>
int launch_backward(const NormBackward& t, cudaStream_t stream) {
    using C = typename Compute<T>::type;
    const Plan plan = plan_of<T>(t);
    C* const scratch = static_cast<C*>(t.scratch);
    const Partial<C> partial{scratch, scratch + plan.blocks * t.columns};
    if (plan.packs == 1) {
        launch_packs<T, W, kRms, 1>(plan, t, partial, stream);
    } else if (plan.packs == 2) {
        launch_packs<T, W, kRms, 2>(plan, t, partial, stream);
    } else if (plan.packs == 4) {
        if constexpr (sizeof(T) > 2) launch_packs<T, W, kRms, 4>(plan, t, partial, stream);
    } else {
        C* const factors = scratch + 2 * plan.blocks * t.columns;
        const int64_t rows = t.rows < 0x7fffffff ? t.rows : 0x7fffffff;
        if (rows > 0) row_factors_kernel<T, W, kRms><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(t, factors);
        const dim3 grid(static_cast<unsigned>((t.columns + kThreads - 1) / kThreads), static_cast<unsigned>(plan.blocks));
        columns_kernel<T, W, kRms><<<grid, kThreads, 0, stream>>>(t, factors, partial);
    }
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>((t.columns + kWarp - 1) / kWarp), kRms ? 1 : 2);
    sum_partial_kernel<C><<<grid, dim3(kWarp, kWarp), 0, stream>>>(plan.blocks, t.columns, partial, static_cast<C*>(t.grad_weight),
                                                                   static_cast<C*>(t.grad_bias));
    return cudaGetLastError();
}

int64_t norm_backward_scratch(Type type, const NormBackward& tensors) {
    const Plan plan = type == Type::kDouble  ? plan_of<double>(tensors)
                      : type == Type::kFloat ? plan_of<float>(tensors)
                                             : plan_of<__half>(tensors);
    return 2 * plan.blocks * tensors.columns + (plan.packs == 0 ? kFactors * tensors.rows : 0);
}

int norm_backward(Type type, Type weight_type, const NormBackward& tensors, void* stream) {
    return with_types(type, weight_type, [&](auto row, auto weight) {
        using T = decltype(row);
        using W = decltype(weight);
        const auto on = static_cast<cudaStream_t>(stream);
        return tensors.mean == nullptr ? launch_backward<T, W, true>(tensors, on) : launch_backward<T, W, false>(tensors, on);
    });
}

}  // namespace megactl::cuda
