// LayerNorm and RMSNorm, alone or behind the addition of a residual. One pass over memory: a row stays in registers.
#include "kernels/cuda/norm.cuh"

namespace megactl::cuda {

constexpr int kBlock = 128;  // threads of a thread block, unless a row takes more

// Packs of N elements that a thread holds: a warp takes up to 1024 columns (512 of double), so that it needs no barrier.
template <int N>
constexpr int kPacksHeld = N == 8 ? 4 : 8;
constexpr int kMostOfRow = 512;  // threads; longer rows do not stay in registers

// `in` + residual rounded to T, which goes to `sum`.
template <typename T, int N>
__device__ __forceinline__ RowPack<T, N> add_row_pack(const RowPack<T, N>& in, const RowPack<T, N>& residual, void* sum, int64_t at) {
    typename Compute<T>::type ins[N], adds[N];
    widen(in, ins), widen(residual, adds);
#pragma unroll
    for (int j = 0; j < N; ++j) ins[j] += adds[j];
    const RowPack<T, N> out = narrow<T>(ins);
    *reinterpret_cast<RowPack<T, N>*>(static_cast<T*>(sum) + at) = out;
    return out;
}

template <typename T, int N>
__device__ __forceinline__ RowPack<T, N> load_row_pack(const void* x, int64_t at) {
    return *reinterpret_cast<const RowPack<T, N>*>(static_cast<const T*>(x) + at);
}

// y of N elements, the first being element `at` of all.
template <bool kRms, typename T, int N, typename C>
__device__ __forceinline__ void store_row_pack(const NormForward& t, const RowNorm<C>& norm, int64_t at, const RowPack<T, N>& row,
                                               const C (&weight)[N], const C (&bias)[N]) {
    C v[N];
    widen(row, v);
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if constexpr (kRms) {
            v[j] = v[j] * norm.rstd * weight[j];
        } else {
            v[j] = multiply_add(norm(v[j]), weight[j], bias[j]);
        }
    }
    *reinterpret_cast<RowPack<T, N>*>(static_cast<T*>(t.y) + at) = narrow<T>(v);
}

// The same with weights from memory.
template <typename W, bool kRms, typename T, int N, typename C>
__device__ __forceinline__ void store_row_pack(const NormForward& t, bool vectors, const RowNorm<C>& norm, int64_t start, int64_t column,
                                               const RowPack<T, N>& row) {
    C weight[N], bias[N];
    load_weights<N>(static_cast<const W*>(t.weight) + column, vectors, weight);
    if constexpr (!kRms) load_weights<N>(static_cast<const W*>(t.bias) + column, vectors, bias);
    store_row_pack<kRms>(t, norm, start + column, row, weight, bias);
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

// Where pack p of this thread begins in a row that kRow threads share.
template <int kRow, int N>
__device__ __forceinline__ int column_of(int p) {
    return static_cast<int>(threadIdx.x + p * kRow) * N;
}

// The statistics of a row whose packs are in registers.
template <bool kRms, int kRow, typename T, int N, int P>
__device__ __forceinline__ auto statistics_held(const NormForward& t, RowPack<T, N> (&v)[P]) {
    using C = typename Compute<T>::type;
    return statistics<kRms, C>(t, [&](const auto& use) {
#pragma unroll
        for (int p = 0; p < P; ++p) {
            stay_packed(v[p]);
            if (column_of<kRow, N>(p) < t.columns) {
                C wide[N];
                widen(v[p], wide);
#pragma unroll
                for (int j = 0; j < N; ++j) use(wide[j]);
            }
        }
    });
}

// kRow threads a row. kResidual: there may be one. Thread blocks per multiprocessor are asked for so that a thread has 85 registers: fewer spill.
template <typename T, typename W, bool kRms, bool kResidual, int N, int kRow>
__global__ void __launch_bounds__(kRow < kBlock ? kBlock : kRow, 768 / (kRow < kBlock ? kBlock : kRow)) forward_kernel(NormForward t) {
    constexpr int P = kPacksHeld<N>;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < t.rows; row += step) {
        const int64_t start = row * t.columns;
        RowPack<T, N> v[P];
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const int column = column_of<kRow, N>(p);
            if (column >= t.columns) continue;
            v[p] = load_row_pack<T, N>(t.x, start + column);
            if (kResidual && t.residual) v[p] = add_row_pack(v[p], load_row_pack<T, N>(t.residual, start + column), t.sum, start + column);
        }
        const auto norm = statistics_held<kRms, kRow>(t, v);
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const int column = column_of<kRow, N>(p);
            stay_packed(v[p]);
            if (column < t.columns) store_row_pack<W, kRms>(t, true, norm, start, column, v[p]);
        }
        store_statistics<kRms>(t, row, norm);
    }
}

