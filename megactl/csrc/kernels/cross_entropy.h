// Softmax cross entropy over a vocabulary shard: what the CPU and CUDA kernels share.
//
// The loss of a row of logits l with label t is log(sum exp(l - top)) - (l[t] - top), top being the largest logit; its gradient is
// softmax(l) - onehot(t). A shard gives its own top and sum; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018,
// is how partial pairs combine, within a row here and over ranks in the engine.
#pragma once

#include <cstdint>

#include "kernels/philox.h"

namespace megactl {

// Rows of `columns` logits, of which the first `held` are the vocabulary's first_row .. first_row + held; the others are padding.
struct VocabularyShard {
    int64_t rows, columns, first_row, held;

    // The column of a label, or -1 where this shard does not hold it.
    MEGACTL_INLINE int64_t column_of(int64_t label) const {
        // Unsigned, because a label may be any number and the difference may wrap.
        const uint64_t column = static_cast<uint64_t>(label) - static_cast<uint64_t>(first_row);
        return column < static_cast<uint64_t>(held) ? static_cast<int64_t>(column) : -1;
    }
};

constexpr double kLog2OfE = 1.4426950408889634;

// 2^y for y <= 0; less than 2^-126, the smallest normal number, becomes 0. NaN stays.
#ifdef __CUDA_ARCH__
// Within 2 units in the last place.
__device__ __forceinline__ float small_power_of_two(float y) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
    return power;
}
__device__ __forceinline__ double small_power_of_two(double y) { return exp2(y); }
#else
// y = n + r with |r| <= 1/2. Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the last bits; with the exponent's bias added
// as well, they become 2^n by a shift. 2^r: a polynomial that interpolates at Chebyshev nodes, within 1e-7; in double the Taylor series
// of exp(r log 2), within 1e-16. Free of branches and calls, so loops over it vectorise.
MEGACTL_INLINE float small_power_of_two(float y) {
    const float biased = y + (12582912.0f + 127.0f), r = y - (biased - (12582912.0f + 127.0f));
    const float tail = 9.618083015e-03f + r * (1.339086331e-03f + r * 1.545316336e-04f);
    const float p = 1.0f + r * (6.931471825e-01f + r * (2.402265072e-01f + r * (5.550356954e-02f + r * tail)));
    return y < -126.0f ? 0.0f : p * bit_cast<float>(bit_cast<uint32_t>(biased) << 23);
}
MEGACTL_INLINE double small_power_of_two(double y) {
    const double biased = y + (6755399441055744.0 + 1023.0), r = (y - (biased - (6755399441055744.0 + 1023.0))) * 0.69314718055994531;
    const double last = 2.5052108385441719e-08 + r * (2.0876756987868099e-09 + r * 1.6059043836821615e-10);
    const double late = 2.4801587301587302e-05 + r * (2.7557319223985891e-06 + r * (2.7557319223985891e-07 + r * last));
    const double tail = 8.3333333333333333e-3 + r * (1.3888888888888889e-3 + r * (1.9841269841269841e-4 + r * late));
    const double p = 1.0 + r * (1.0 + r * (0.5 + r * (1.6666666666666667e-1 + r * (4.1666666666666667e-2 + r * tail))));
    return y < -1022.0 ? 0.0 : p * bit_cast<double>(bit_cast<uint64_t>(biased) << 52);
}
#endif

// exp(l - top) for l <= top. The difference of two near logits is exact, so it is taken before log2(e) comes in.
template <typename C>
MEGACTL_INLINE C exp_from_top(C l, C top) {
    return small_power_of_two((l - top) * static_cast<C>(kLog2OfE));
}

// What is subtracted from logits whose maximum is `top`: where nothing but minus infinity was seen, minus infinity less itself is
// not zero but NaN.
template <typename C>
MEGACTL_INLINE C finite_top(C top) {
    return top == static_cast<C>(-__builtin_inf()) ? C(0) : top;
}

// The maximum of some logits and the sum of exp(logit - maximum). NaN shows in the sum, not in the maximum.
template <typename C>
struct SoftmaxSum {
    C top = static_cast<C>(-__builtin_inf()), total = 0;

    MEGACTL_INLINE void raise(C higher) {
        if (higher > top) {
            total *= exp_from_top(top, higher);
            top = higher;
        }
    }
    MEGACTL_INLINE void merge(C other_top, C other_total) {
        const C higher = other_top > top ? other_top : top, shift = finite_top(higher);
        total = total * exp_from_top(top, shift) + other_total * exp_from_top(other_top, shift);
        top = higher;
    }
};

#ifdef __CUDACC__
MEGACTL_INLINE float logarithm(float x) { return logf(x); }
MEGACTL_INLINE double logarithm(double x) { return log(x); }
#else
MEGACTL_INLINE float logarithm(float x) { return __builtin_logf(x); }
MEGACTL_INLINE double logarithm(double x) { return __builtin_log(x); }
#endif

// The loss of a row whose label's logit is `target`.
template <typename C>
MEGACTL_INLINE C token_loss(const SoftmaxSum<C>& sum, C target) {
    return logarithm(sum.total) - (target - sum.top);
}

}  // namespace megactl
