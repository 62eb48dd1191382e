// bias + GELU and its backward on the CPU, one row at a time.
#pragma once

#include <cstdint>

#include "kernels/cpu/chunks.h"
#include "kernels/cpu/clones.h"
#include "kernels/gelu.h"

namespace megactl::cpu {

template <bool kTanh, typename T, typename C = typename Compute<T>::type>
MEGACTL_INLINE void gelu_run(int64_t n, const T* x, const T* bias, T* y) {
    alignas(64) C rooms[3][kChunk];
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        const int64_t count = n - begin < kChunk ? n - begin : kChunk;
        const C *const xs = widened(count, x + begin, rooms[0]), *const biases = widened(count, bias + begin, rooms[1]);
        C* __restrict const ys = unrounded(y + begin, rooms[2]);
        for (int64_t i = 0; i < count; ++i) ys[i] = gelu<kTanh>(xs[i] + biases[i]);
        rounded(count, ys, y + begin);
    }
}

template <bool kTanh, typename T, typename C>
MEGACTL_INLINE void gelu_backward_run(int64_t n, const T* grad, const T* x, const T* bias, T* grad_x, C* sums) {
    alignas(64) C rooms[4][kChunk];
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        const int64_t count = n - begin < kChunk ? n - begin : kChunk;
        const C *const xs = widened(count, x + begin, rooms[0]), *const biases = widened(count, bias + begin, rooms[1]),
                *const grads = widened(count, grad + begin, rooms[2]);
        C *__restrict const out = unrounded(grad_x + begin, rooms[3]), *__restrict const totals = sums + begin;
        for (int64_t i = 0; i < count; ++i) {
            const C g = grads[i] * gelu_slope<kTanh>(xs[i] + biases[i]);
            totals[i] += g;
            out[i] = g;
        }
        rounded(count, out, grad_x + begin);
    }
}

// y = gelu(x + bias) over a row of n; backward adds the row's gradient, before it is rounded to T, to `sums`.
#define MEGACTL_GELU_KERNELS(T, C)                                                                                              \
    MEGACTL_CLONES static void bias_gelu(bool tanh, int64_t n, const T* x, const T* bias, T* y) {                               \
        return tanh ? gelu_run<true>(n, x, bias, y) : gelu_run<false>(n, x, bias, y);                                           \
    }                                                                                                                           \
    MEGACTL_CLONES static void bias_gelu_backward(bool tanh, int64_t n, const T* grad, const T* x, const T* bias, T* grad_x,    \
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