// Thread blocks of forward_warp_kernel on a multiprocessor: as many as its registers allow.
template <bool kRms, bool kResidual>
constexpr int kResident = kRms && !kResidual ? 6 : 4;

// 16-bit rows of one warp, weights of their type. Such a row is too short to hide the way to memory behind it: a warp fetches the next
// row while it works on this one, and keeps its share of the weights in registers.
template <typename T, bool kRms, bool kResidual>
__global__ void __launch_bounds__(kBlock, kResident<kRms, kResidual>) forward_warp_kernel(NormForward t) {
    using C = typename Compute<T>::type;
    constexpr int N = 8, P = kPacksHeld<N>;
    RowPack<T, N> weight[P], bias[P], next[P], residual[P], v[P];
    const auto fetch = [&](int64_t row) {
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const int64_t column = column_of<kWarp, N>(p), at = row * t.columns + column;
            if (column >= t.columns || row >= t.rows) continue;
            next[p] = load_row_pack<T, N>(t.x, at);
            if (kResidual) residual[p] = load_row_pack<T, N>(t.residual, at);
        }
    };
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    fetch(row);
#pragma unroll
    for (int p = 0; p < P; ++p) {
        const int column = column_of<kWarp, N>(p);
        if (column >= t.columns) continue;
        weight[p] = load_row_pack<T, N>(t.weight, column);
        if constexpr (!kRms) bias[p] = load_row_pack<T, N>(t.bias, column);
    }
    for (; row < t.rows; row += step) {
        const int64_t start = row * t.columns;
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const int column = column_of<kWarp, N>(p);
            v[p] = next[p];
            if (kResidual && column < t.columns) v[p] = add_row_pack(v[p], residual[p], t.sum, start + column);
        }
        fetch(row + step);
        const auto norm = statistics_held<kRms, kWarp>(t, v);
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const int column = column_of<kWarp, N>(p);
            stay_packed(v[p]), stay_packed(weight[p]);
            if constexpr (!kRms) stay_packed(bias[p]);
            if (column >= t.columns) continue;
            C w[N], b[N];
            widen(weight[p], w);
            if constexpr (!kRms) widen(bias[p], b);
            store_row_pack<kRms>(t, norm, start + column, v[p], w, b);
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
            for (int64_t at = start + first; at < start + t.columns; at += step) {
                add_row_pack(load_row_pack<T, N>(from, at), load_row_pack<T, N>(t.residual, at), t.sum, at);
            }
            from = t.sum;  // each thread reads what it wrote itself
        }
        const RowNorm<C> norm = statistics<kRms, C>(t, [&](const auto& use) {
            for (int64_t column = first; column < t.columns; column += step) {
                C wide[N];
                widen(load_row_pack<T, N>(from, start + column), wide);
#pragma unroll
                for (int j = 0; j < N; ++j) use(wide[j]);
            }
        });
        for (int64_t column = first; column < t.columns; column += step) {
            const RowPack<T, N> v = load_row_pack<T, N>(from, start + column);
            store_row_pack<W, kRms>(t, vectors, norm, start, column, v);
        }
        store_statistics<kRms>(t, row, norm);
    }
}

