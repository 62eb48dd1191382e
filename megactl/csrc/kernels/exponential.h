// Powers of two, reciprocals and multiply-adds as the arithmetic of elements needs them. On the CPU they are polynomials and bit
// operations without branches or calls, so loops over them vectorise; on the device they are its own instructions.
// Powers of two, not of e: the reduced argument is then exact, and log2(e) goes into a constant of the caller.
#pragma once

#include <cstdint>

#include "kernels/philox.h"

namespace megactl {

constexpr double kLog2E = 1.4426950408889634;

#ifdef __CUDA_ARCH__

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// 2 units in the last place; subnormal results become zero (they do not show in any use here).
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

// 1 unit in the last place; 0 from 2^126 on.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

#else

template <typename T>
MEGACTL_INLINE T multiply_add(T a, T b, T c) {
    return a * b + c;
}

template <typename T>
MEGACTL_INLINE T reciprocal(T x) {
    return T(1) / x;
}

// 2^n for the integer n that `biased` = n + 1.5 * 2^mantissa holds in its last bits, in two factors: 2^n may be beyond the normal
// range where p * 2^n, which is returned, is subnormal or overflows as it should.
MEGACTL_INLINE float scaled_by_power(float p, float biased) {
    const uint32_t n = bit_cast<uint32_t>(biased) - 0x4b400000u + 512u;
    const uint32_t half = (n >> 1) - 256u, rest = n - 512u - half;
    return p * bit_cast<float>((half + 127u) << 23) * bit_cast<float>((rest + 127u) << 23);
}
MEGACTL_INLINE double scaled_by_power(double p, double biased) {
    const uint64_t n = bit_cast<uint64_t>(biased) - 0x4338000000000000ull + 4096u;
    const uint64_t half = (n >> 1) - 2048u, rest = n - 4096u - half;
    return p * bit_cast<double>((half + 1023u) << 52) * bit_cast<double>((rest + 1023u) << 52);
}

// 2^x within 1.5 units in the last place: x = n + r with |r| <= 1/2, and exp(r log 2) by its Taylor series, which is cut off below
// 6e-9 (float) or 1e-17 (double). Comparisons leave NaN as it is.
MEGACTL_INLINE float power_of_two(float x) {
    x = x < -150.0f ? -150.0f : x;
    x = x > 129.0f ? 129.0f : x;
    const float biased = x + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float r = (x - (biased - 12582912.0f)) * 0.693147181f;
    const float tail = 4.16666667e-2f + r * (8.33333333e-3f + r * (1.38888889e-3f + r * 1.98412698e-4f));
    return scaled_by_power(1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * tail))), biased);
}
MEGACTL_INLINE double power_of_two(double x) {
    x = x < -1076.0 ? -1076.0 : x;
    x = x > 1025.0 ? 1025.0 : x;
    const double biased = x + 6755399441055744.0;  // 1.5 * 2^52
    const double r = (x - (biased - 6755399441055744.0)) * 0.69314718055994531;
    const double last = 2.5052108385441719e-08 + r * (2.0876756987868099e-09 + r * 1.6059043836821615e-10);
    const double late = 2.4801587301587302e-05 + r * (2.7557319223985891e-06 + r * (2.7557319223985891e-07 + r * last));
    const double tail = 4.1666666666666667e-2 + r * (8.3333333333333333e-3 + r * (1.3888888888888889e-3 + r * (1.9841269841269841e-4 + r * late)));
    return scaled_by_power(1.0 + r * (1.0 + r * (0.5 + r * (1.6666666666666667e-1 + r * tail))), biased);
}

#endif

}  // namespace megactl
