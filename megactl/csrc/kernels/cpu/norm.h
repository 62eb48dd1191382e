// LayerNorm and RMSNorm on the CPU. Each function handles whole rows of `columns` elements; the caller runs them over threads.
//
// Rows are widened to the type of the arithmetic first, and results narrowed last, each in a loop of its own: a loop over one width
// of element vectorises better than one over two, and the row stays in the cache.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cpu/clones.h"
#include "kernels/cpu/convert.h"
#include "kernels/dtype.h"
#include "kernels/norm.h"

namespace megactl::cpu {

// A vector that fills the widest registers; on narrower ones the compiler takes several.
template <typename C, int kBytes = 64>
struct Vector {
    typedef C type __attribute__((vector_size(kBytes)));
    static constexpr int64_t kLanes = kBytes / sizeof(C);
};

// Vectors are passed between inlined functions only, where the ABI that this warns about does not matter.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

// Elements summed in the type of the arithmetic; beyond, in double. So the error of a sum does not grow with the row.
constexpr int64_t kSumRun = 8192;

// The sum of a vector's elements, by halves.
template <typename C, int kBytes = 64>
MEGACTL_INLINE C lane_sum(typename Vector<C, kBytes>::type v) {
    if constexpr (kBytes == 2 * sizeof(C)) {
        return v[0] + v[1];
    } else {
        // Vectors of their own: an array of partial sums would be stored and read again at every step.
        typename Vector<C, kBytes / 2>::type low, high;
        __builtin_memcpy(&low, &v, sizeof low);
        __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return lane_sum<C, kBytes / 2>(low + high);
    }
}

// Where a row is read: a vector of it, or one element. `fetch` asks for what is needed later, to be read or (kWrite) written: a row
// is worked on from the first-level cache, and meanwhile the memory would have nothing to do.
template <typename C>
struct VectorAt {
    int64_t first;

    MEGACTL_INLINE typename Vector<C>::type operator()(const C* p) const {
        typename Vector<C>::type loaded;
        __builtin_memcpy(&loaded, p + first, sizeof loaded);
        return loaded;
    }
    template <bool kWrite, typename T>
    MEGACTL_INLINE void fetch(const T* p) const {
        __builtin_prefetch(p + first, kWrite, 3);
    }
};

template <typename C>
struct ElementAt {
    int64_t first;

    MEGACTL_INLINE C operator()(const C* p) const { return p[first]; }
    template <bool kWrite, typename T>
    MEGACTL_INLINE void fetch(const T*) const {}
};

// sums[k] = sum over i < n of the k-th value that term(at, values) sets, where at(p) is p[i], or a vector of such elements. Written with
// vectors because compilers keep an array of partial sums in memory as often as not. The order of summation depends on n and kVectors
// alone; K * kVectors additions should be under way at a time, 4 to hide their latency and at most 8 for AVX2's 16 registers.
template <int kVectors, int K, typename C, typename Term>
MEGACTL_INLINE void row_sums(int64_t n, C (&sums)[K], const Term& term) {
    using V = typename Vector<C>::type;
    constexpr int64_t kLanes = Vector<C>::kLanes;
    double totals[K] = {};
    for (int64_t begin = 0; begin < n; begin += kSumRun) {
        const int64_t end = n - begin < kSumRun ? n : begin + kSumRun;
        V lanes[kVectors][K] = {};
        int64_t i = begin;
        for (; i + kVectors * kLanes <= end; i += kVectors * kLanes) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                V values[K];
                term(VectorAt<C>{i + v * kLanes}, values);
#pragma GCC unroll 6
                for (int k = 0; k < K; ++k) lanes[v][k] += values[k];
            }
        }
        C rest[K] = {};
        for (; i < end; ++i) {
            C values[K];
            term(ElementAt<C>{i}, values);
            for (int k = 0; k < K; ++k) rest[k] += values[k];
        }
#pragma GCC unroll 6
        for (int k = 0; k < K; ++k) {
            for (int v = 1; v < kVectors; ++v) lanes[0][k] += lanes[v][k];
            totals[k] += static_cast<double>(lane_sum<C>(lanes[0][k]) + rest[k]);
        }
    }
    for (int k = 0; k < K; ++k) sums[k] = static_cast<C>(totals[k]);
}

// The row in the type of the arithmetic: itself, or a copy in `scratch`.
template <typename T, typename C>
MEGACTL_INLINE const C* widened(const T* row, int64_t n, C* scratch) {
    if constexpr (std::is_same_v<T, C>) {
        return row;
    } else {
        widen(row, n, scratch);
        return scratch;
    }
}

