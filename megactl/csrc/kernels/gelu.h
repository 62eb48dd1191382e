// GELU and its slope at one element, shared by the CPU and CUDA kernels. Source: Hendrycks and Gimpel, "Gaussian error linear units",
// 2016: x P(X <= x) for X ~ N(0, 1), exactly, or with the tanh approximation of section 2.
#pragma once

#include "kernels/exponential.h"

namespace megactl {

// P(X > |v|) for X ~ N(0, 1), and `e` = exp(-v^2 / 2). The first is e * t * polynomial(t) with t = 1 / (1 + k |v|), so it keeps
// its relative accuracy far out, where 1 + erf cancels. The coefficients interpolate at Chebyshev nodes: up to |v| = 14.5 (float) and
// 38.6 (double), beyond which e is zero, the polynomials' relative errors are 3e-8 and 1.2e-17.
MEGACTL_INLINE float normal_tail(float v, float* e) {
    const float t = reciprocal(multiply_add(0.27f, v < 0.0f ? -v : v, 1.0f));
    *e = power_of_two_up_to_1(v * v * static_cast<float>(-0.5 * kLog2E));
    // Even and odd powers apart: half as long a chain of operations that wait for each other.
    const float z = t * t;
    float even = 2.920583342e-02f, odd = -1.277225574e-01f;
    even = multiply_add(even, z, 1.724360972e-01f);
    odd = multiply_add(odd, z, -7.234456237e-02f);
    even = multiply_add(even, z, 1.100542173e-01f);
    odd = multiply_add(odd, z, 7.107758252e-02f);
    even = multiply_add(even, z, 1.020635491e-01f);
    odd = multiply_add(odd, z, 1.075070932e-01f);
    even = multiply_add(even, z, 1.077227585e-01f);
    return *e * (multiply_add(odd, t, even) * t);
}
MEGACTL_INLINE double normal_tail(double v, double* e) {
    const double t = reciprocal(multiply_add(0.2, v < 0.0 ? -v : v, 1.0));
    *e = power_of_two_up_to_1(v * v * (-0.5 * kLog2E));
    double p = -0.0001255524296935802;
    p = multiply_add(p, t, 0.00063452176104748085);
    p = multiply_add(p, t, 0.0021951209114855856);
    p = multiply_add(p, t, -0.030110849644835177);
    p = multiply_add(p, t, 0.13023715754323298);
    p = multiply_add(p, t, -0.33283946455372645);
    p = multiply_add(p, t, 0.57858513078659081);
    p = multiply_add(p, t, -0.73401799120587388);
    p = multiply_add(p, t, 0.71451887797237297);
    p = multiply_add(p, t, -0.54896503446550176);
    p = multiply_add(p, t, 0.33395200395025339);
    p = multiply_add(p, t, -0.16788579113772587);
    p = multiply_add(p, t, 0.068610379981595887);
    p = multiply_add(p, t, -0.015101427581774058);
    p = multiply_add(p, t, 0.020962270117331795);
    p = multiply_add(p, t, 0.024381234618967704);
    p = multiply_add(p, t, 0.037797419120365666);
    p = multiply_add(p, t, 0.049759397043193536);
    p = multiply_add(p, t, 0.061025134729428251);
    p = multiply_add(p, t, 0.070213621399281184);
    p = multiply_add(p, t, 0.076596929285262417);
    p = multiply_add(p, t, 0.079788455712973505);
    p = multiply_add(p, t, 0.079788456085747625);
    return *e * (p * t);
}

// P(X <= v), and `e` as above.
template <typename T>
MEGACTL_INLINE T normal_distribution(T v, T* e) {
    const T tail = normal_tail(v, e);
    return v < T(0) ? tail : T(1) - tail;
}

constexpr double kRootTwoOverPi = 0.79788456080286536, kCubic = 0.044715;

// exp(-2u) with u = sqrt(2 / pi) (v + 0.044715 v^3). The tanh form's (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)), which unlike 1 + tanh does
// not cancel for negative u.
template <typename T>
MEGACTL_INLINE T tanh_exponential(T v) {
    constexpr double kLinear = -2.0 * kLog2E * kRootTwoOverPi;
    return power_of_two(v * multiply_add(v * v, static_cast<T>(kLinear * kCubic), static_cast<T>(kLinear)));
}

template <bool kTanh, typename T>
MEGACTL_INLINE T gelu(T v) {
    if (kTanh) return v * reciprocal(T(1) + tanh_exponential(v));
    T e;
    return v * normal_distribution(v, &e);
}

// The derivative of gelu: of the tanh form, from v and e = tanh_exponential(v), and of either.
template <typename T>
MEGACTL_INLINE T tanh_slope(T v, T e) {
    const T share = reciprocal(T(1) + e), other = e < T(1) ? e * share : T(1) - share;  // 1 - share, without cancelling
    const T two_du = multiply_add(v * v, static_cast<T>(6.0 * kRootTwoOverPi * kCubic), static_cast<T>(2.0 * kRootTwoOverPi));
    return multiply_add(v * (share * other), two_du, share);
}

template <bool kTanh, typename T>
MEGACTL_INLINE T gelu_slope(T v) {
    if (kTanh) return tanh_slope(v, tanh_exponential(v));
    T e;
    const T below = normal_distribution(v, &e);
    return multiply_add(v * static_cast<T>(0.39894228040143268), e, below);  // the density is e / sqrt(2 pi)
}

}  // namespace megactl
