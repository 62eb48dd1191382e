// Softmax cross entropy over a vocabulary shard: what the CPU and CUDA kernels share.
//
// The loss of a row of logits l with label t is log(sum exp(l - top)) - (l[t] - top), top being the largest logit; its gradient is
// softmax(l) - onehot(t). A shard gives its own top and sum; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018,
// is how partial pairs combine, within a row here and over ranks in the engine.
#pragma once

#include <cstdint>

#include "kernels/exponential.h"

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

// exp(l - top). The difference of two near logits is exact, so it is taken before log2(e) comes in.
template <typename C>
MEGACTL_INLINE C exp_from_top(C l, C top) {
    return power_of_two((l - top) * static_cast<C>(kLog2E));
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
