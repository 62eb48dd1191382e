// One AdamW step over a flat segment on the CPU: one pass, every stream read and written once.
#pragma once

#include <cstdint>

#include "kernels/adamw.h"
#include "kernels/cpu/clones.h"
#include "kernels/dtype.h"

namespace megactl::cpu {

MEGACTL_CLONES static void adamw(const AdamW<float>& c, int64_t n, const float* __restrict grad, float* __restrict weight,
                                 float* __restrict exp_avg, float* __restrict exp_avg_sq) {
    const AdamW<float> k = c;
    for (int64_t i = 0; i < n; ++i) adamw_element(k, grad[i], weight[i], exp_avg[i], exp_avg_sq[i]);
}

MEGACTL_CLONES static void adamw(const AdamW<double>& c, int64_t n, const double* __restrict grad, double* __restrict weight,
                                 double* __restrict exp_avg, double* __restrict exp_avg_sq) {
    const AdamW<double> k = c;
    for (int64_t i = 0; i < n; ++i) adamw_element(k, grad[i], weight[i], exp_avg[i], exp_avg_sq[i]);
}

// Elements between which the rounded copy is written: they are still in the first-level cache, and a loop over one width of element
// vectorises better than one over two.
constexpr int64_t kAdamWChunk = 1024;

// As above, and the rounded weight goes to `low`.
#define MEGACTL_ADAMW_LOW(T, Low)                                                                                              \
    MEGACTL_CLONES static void adamw(const AdamW<T>& c, int64_t n, const T* __restrict grad, T* __restrict weight,             \
                                     T* __restrict exp_avg, T* __restrict exp_avg_sq, Low* __restrict low) {                   \
        const AdamW<T> k = c;                                                                                                  \
        for (int64_t begin = 0; begin < n; begin += kAdamWChunk) {                                                             \
            const int64_t end = begin + kAdamWChunk < n ? begin + kAdamWChunk : n;                                             \
            for (int64_t i = begin; i < end; ++i) adamw_element(k, grad[i], weight[i], exp_avg[i], exp_avg_sq[i]);             \
            for (int64_t i = begin; i < end; ++i) {                                                                            \
                low[i] = Store<Low>::from(static_cast<typename Compute<Low>::type>(weight[i]));                                \
            }                                                                                                                  \
        }                                                                                                                      \
    }
MEGACTL_ADAMW_LOW(float, BFloat16)
MEGACTL_ADAMW_LOW(float, Float16)
MEGACTL_ADAMW_LOW(double, float)
MEGACTL_ADAMW_LOW(double, BFloat16)
MEGACTL_ADAMW_LOW(double, Float16)
#undef MEGACTL_ADAMW_LOW

}  // namespace megactl::cpu