// Thread blocks for `rows` rows of one warp: so many waves of them that a warp has about four rows, and all blocks as many.
inline unsigned warp_blocks(int64_t rows, int resident) {
    const int64_t wanted = (rows * kWarp + kBlock - 1) / kBlock, slots = static_cast<int64_t>(processors()) * resident;
    const int64_t waves = (wanted + 2 * slots) / (4 * slots), most = waves < 1 ? slots : waves * slots;
    const int64_t each = (wanted + most - 1) / most;
    return static_cast<unsigned>((wanted + each - 1) / each);
}

// Calls launch(kRow) with the fewest threads whose registers hold a row.
template <int P, int kRow = kWarp, typename Launch>
void with_row_threads(int64_t packs, const Launch& launch) {
    // Each instance takes long to compile; of 64 threads there is none, since 128 do nearly as well there.
    constexpr int kMore = kRow == kWarp ? kBlock : 2 * kRow;
    if constexpr (kMore <= kMostOfRow) {
        if (packs > kRow * P) return with_row_threads<P, kMore>(packs, launch);
    }
    launch(std::integral_constant<int, kRow>{});
}

template <typename T, typename W, bool kRms, bool kResidual>
int launch_forward(const NormForward& t, cudaStream_t stream) {
    constexpr int N = 16 / sizeof(T), P = kPacksHeld<N>;
    const bool packs_aligned = t.columns % N == 0 && aligned(t.x) && aligned(t.residual) && aligned(t.y) && aligned(t.sum);
    const bool vectors = aligned(t.weight) && aligned(t.bias);
    const int64_t packs = t.columns / N;
    const auto blocks = [&](int rows) {
        const int64_t wanted = (t.rows + rows - 1) / rows;
        return static_cast<unsigned>(wanted < 0x7fffffff ? wanted : 0x7fffffff);
    };
    if (!packs_aligned) {
        forward_long_kernel<T, W, kRms, 1><<<blocks(1), kThreads, 0, stream>>>(t, true);
        return cudaGetLastError();
    }
    // Whoever packs parameters for training aligns them; others take the way that reads one weight at a time.
    if (packs > kMostOfRow * P || !vectors) {
        forward_long_kernel<T, W, kRms, N><<<blocks(1), kMostThreads, 0, stream>>>(t, vectors);
        return cudaGetLastError();
    }
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, W>) {
        if (packs <= kWarp * P) {
            const unsigned grid = warp_blocks(t.rows, kResident<kRms, kResidual>);
            forward_warp_kernel<T, kRms, kResidual><<<grid, dim3(kWarp, kBlock / kWarp), 0, stream>>>(t);
            return cudaGetLastError();
        }
    }
    with_row_threads<P>(packs, [&](auto threads) {
        constexpr int kRow = decltype(threads)::value, kRows = kRow == kWarp ? kBlock / kWarp : 1;
        forward_kernel<T, W, kRms, kResidual, N, kRow><<<blocks(kRows), dim3(kRow, kRows), 0, stream>>>(t);
    });
    return cudaGetLastError();
}

int norm_forward(Type type, Type weight_type, const NormForward& tensors, void* stream) {
    return with_types(type, weight_type, [&](auto row, auto weight) {
        using T = decltype(row);
        using W = decltype(weight);
        const auto on = static_cast<cudaStream_t>(stream);
        // What a residual takes in registers costs 5 % where there is none: the types of training have a kernel for that.
        if constexpr (sizeof(T) == 2 && std::is_same_v<T, W>) {
            if (tensors.residual == nullptr) {
                return tensors.bias ? launch_forward<T, W, false, false>(tensors, on) : launch_forward<T, W, true, false>(tensors, on);
            }
        }
        return tensors.bias ? launch_forward<T, W, false, true>(tensors, on) : launch_forward<T, W, true, true>(tensors, on);
    });
}

}  // namespace megactl::cuda
