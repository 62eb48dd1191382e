// SwiGLU and its backward on the CPU, over a run of a row's gates and of its ups.
#pragma once

#include <cstdint>

#include "kernels/cpu/chunks.h"
#include "kernels/cpu/clones.h"
#include "kernels/swiglu.h"

namespace megactl::cpu {

template <typename T, typename C>
MEGACTL_INLINE void swiglu_run(int64_t n, const T* gate, const T* up, T* y) {
    alignas(64) C rooms[3][kChunk];
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        const int64_t count = n - begin < kChunk ? n - begin : kChunk;
        const C *const gates = widened(count, gate + begin, rooms[0]), *const ups = widened(count, up + begin, rooms[1]);
        C* __restrict const ys = unrounded(y + begin, rooms[2]);
        for (int64_t i = 0; i < count; ++i) ys[i] = silu(gates[i]) * ups[i];
        rounded(count, ys, y + begin);
    }
}

template <typename T, typename C>
MEGACTL_INLINE void swiglu_backward_run(int64_t n, const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up) {
    alignas(64) C rooms[5][kChunk], e[kChunk];
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        const int64_t count = n - begin < kChunk ? n - begin : kChunk;
        const C *const grads = widened(count, grad + begin, rooms[0]), *const gates = widened(count, gate + begin, rooms[1]),
                *const ups = widened(count, up + begin, rooms[2]);
        C *__restrict const to_gate = unrounded(grad_gate + begin, rooms[3]), *__restrict const to_up = unrounded(grad_up + begin, rooms[4]);
        // In two loops, as GELU's tanh form and for its reason: fewer operations at a time that wait for each other.
        for (int64_t i = 0; i < count; ++i) e[i] = negative_exponential(gates[i]);
        for (int64_t i = 0; i < count; ++i) {
            C value;
            const C slope = silu_slope(gates[i], e[i], &value);
            to_gate[i] = grads[i] * ups[i] * slope;
            to_up[i] = grads[i] * value;
        }
        rounded(count, to_gate, grad_gate + begin);
        rounded(count, to_up, grad_up + begin);
    }
}

#define MEGACTL_SWIGLU_KERNELS(T, C)                                                                                                  \
    MEGACTL_CLONES static void swiglu(int64_t n, const T* gate, const T* up, T* y) { return swiglu_run<T, C>(n, gate, up, y); }      \
    MEGACTL_CLONES static void swiglu_backward(int64_t n, const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up) {     \
        return swiglu_backward_run<T, C>(n, grad, gate, up, grad_gate, grad_up);                                                     \
    }
MEGACTL_SWIGLU_KERNELS(double, double)
MEGACTL_SWIGLU_KERNELS(float, float)
MEGACTL_SWIGLU_KERNELS(BFloat16, float)
MEGACTL_SWIGLU_KERNELS(Float16, float)
#undef MEGACTL_SWIGLU_KERNELS

}  // namespace megactl::cpu