// Where results of a row go before they are narrowed: the row itself needs no narrowing.
template <typename T, typename C>
MEGACTL_INLINE C* unnarrowed(T* row, C* scratch) {
    if constexpr (std::is_same_v<T, C>) {
        return row;
    } else {
        return scratch;
    }
}

template <typename T, typename C>
MEGACTL_INLINE void narrowed(const C* from, int64_t n, T* row) {
    if constexpr (!std::is_same_v<T, C>) narrow(from, n, row);
}

// Rows that are worked on together: the time between the last addition to a sum and its first use is as long as a third of a row, the
// sums over rows are loaded and stored half as often, and two rows with all that belongs to them still lie in the first-level cache.
constexpr int kPair = 2;

// Rows of scratch: two for each of those.
constexpr int64_t kScratchRows = 2 * kPair;

template <typename C>
struct NormRows {
    int64_t rows, columns;
    const C *weight, *bias;  // bias is null for RMSNorm
    C epsilon;
    C *mean, *rstd;  // [rows]; mean is null for RMSNorm
    C* scratch;      // [kScratchRows, columns], on a boundary of 64 bytes; unused where the element type is C
};

// sum = x + residual, rounded to T; returns it in the type of the arithmetic.
template <typename T, typename C>
MEGACTL_INLINE const C* added(const T* x, const T* residual, int64_t n, T* sum, C* scratch) {
    const C *const xs = widened(x, n, scratch), *const rs = widened(residual, n, scratch + n);
    C* const total = unnarrowed(sum, scratch);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) total[i] = xs[i] + rs[i];
    narrowed(total, n, sum);
    return widened(sum, n, scratch);
}

// A row of the forward pass: what is normalised, and where the result goes before it is narrowed.
template <typename C>
struct ForwardRow {
    const C* x;
    C* to;
    RowNorm<C> norm;
};

// The statistics of kRows rows. ahead(at) fetches what comes next.
template <bool kRms, int kRows, typename C, typename Ahead>
MEGACTL_INLINE void row_statistics(const NormRows<C>& a, int64_t row, ForwardRow<C>* rows, const Ahead& ahead) {
    const int64_t n = a.columns;
    const C share = C(1) / static_cast<C>(n);
    const C* x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = rows[r].x;
    if constexpr (kRms) {
        C sums[kRows];
        row_sums<2>(n, sums, [&](auto at, auto* v) __attribute__((always_inline)) {
            for (int r = 0; r < kRows; ++r) v[r] = at(x[r]) * at(x[r]);
            ahead(at);
        });
        for (int r = 0; r < kRows; ++r) {
            rows[r].norm = {C(0), inverse_root(sums[r] / static_cast<C>(n) + a.epsilon), C(0)};
            a.rstd[row + r] = rows[r].norm.rstd;
        }
    } else {
        C sums[kRows], mean[kRows], deviations[2 * kRows];
        row_sums<2>(n, sums, [&](auto at, auto* v) __attribute__((always_inline)) {
            for (int r = 0; r < kRows; ++r) v[r] = at(x[r]);
        });
        for (int r = 0; r < kRows; ++r) mean[r] = sums[r] / static_cast<C>(n);
        row_sums<1>(n, deviations, [&](auto at, auto* v) __attribute__((always_inline)) {
            for (int r = 0; r < kRows; ++r) {
                const auto d = at(x[r]) - mean[r];
                v[2 * r] = d, v[2 * r + 1] = d * d;
            }
            ahead(at);
        });
        for (int r = 0; r < kRows; ++r) {
            rows[r].norm = row_norm(mean[r], deviations[2 * r], deviations[2 * r + 1], share, a.epsilon);
            a.mean[row + r] = mean[r], a.rstd[row + r] = rows[r].norm.rstd;
        }
    }
}

// y = norm(s) of rows [row, row + kRows) with s = x, or x + residual rounded to T, which goes to `sum`.
template <bool kRms, int kRows, typename T, typename C>
MEGACTL_INLINE void norm_forward_together(const NormRows<C>& a, int64_t row, const T* x, const T* residual, T* sum, T* y) {
    const int64_t n = a.columns, here = row * n, next = row + 2 * kRows <= a.rows ? here + kRows * n : here;
    ForwardRow<C> rows[kRows];
    for (int r = 0; r < kRows; ++r) {
        const int64_t at = here + r * n;
        C* const scratch = a.scratch + 2 * r * n;
        rows[r].x = residual ? added(x + at, residual + at, n, sum + at, scratch) : widened(x + at, n, scratch);
        rows[r].to = unnarrowed(y + at, scratch);
    }
    row_statistics<kRms, kRows>(a, row, rows, [&](auto at) __attribute__((always_inline)) {
        for (int r = 0; r < kRows; ++r) {
            at.template fetch<true>(y + here + r * n);
            at.template fetch<false>(x + next + r * n);
            if (residual) at.template fetch<false>(residual + next + r * n);
        }
    });
    const C *const weight = a.weight, *const bias = a.bias;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        // All rows are read before one is written: to the processor, addresses that differ by a multiple of 4 KiB look alike.
        C results[kRows];
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
            const C s = rows[r].x[i];
            results[r] = kRms ? s * rows[r].norm.rstd * weight[i] : multiply_add(rows[r].norm(s), weight[i], bias[i]);
        }
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) rows[r].to[i] = results[r];
    }
    for (int r = 0; r < kRows; ++r) narrowed(rows[r].to, n, y + here + r * n);
}

