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

template <typename C>
struct NormRows {
    int64_t rows, columns;
    const C *weight, *bias;  // bias is null for RMSNorm
    C epsilon;
    C *mean, *rstd;  // [rows]; mean is null for RMSNorm
    C* scratch;      // [3 * columns], unused where the element type is C
};

// y = norm(s) with s = x, or x + residual rounded to T, which goes to `sum`.
template <typename T, typename C = typename Compute<T>::type>
MEGACTL_INLINE void norm_forward_rows(const NormRows<C>& a, const T* x, const T* residual, T* sum, T* y) {
    const int64_t n = a.columns;
    const C *__restrict const weight = a.weight, *__restrict const bias = a.bias;
    for (int64_t row = 0; row < a.rows; ++row, x += n, y += n) {
        const T* __restrict from = x;
        if (residual) {
            const C *__restrict const xs = widened(x, n, a.scratch), *__restrict const rs = widened(residual, n, a.scratch + n);
            C* __restrict const total = unnarrowed(sum, a.scratch + 2 * n);
            for (int64_t i = 0; i < n; ++i) total[i] = xs[i] + rs[i];
            narrowed(total, n, sum);
            from = sum;
            residual += n, sum += n;
        }
        const C* __restrict const s = widened(from, n, a.scratch);
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
            const RowNorm<C> norm = row_norm(mean, sums[0], sums[1], static_cast<C>(n), a.epsilon);
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

// grad_x, and this run of rows' part of the gradients of weight and bias, [columns] each, overwritten. grad_sum may be null.
template <typename T, typename C = typename Compute<T>::type>
MEGACTL_INLINE void norm_backward_rows(const NormRows<C>& a, const T* grad_y, const T* x, const T* grad_sum, T* grad_x,
                                       C* __restrict grad_weight, C* __restrict grad_bias) {
    const int64_t n = a.columns;
    const C* __restrict const weight = a.weight;
    for (int64_t i = 0; i < n; ++i) grad_weight[i] = C(0);
    if (a.mean) {
        for (int64_t i = 0; i < n; ++i) grad_bias[i] = C(0);
    }
    for (int64_t row = 0; row < a.rows; ++row, grad_y += n, x += n, grad_x += n) {
        const C *__restrict const g = widened(grad_y, n, a.scratch), *__restrict const s = widened(x, n, a.scratch + n);
        C* __restrict const to = unnarrowed(grad_x, a.scratch + 2 * n);
        const C rstd = a.rstd[row];
        if (a.mean) {
            RowNorm<C> norm{a.mean[row], rstd, C(0)};
            C sums[3];
            row_sums(n, sums, [&](auto at, auto* v) __attribute__((always_inline)) {
                const auto g_w = at(g) * at(weight), d = at(s) - norm.mean;
                v[0] = g_w, v[1] = g_w * d, v[2] = d;
            });
            const RowGradient<C> gradient = row_gradient(rstd, sums[0], sums[1], sums[2], static_cast<C>(n), norm.offset);
            for (int64_t i = 0; i < n; ++i) {
                const C z = norm(s[i]);
                to[i] = gradient(g[i] * weight[i], z);
                grad_weight[i] += g[i] * z;
                grad_bias[i] += g[i];
            }
        } else {
            C sums[1];
            row_sums(n, sums, [&](auto at, auto* v) __attribute__((always_inline)) { v[0] = at(g) * at(weight) * at(s); });
            const RowGradient<C> gradient{rstd, C(0), rstd * sums[0] / static_cast<C>(n)};
            for (int64_t i = 0; i < n; ++i) {
                const C z = s[i] * rstd;
                to[i] = gradient(g[i] * weight[i], z);
                grad_weight[i] += g[i] * z;
            }
        }
        if (grad_sum) {
            const C* __restrict const add = widened(grad_sum, n, a.scratch);
            for (int64_t i = 0; i < n; ++i) to[i] += add[i];
            grad_sum += n;
        }
        narrowed(to, n, grad_x);
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
        norm_backward_rows(a, grad_y, x, grad_sum, grad_x, grad_weight, grad_bias);                                               \
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
