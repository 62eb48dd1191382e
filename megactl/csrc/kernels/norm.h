// The arithmetic of LayerNorm and RMSNorm, shared by the CPU and CUDA kernels.
//
// Ba, Kiros and Hinton, "Layer normalization", 2016: y = (x - mean) / sqrt(variance + epsilon) * weight + bias, over a row.
// Zhang and Sennrich, "Root mean square layer normalization", NeurIPS 2019: the same without mean and bias.
//
// The variance is taken around the mean, in a second pass over the row, which is then near: the difference of mean square and squared
// mean loses every digit where the mean is large. The mean itself is rounded to the type of the arithmetic; what the rounding left
// out, `shift`, is the mean of x - mean, a sum that costs next to nothing beside the others.
#pragma once

#include <cstdint>

#include "kernels/philox.h"

namespace megactl {

// a * b + c; one instruction on the GPU, where the build fuses nothing by itself.
#ifdef __CUDA_ARCH__
MEGACTL_INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
MEGACTL_INLINE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
#else
template <typename C>
MEGACTL_INLINE C multiply_add(C a, C b, C c) {
    return a * b + c;
}
#endif

#ifdef __CUDACC__
MEGACTL_INLINE float inverse_root(float x) { return rsqrtf(x); }
MEGACTL_INLINE double inverse_root(double x) { return 1.0 / sqrt(x); }
#else
MEGACTL_INLINE float inverse_root(float x) { return 1.0f / __builtin_sqrtf(x); }
MEGACTL_INLINE double inverse_root(double x) { return 1.0 / __builtin_sqrt(x); }
#endif

// Statistics of a row. The normalised x is (x - mean) * rstd + offset, where offset = -shift * rstd.
template <typename C>
struct RowNorm {
    C mean, rstd, offset;

    MEGACTL_INLINE C operator()(C x) const { return multiply_add(x - mean, rstd, offset); }
};

// From sums over the row of d = x - mean and of d^2; `share` is 1 / columns.
template <typename C>
MEGACTL_INLINE RowNorm<C> row_norm(C mean, C sum_d, C sum_squares, C share, C epsilon) {
    const C shift = sum_d * share, variance = sum_squares * share - shift * shift;
    // Rounding may leave less than nothing of a constant row; NaN must stay.
    const C rstd = inverse_root((variance < C(0) ? C(0) : variance) + epsilon);
    return {mean, rstd, -shift * rstd};
}

// The gradient of a row: with a = grad_y * weight and z the normalised x,
// grad_x = rstd * (a - mean(a) - z * mean(a z)) (RMSNorm: without mean(a)), to which the gradient of the residual stream is added.
template <typename C>
struct RowGradient {
    C rstd, mean_a, mean_az;

    MEGACTL_INLINE C operator()(C a, C z) const { return rstd * multiply_add(z, -mean_az, a - mean_a); }
};

// From sums over the row of a, of a d and of d, with d = x - mean; sets RowNorm's `offset`, too.
template <typename C>
MEGACTL_INLINE RowGradient<C> row_gradient(C rstd, C sum_a, C sum_ad, C sum_d, C share, C& offset) {
    const C shift = sum_d * share;
    offset = -shift * rstd;
    return {rstd, sum_a * share, rstd * (sum_ad - shift * sum_a) * share};
}

}  // namespace megactl