template <bool kRms, typename T, typename C = typename Compute<T>::type>
MEGACTL_INLINE void norm_forward_rows(const NormRows<C>& a, const T* x, const T* residual, T* sum, T* y) {
    int64_t row = 0;
    for (; row + kPair <= a.rows; row += kPair) norm_forward_together<kRms, kPair>(a, row, x, residual, sum, y);
    for (; row < a.rows; ++row) norm_forward_together<kRms, 1>(a, row, x, residual, sum, y);
}

// A row between the two passes of its backward.
template <typename C>
struct BackwardRow {
    const C *grad, *x;
    C* to;
    RowNorm<C> norm;
    RowGradient<C> gradient;
};

// The first pass over kRows rows: the sums over each of them. ahead(at) fetches what comes next.
template <bool kRms, int kRows, typename C, typename Ahead>
MEGACTL_INLINE void start_backward(const NormRows<C>& a, int64_t row, BackwardRow<C>* rows, const Ahead& ahead) {
    constexpr int kSums = kRms ? 1 : 3;
    const int64_t n = a.columns;
    const C share = C(1) / static_cast<C>(n), *const weight = a.weight;
    const C *grad[kRows], *x[kRows];
    C mean[kRows], sums[kSums * kRows];
    for (int r = 0; r < kRows; ++r) grad[r] = rows[r].grad, x[r] = rows[r].x, mean[r] = kRms ? C(0) : a.mean[row + r];
    row_sums<1>(n, sums, [&](auto at, auto* v) __attribute__((always_inline)) {
        const auto w = at(weight);
        for (int r = 0; r < kRows; ++r, v += kSums) {
            const auto g_w = at(grad[r]) * w;
            if constexpr (kRms) {
                v[0] = g_w * at(x[r]);
            } else {
                const auto d = at(x[r]) - mean[r];
                v[0] = g_w, v[1] = g_w * d, v[2] = d;
            }
        }
        ahead(at);
    });
    for (int r = 0; r < kRows; ++r) {
        const C rstd = a.rstd[row + r], *const s = sums + kSums * r;
        rows[r].norm = {mean[r], rstd, C(0)};
        if constexpr (kRms) {
            rows[r].gradient = {rstd, C(0), rstd * s[0] * share};
        } else {
            rows[r].gradient = row_gradient(rstd, s[0], s[1], s[2], share, rows[r].norm.offset);
        }
    }
}

// The second pass over kRows rows: grad_x, and their part of the weights' gradients.
template <bool kRms, int kRows, typename C>
MEGACTL_INLINE void finish_backward(int64_t n, const C* weight, const BackwardRow<C>* from, C* grad_weight, C* grad_bias) {
    BackwardRow<C> rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = from[r];
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        C sum_weight = grad_weight[i], sum_bias = kRms ? C(0) : grad_bias[i], results[kRows];
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
            const C g = rows[r].grad[i], x = rows[r].x[i], z = kRms ? x * rows[r].norm.rstd : rows[r].norm(x);
            results[r] = rows[r].gradient(g * weight[i], z);
            sum_weight += g * z;
            sum_bias += g;
        }
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) rows[r].to[i] = results[r];
        grad_weight[i] = sum_weight;
        if constexpr (!kRms) grad_bias[i] = sum_bias;
    }
}

