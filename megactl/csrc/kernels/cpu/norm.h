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
template <typename C>
struct Vector {
    typedef C type __attribute__((vector_size(64)));
    static constexpr int64_t kLanes = 64 / sizeof(C);
};

// Vectors are passed between inlined functions only, where the ABI that this warns about does not matter.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

// Elements summed in the type of the arithmetic; beyond, in double. So the error of a sum does not grow with the row.
constexpr int64_t kSumRun = 8192;

// sums[k] = sum over i < n of the k-th value that term(at, values) sets, where at(p) is p[i], or a vector of such elements. Written with
// vectors because compilers keep an array of partial sums in memory as often as not. The order of summation depends on n alone.
template <typename C, int K, typename Term>
MEGACTL_INLINE void row_sums(int64_t n, C (&sums)[K], const Term& term) {
    using V = typename Vector<C>::type;
    constexpr int64_t kLanes = Vector<C>::kLanes;
    constexpr int kVectors = K == 1 ? 4 : 2;  // enough to hide the latency of additions, few enough for 16 registers of AVX2
    double totals[K] = {};
    for (int64_t begin = 0; begin < n; begin += kSumRun) {
        const int64_t end = n - begin < kSumRun ? n : begin + kSumRun;
        V lanes[kVectors][K] = {};
        int64_t i = begin;
        for (; i + kVectors * kLanes <= end; i += kVectors * kLanes) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                V values[K];
                const int64_t first = i + v * kLanes;
                term([first](const C* p) __attribute__((always_inline)) {
                    V loaded;
                    __builtin_memcpy(&loaded, p + first, sizeof loaded);
                    return loaded;
                }, values);
#pragma GCC unroll 3
                for (int k = 0; k < K; ++k) lanes[v][k] += values[k];
            }
        }
        C rest[K] = {};
        for (; i < end; ++i) {
            C values[K];
            term([i](const C* p) __attribute__((always_inline)) { return p[i]; }, values);
            for (int k = 0; k < K; ++k) rest[k] += values[k];
        }
        for (int k = 0; k < K; ++k) {
            for (int v = 1; v < kVectors; ++v) lanes[0][k] += lanes[v][k];
            C pieces[kLanes];
            __builtin_memcpy(pieces, &lanes[0][k], sizeof pieces);
            for (int64_t half = kLanes / 2; half > 0; half /= 2) {
                for (int64_t l = 0; l < half; ++l) pieces[l] += pieces[l + half];
            }
            totals[k] += static_cast<double>(pieces[0] + rest[k]);
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

// Rows of scratch: three for each of the rows that a backward pass works on together.
constexpr int64_t kScratchRows = 12;

template <typename C>
struct NormRows {
    int64_t rows, columns;
    const C *weight, *bias;  // bias is null for RMSNorm
    C epsilon;
    C *mean, *rstd;  // [rows]; mean is null for RMSNorm
    C* scratch;      // [kScratchRows, columns], unused where the element type is C
};

// sum = x + residual, rounded to T; returns it in the type of the arithmetic.
template <typename T, typename C>
MEGACTL_INLINE const C* added(const T* x, const T* residual, int64_t n, T* sum, C* scratch) {
    const C *__restrict const xs = widened(x, n, scratch), *__restrict const rs = widened(residual, n, scratch + n);
    C* __restrict const total = unnarrowed(sum, scratch + 2 * n);
    for (int64_t i = 0; i < n; ++i) total[i] = xs[i] + rs[i];
    narrowed(total, n, sum);
    return widened(sum, n, scratch);
}

// y = norm(s) with s = x, or x + residual rounded to T, which goes to `sum`.
template <typename T, typename C = typename Compute<T>::type>
MEGACTL_INLINE void norm_forward_rows(const NormRows<C>& a, const T* x, const T* residual, T* sum, T* y) {
    const int64_t n = a.columns;
    const C *__restrict const weight = a.weight, *__restrict const bias = a.bias;
    for (int64_t row = 0; row < a.rows; ++row, x += n, y += n) {
        const C* __restrict const s = residual ? added(x, residual, n, sum, a.scratch) : widened(x, n, a.scratch);
        if (residual) residual += n, sum += n;
        C* __restrict const to = unnarrowed(y, a.scratch + n);
        C sums[2];
        if (bias) {
            C total[1];
            row_sums(n, total, [&](auto at, auto* v) __attribute__((always_inline)) { v[0] = at(s); });
            const C mean = total[0] / static_cast<C>(n);
            row_sums(n, sums, [&](auto at, auto* v) __attribute__((always_inline)) {
                const auto d = at(s) - mean;
                v[0] = d, v[1] = d * d;
            });
            const RowNorm<C> norm = row_norm(mean, sums[0], sums[1], C(1) / static_cast<C>(n), a.epsilon);
            for (int64_t i = 0; i < n; ++i) to[i] = multiply_add(norm(s[i]), weight[i], bias[i]);
            a.mean[row] = mean, a.rstd[row] = norm.rstd;
        } else {
            C total[1];
            row_sums(n, total, [&](auto at, auto* v) __attribute__((always_inline)) { v[0] = at(s) * at(s); });
            const C rstd = inverse_root(total[0] / static_cast<C>(n) + a.epsilon);
            for (int64_t i = 0; i < n; ++i) to[i] = s[i] * rstd * weight[i];
            a.rstd[row] = rstd;
        }
        narrowed(to, n, y);
    }
}

// Rows whose second pass is made together, so that the sums over rows are loaded and stored once for all of them.
constexpr int kTogether = kScratchRows / 3;

// A row between the two passes of its backward.
template <typename C>
struct BackwardRow {
    const C *grad, *x;
    C* to;
    RowNorm<C> norm;
    RowGradient<C> gradient;
};

// The first pass: the sums over the row.
template <bool kRms, typename C>
MEGACTL_INLINE void start_backward(const NormRows<C>& a, int64_t row, BackwardRow<C>& b) {
    const int64_t n = a.columns;
    const C *const g = b.grad, *const s = b.x, *const weight = a.weight;
    const C rstd = a.rstd[row], mean = kRms ? C(0) : a.mean[row];
    b.norm = {mean, rstd, C(0)};
    if constexpr (kRms) {
        C sums[1];
        row_sums(n, sums, [&](auto at, auto* v) __attribute__((always_inline)) { v[0] = at(g) * at(weight) * at(s); });
        b.gradient = {rstd, C(0), rstd * sums[0] / static_cast<C>(n)};
    } else {
        C sums[3];
        row_sums(n, sums, [&](auto at, auto* v) __attribute__((always_inline)) {
            const auto g_w = at(g) * at(weight), d = at(s) - mean;
            v[0] = g_w, v[1] = g_w * d, v[2] = d;
        });
        b.gradient = row_gradient(rstd, sums[0], sums[1], sums[2], C(1) / static_cast<C>(n), b.norm.offset);
    }
}

// The second pass over kRows rows: grad_x, and their part of the weights' gradients.
template <bool kRms, int kRows, typename C>
MEGACTL_INLINE void finish_backward(int64_t n, const C* weight, const BackwardRow<C>* from, C* grad_weight, C* grad_bias) {
    BackwardRow<C> rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = from[r];
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        C sum_weight = grad_weight[i], sum_bias = kRms ? C(0) : grad_bias[i];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const C g = rows[r].grad[i], x = rows[r].x[i], z = kRms ? x * rows[r].norm.rstd : rows[r].norm(x);
            rows[r].to[i] = rows[r].gradient(g * weight[i], z);
            sum_weight += g * z;
            sum_bias += g;
        }
        grad_weight[i] = sum_weight;
        if constexpr (!kRms) grad_bias[i] = sum_bias;
    }
}

