// SwiGLU at one element, shared by the CPU and CUDA kernels. Source: Shazeer, "GLU variants improve transformer", 2020: silu(gate) * up
// with silu(g) = g / (1 + exp(-g)).
#pragma once

#include "kernels/exponential.h"

namespace megactl {

// exp(-g), from which sigmoid(g) = 1 / (1 + e). Infinite for very negative g, where the sigmoid then is zero.
template <typename T>
MEGACTL_INLINE T negative_exponential(T g) {
    return power_of_two(g * static_cast<T>(-kLog2E));
}

template <typename T>
MEGACTL_INLINE T silu(T g) {
    return g * reciprocal(T(1) + negative_exponential(g));
}

// silu(g) and its derivative, sigmoid(g) (1 + g (1 - sigmoid(g))), from g and e = negative_exponential(g).
template <typename T>
MEGACTL_INLINE T silu_slope(T g, T e, T* value) {
    const T share = reciprocal(T(1) + e), other = e < T(1) ? e * share : T(1) - share;  // 1 - share, without cancelling
    *value = g * share;
    return multiply_add(*value, other, share);
}

}  // namespace megactl