// Both passes over rows [row, row + kRows).
template <bool kRms, int kRows, typename T, typename C>
MEGACTL_INLINE void norm_backward_together(const NormRows<C>& a, int64_t row, const T* grad_y, const T* x, const T* grad_sum, T* grad_x,
                                           C* grad_weight, C* grad_bias) {
    const int64_t n = a.columns, here = row * n, next = row + 2 * kRows <= a.rows ? here + kRows * n : here;
    BackwardRow<C> rows[kRows];
    for (int r = 0; r < kRows; ++r) {
        const int64_t at = here + r * n;
        C* const scratch = a.scratch + 2 * r * n;
        rows[r] = {widened(grad_y + at, n, scratch), widened(x + at, n, scratch + n), unnarrowed(grad_x + at, scratch), {}, {}};
    }
    start_backward<kRms, kRows>(a, row, rows, [&](auto at) __attribute__((always_inline)) {
        for (int r = 0; r < kRows; ++r) {
            at.template fetch<true>(grad_x + here + r * n);
            at.template fetch<false>(grad_y + next + r * n);
            at.template fetch<false>(x + next + r * n);
        }
    });
    finish_backward<kRms, kRows>(n, a.weight, rows, grad_weight, grad_bias);
    for (int r = 0; r < kRows; ++r) {
        const int64_t at = here + r * n;
        C* const __restrict to = rows[r].to;
        if (grad_sum) {
            const C* const __restrict add = widened(grad_sum + at, n, a.scratch + (2 * r + 1) * n);
            for (int64_t i = 0; i < n; ++i) to[i] += add[i];
        }
        narrowed(to, n, grad_x + at);
    }
}

// grad_x, and this run of rows' part of the gradients of weight and bias, [columns] each, overwritten. grad_sum may be null.
template <bool kRms, typename T, typename C = typename Compute<T>::type>
MEGACTL_INLINE void norm_backward_rows(const NormRows<C>& a, const T* grad_y, const T* x, const T* grad_sum, T* grad_x, C* grad_weight,
                                       C* grad_bias) {
    for (int64_t i = 0; i < a.columns; ++i) grad_weight[i] = C(0);
    if constexpr (!kRms) {
        for (int64_t i = 0; i < a.columns; ++i) grad_bias[i] = C(0);
    }
    int64_t row = 0;
    for (; row + kPair <= a.rows; row += kPair) {
        norm_backward_together<kRms, kPair>(a, row, grad_y, x, grad_sum, grad_x, grad_weight, grad_bias);
    }
    for (; row < a.rows; ++row) norm_backward_together<kRms, 1>(a, row, grad_y, x, grad_sum, grad_x, grad_weight, grad_bias);
}

// out[i] = sum over runs of partial[run][i], for columns [first, end) of `columns`.
template <typename C>
MEGACTL_INLINE void sum_runs_of(int64_t runs, int64_t columns, int64_t first, int64_t end, const C* __restrict partial, C* __restrict out) {
    constexpr int64_t kTile = 128;
    for (int64_t begin = first; begin < end; begin += kTile) {
        const int64_t n = end - begin < kTile ? end - begin : kTile;
        alignas(64) double total[kTile] = {};
        for (int64_t run = 0; run < runs; ++run) {
            for (int64_t i = 0; i < n; ++i) total[i] += partial[run * columns + begin + i];
        }
        for (int64_t i = 0; i < n; ++i) out[begin + i] = static_cast<C>(total[i]);
    }
}

#define MEGACTL_NORM_KERNELS(T)                                                                                                   \
    MEGACTL_CLONES static void norm_forward(const NormRows<Compute<T>::type>& a, const T* x, const T* residual, T* sum, T* y) {    \
        if (a.bias) {                                                                                                             \
            norm_forward_rows<false>(a, x, residual, sum, y);                                                                     \
        } else {                                                                                                                  \
            norm_forward_rows<true>(a, x, residual, sum, y);                                                                      \
        }                                                                                                                         \
    }                                                                                                                             \
    MEGACTL_CLONES static void norm_backward(const NormRows<Compute<T>::type>& a, const T* grad_y, const T* x, const T* grad_sum,  \
                                             T* grad_x, Compute<T>::type* grad_weight, Compute<T>::type* grad_bias) {             \
        if (a.mean) {                                                                                                             \
            norm_backward_rows<false>(a, grad_y, x, grad_sum, grad_x, grad_weight, grad_bias);                                    \
        } else {                                                                                                                  \
            norm_backward_rows<true>(a, grad_y, x, grad_sum, grad_x, grad_weight, grad_bias);                                     \
        }                                                                                                                         \
    }
MEGACTL_NORM_KERNELS(double)
MEGACTL_NORM_KERNELS(float)
MEGACTL_NORM_KERNELS(BFloat16)
MEGACTL_NORM_KERNELS(Float16)
#undef MEGACTL_NORM_KERNELS

#pragma GCC diagnostic pop

#define MEGACTL_SUM_RUNS(C)                                                                                                        \
    MEGACTL_CLONES static void sum_runs(int64_t runs, int64_t columns, int64_t first, int64_t end, const C* partial, C* out) {     \
        sum_runs_of(runs, columns, first, end, partial, out);                                                                     \
    }
MEGACTL_SUM_RUNS(double)
MEGACTL_SUM_RUNS(float)
#undef MEGACTL_SUM_RUNS

}  // namespace megactl::cpu