// grad_x, and this run of rows' part of the gradients of weight and bias, [columns] each, overwritten. grad_sum may be null.
template <bool kRms, typename T, typename C = typename Compute<T>::type>
MEGACTL_INLINE void norm_backward_rows(const NormRows<C>& a, const T* grad_y, const T* x, const T* grad_sum, T* grad_x, C* grad_weight,
                                       C* grad_bias) {
    const int64_t n = a.columns;
    for (int64_t i = 0; i < n; ++i) grad_weight[i] = C(0);
    if constexpr (!kRms) {
        for (int64_t i = 0; i < n; ++i) grad_bias[i] = C(0);
    }
    for (int64_t row = 0; row < a.rows; row += kTogether) {
        const int64_t left = a.rows - row, together = left < kTogether ? left : kTogether;
        BackwardRow<C> rows[kTogether];
        for (int64_t r = 0; r < together; ++r) {
            const int64_t at = (row + r) * n;
            C* const scratch = a.scratch + 3 * r * n;
            rows[r].grad = widened(grad_y + at, n, scratch), rows[r].x = widened(x + at, n, scratch + n);
            rows[r].to = unnarrowed(grad_x + at, scratch + 2 * n);
            start_backward<kRms>(a, row + r, rows[r]);
        }
        if (together == kTogether) {
            finish_backward<kRms, kTogether>(n, a.weight, rows, grad_weight, grad_bias);
        } else {
            for (int64_t r = 0; r < together; ++r) finish_backward<kRms, 1>(n, a.weight, rows + r, grad_weight, grad_bias);
        }
        for (int64_t r = 0; r < together; ++r) {
            const int64_t at = (row + r) * n;
            C* const __restrict to = rows[r].to;
            if (grad_sum) {
                const C* const __restrict add = widened(grad_sum + at, n, a.scratch + 3 * r * n);
                for (int64_t i = 0; i < n; ++i) to[i] += add[i];
            }
            narrowed(to, n, grad_x + at);
        }
    }
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
        norm_forward_rows(a, x, residual, sum, y);                                                                                \
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
