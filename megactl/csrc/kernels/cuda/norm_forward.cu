// LayerNorm and RMSNorm, alone or behind the addition of a residual. One pass over memory: a row stays in registers.
#include "kernels/cuda/norm.cuh"

namespace megactl::cuda {

constexpr int kRowsOfWarps = 4;  // rows of a thread block where a row is one warp

// Packs of N elements that a thread holds. A warp takes up to 1024 columns (512 of double), so that it needs no barrier; in a thread
// block of any size a thread has 64 registers, and widening 16-bit elements takes many of them.
constexpr int warp_packs(int n) { return n == 8 ? 4 : 8; }
constexpr int block_packs(int n) { return n == 8 ? 2 : 4; }

// x, or x + residual rounded to T, which goes to `sum`. Kept packed: widened, a row would take twice the registers.
template <typename T, int N>
__device__ __forceinline__ RowPack<T, N> load_row_pack(const void* x, const void* residual, void* sum, int64_t at) {
    using P = RowPack<T, N>;
    P in = *reinterpret_cast<const P*>(static_cast<const T*>(x) + at);
    if (residual == nullptr) return in;
    const P add = *reinterpret_cast<const P*>(static_cast<const T*>(residual) + at);
    typename Compute<T>::type ins[N], adds[N];
    widen(in, ins), widen(add, adds);
#pragma unroll
    for (int j = 0; j < N; ++j) ins[j] += adds[j];
    in = narrow<T>(ins);
    *reinterpret_cast<P*>(static_cast<T*>(sum) + at) = in;
    return in;
}

// y of N elements at `column` of the row that begins at `start`.
template <typename W, bool kRms, typename T, int N, typename C>
__device__ __forceinline__ void store_row_pack(const NormForward& t, bool vectors, const RowNorm<C>& norm, int64_t start, int64_t column,
                                               const RowPack<T, N>& row) {
    C weight[N], bias[N], v[N];
    widen(row, v);
    load_weights<N>(static_cast<const W*>(t.weight) + column, vectors, weight);
    if constexpr (!kRms) load_weights<N>(static_cast<const W*>(t.bias) + column, vectors, bias);
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if constexpr (kRms) {
            v[j] = v[j] * norm.rstd * weight[j];
        } else {
            v[j] = multiply_add(norm(v[j]), weight[j], bias[j]);
        }
    }
    *reinterpret_cast<RowPack<T, N>*>(static_cast<T*>(t.y) + start + column) = narrow<T>(v);
}

template <bool kRms, typename C>
__device__ __forceinline__ void store_statistics(const NormForward& t, int64_t row, const RowNorm<C>& norm) {
    if (threadIdx.x != 0) return;
    if constexpr (!kRms) static_cast<C*>(t.mean)[row] = norm.mean;
    static_cast<C*>(t.rstd)[row] = norm.rstd;
}

// The statistics of a row from its elements, which for_each(use) gives to use(v), several times.
template <bool kRms, typename C, typename ForEach>
__device__ __forceinline__ RowNorm<C> statistics(const NormForward& t, const ForEach& for_each) {
    __shared__ WarpSums<1, C> first;
    __shared__ WarpSums<2, C> second;
    const C share = C(1) / static_cast<C>(t.columns), epsilon = static_cast<C>(t.epsilon);
    C total[1] = {};
    if constexpr (kRms) {
        for_each([&](C v) { total[0] = multiply_add(v, v, total[0]); });
        row_sums(total, first);
        // The next row's sums may overwrite `first` only when every warp has read this row's.
        if (blockDim.x > kWarp) __syncthreads();
        return {C(0), inverse_root(multiply_add(total[0], share, epsilon)), C(0)};
    } else {
        for_each([&](C v) { total[0] += v; });
        row_sums(total, first);
        const C mean = total[0] * share;
        C sums[2] = {};
        for_each([&](C v) {
            const C d = v - mean;
            sums[0] += d;
            sums[1] = multiply_add(d, d, sums[1]);
        });
        row_sums(sums, second);
        return row_norm(mean, sums[0], sums[1], share, epsilon);
    }
}

template <typename T, typename W, bool kRms, int N, int P, int kBound>
__global__ void __launch_bounds__(kBound, kBound == kMostThreads ? 1 : kBound == kThreads ? 3 : 7) forward_kernel(NormForward t, bool vectors) {
    using C = typename Compute<T>::type;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < t.rows; row += step) {
        const int64_t start = row * t.columns;
        RowPack<T, N> v[P];
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const int column = (threadIdx.x + p * blockDim.x) * N;
            if (column < t.columns) v[p] = load_row_pack<T, N>(t.x, t.residual, t.sum, start + column);
        }
        const RowNorm<C> norm = statistics<kRms, C>(t, [&](const auto& use) {
#pragma unroll
            for (int p = 0; p < P; ++p) {
                stay_packed(v[p]);
                if ((threadIdx.x + p * blockDim.x) * N < t.columns) {
                    C wide[N];
                    widen(v[p], wide);
#pragma unroll
                    for (int j = 0; j < N; ++j) use(wide[j]);
                }
            }
        });
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const int column = (threadIdx.x + p * blockDim.x) * N;
            stay_packed(v[p]);
            if (column < t.columns) store_row_pack<W, kRms>(t, vectors, norm, start, column, v[p]);
        }
        store_statistics<kRms>(t, row, norm);
    }
}

