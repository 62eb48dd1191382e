// bias + GELU and its backward on the CPU, one row at a time.
#pragma once

#include <cstdint>

#include "kernels/cpu/chunks.h"
#include "kernels/cpu/clones.h"
#include "kernels/gelu.h"

namespace megactl::cpu {

template <bool kTanh, typename T, typename C>
MEGACTL_INLINE void gelu_run(int64_t n, const T* x, const C* bias, T* y) {
    alignas(64) C rooms[2][kChunk];
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        const int64_t count = n - begin < kChunk ? n - begin : kChunk;
        const C *const xs = widened(count, x + begin, rooms[0]), *const biases = bias + begin;
        C* __restrict const ys = unrounded(y + begin, rooms[1]);
        for (int64_t i = 0; i < count; ++i) ys[i] = gelu<kTanh>(xs[i] + biases[i]);
        rounded(count, ys, y + begin);
    }
}

template <bool kTanh, typename T, typename C>
MEGACTL_INLINE void gelu_backward_run(int64_t n, const T* grad, const T* x, const C* bias, T* grad_x, C* sums) {
    alignas(64) C rooms[3][kChunk], v[kChunk], e[kChunk];
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        const int64_t count = n - begin < kChunk ? n - begin : kChunk;
        const C *const xs = widened(count, x + begin, rooms[0]), *const biases = bias + begin,
                *const grads = widened(count, grad + begin, rooms[1]);
        C *__restrict const out = unrounded(grad_x + begin, rooms[2]), *__restrict const totals = sums + begin;
        // The tanh form in two loops: in one, an element takes so many operations that wait for each other that the processor cannot look
        // ahead to the next elements. A fifth faster; the exact form has more to do at a time and gains nothing.
        if constexpr (kTanh) {
            for (int64_t i = 0; i < count; ++i) v[i] = xs[i] + biases[i], e[i] = tanh_exponential(v[i]);
        }
        for (int64_t i = 0; i < count; ++i) {
            const C g = grads[i] * (kTanh ? tanh_slope(v[i], e[i]) : gelu_slope<false>(xs[i] + biases[i]));
            totals[i] += g;
            out[i] = g;
        }
        rounded(count, out, grad_x + begin);
    }
}

// y = gelu(x + bias) over a row of n, the bias in the type of the arithmetic; backward adds the row's gradient, before it is rounded to T, to `sums`.
#define MEGACTL_GELU_KERNELS(T, C)                                                                                              \
    MEGACTL_CLONES static void bias_gelu(bool tanh, int64_t n, const T* x, const C* bias, T* y) {                               \
        return tanh ? gelu_run<true>(n, x, bias, y) : gelu_run<false>(n, x, bias, y);                                           \
    }                                                                                                                           \
    MEGACTL_CLONES static void bias_gelu_backward(bool tanh, int64_t n, const T* grad, const T* x, const C* bias, T* grad_x,    \
                                                  C* sums) {                                                                    \
        return tanh ? gelu_backward_run<true>(n, grad, x, bias, grad_x, sums)                                                   \
                    : gelu_backward_run<false>(n, grad, x, bias, grad_x, sums);                                                 \
    }
MEGACTL_GELU_KERNELS(double, double)
MEGACTL_GELU_KERNELS(float, float)
MEGACTL_GELU_KERNELS(BFloat16, float)
MEGACTL_GELU_KERNELS(Float16, float)
#undef MEGACTL_GELU_KERNELS

}  // namespace megactl::cpu
