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

// 2 units in the last place; subnormal results become zero, as on the CPU.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

template <typename T>
__device__ __forceinline__ T power_of_two_up_to_1(T x) {
    return power_of_two(x);
}

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

// 2^x within 2 units in the last place: x = n + r with |r| <= 1/2, and 2^r by the polynomial through its Chebyshev nodes, which is off by
// 3e-9 (float) or 4e-18 (double). 0 below 2^-126.5 (2^-1022.5), where results would be subnormal, and infinity from 2^127.5 (2^1023.5)
// on: n = -127 and 128 then are the exponents of 0 and infinity. Comparisons leave NaN as it is.
// The first form is for x <= 0, where the other comparison has nothing to do and costs a tenth of a GELU.
MEGACTL_INLINE float power_of_two_up_to_1(float x) {
    x = x < -127.0f ? -127.0f : x;
    const float biased = x + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the last bits then hold
    const float r = x - (biased - 12582912.0f);
    const float z = r * r;  // even and odd powers apart: half as long a chain of operations that wait for each other
    const float odd = 6.931472067e-01f + z * (5.550327227e-02f + z * 1.340042818e-03f);
    const float even = z * (2.402265092e-01f + z * (9.618056679e-03f + z * 1.546144470e-04f));
    const float p = 1.0f + (r * odd + even);
    return p * bit_cast<float>((bit_cast<uint32_t>(biased) + 127u) << 23);
}
MEGACTL_INLINE double power_of_two_up_to_1(double x) {
    x = x < -1023.0 ? -1023.0 : x;
    const double biased = x + 6755399441055744.0;  // 1.5 * 2^52
    const double r = x - (biased - 6755399441055744.0);
    const double last = 1.0178057087733941e-07 + r * (7.074194297288521e-09 + r * 4.4558179083360645e-10);
    const double late = 1.5403530463724354e-04 + r * (1.5252733841556773e-05 + r * (1.3215432535912376e-06 + r * last));
    const double tail = 5.5504108664821627e-02 + r * (9.6181291075872567e-03 + r * (1.3333558146406471e-03 + r * late));
    const double p = 1.0 + r * (6.9314718055994531e-01 + r * (2.402265069591016e-01 + r * tail));
    return p * bit_cast<double>((bit_cast<uint64_t>(biased) + 1023u) << 52);
}
MEGACTL_INLINE float power_of_two(float x) { return power_of_two_up_to_1(x > 128.0f ? 128.0f : x); }
MEGACTL_INLINE double power_of_two(double x) { return power_of_two_up_to_1(x > 1024.0 ? 1024.0 : x); }

#endif

}  // namespace megactl