// Rows that do not fit in registers, or whose packs are not aligned: read again for each pass, from the second-level cache at best.
template <typename T, typename W, bool kRms, int N>
__global__ void __launch_bounds__(kMostThreads) forward_long_kernel(NormForward t, bool vectors) {
    using C = typename Compute<T>::type;
    const int64_t first = threadIdx.x * N, step = static_cast<int64_t>(blockDim.x) * N;
    for (int64_t row = blockIdx.x; row < t.rows; row += gridDim.x) {
        const int64_t start = row * t.columns;
        const void* from = t.x;
        if (t.residual != nullptr) {
            for (int64_t column = first; column < t.columns; column += step) load_row_pack<T, N>(from, t.residual, t.sum, start + column);
            from = t.sum;  // each thread reads what it wrote itself
        }
        const RowNorm<C> norm = statistics<kRms, C>(t, [&](const auto& use) {
            for (int64_t column = first; column < t.columns; column += step) {
                C wide[N];
                widen(load_row_pack<T, N>(from, nullptr, nullptr, start + column), wide);
#pragma unroll
                for (int j = 0; j < N; ++j) use(wide[j]);
            }
        });
        for (int64_t column = first; column < t.columns; column += step) {
            const RowPack<T, N> v = load_row_pack<T, N>(from, nullptr, nullptr, start + column);
            store_row_pack<W, kRms>(t, vectors, norm, start, column, v);
        }
        store_statistics<kRms>(t, row, norm);
    }
}

template <typename T, typename W, bool kRms>
int launch_forward(const NormForward& t, cudaStream_t stream) {
    constexpr int N = 16 / sizeof(T);
    const bool packs_aligned = t.columns % N == 0 && aligned(t.x) && aligned(t.residual) && aligned(t.y) && aligned(t.sum);
    const bool vectors = aligned(t.weight) && aligned(t.bias);
    const int64_t packs = t.columns / N;
    constexpr int kWarpPacks = warp_packs(N), kBlockPacks = block_packs(N), kWarpBound = kWarp * kRowsOfWarps;
    const dim3 warp_rows(kWarp, kRowsOfWarps);
    const auto blocks = [&](int rows) {
        const int64_t wanted = (t.rows + rows - 1) / rows;
        return static_cast<unsigned>(wanted < 0x7fffffff ? wanted : 0x7fffffff);
    };
    if (!packs_aligned) {
        forward_long_kernel<T, W, kRms, 1><<<blocks(1), kThreads, 0, stream>>>(t, true);
    } else if (packs <= kWarp) {
        forward_kernel<T, W, kRms, N, 1, kWarpBound><<<blocks(kRowsOfWarps), warp_rows, 0, stream>>>(t, vectors);
    } else if (packs <= kWarp * kWarpPacks) {
        forward_kernel<T, W, kRms, N, kWarpPacks, kWarpBound><<<blocks(kRowsOfWarps), warp_rows, 0, stream>>>(t, vectors);
    } else if (N == 8 && packs <= kThreads * kWarpPacks) {
        // Fewer threads with more of the row each: what every thread does once for a row is half of the work otherwise.
        const int threads = round_to_warps((packs + kWarpPacks - 1) / kWarpPacks);
        forward_kernel<T, W, kRms, N, kWarpPacks, kThreads><<<blocks(1), threads, 0, stream>>>(t, vectors);
    } else if (packs <= kMostThreads * kBlockPacks) {
        const int threads = round_to_warps((packs + kBlockPacks - 1) / kBlockPacks);
        forward_kernel<T, W, kRms, N, kBlockPacks, kMostThreads><<<blocks(1), threads, 0, stream>>>(t, vectors);
    } else {
        forward_long_kernel<T, W, kRms, N><<<blocks(1), kMostThreads, 0, stream>>>(t, vectors);
    }
    return cudaGetLastError();
}

int norm_forward(Type type, Type weight_type, const NormForward& tensors, void* stream) {
    return with_types(type, weight_type, [&](auto row, auto weight) {
        using T = decltype(row);
        using W = decltype(weight);
        const auto on = static_cast<cudaStream_t>(stream);
        return tensors.bias == nullptr ? launch_forward<T, W, true>(tensors, on) : launch_forward<T, W, false>(tensors, on);
    });
}

}  // namespace megactl::cuda
