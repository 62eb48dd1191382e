// Softmax of masked, scaled rows and its backward on the CPU, one row at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cpu/chunks.h"
#include "kernels/cpu/clones.h"
#include "kernels/exponential.h"

namespace megactl::cpu {

// 64 bytes of running maxima or sums: written out as a vector, since the compiler may not reorder a chain of additions.
template <typename C>
struct Lanes {
    static constexpr int64_t kCount = 64 / sizeof(C);
    typedef C Vector __attribute__((vector_size(64)));

    // Sums in short pieces, so that rounding errors do not add up over a long row.
    static MEGACTL_INLINE C sum(int64_t n, const C* x) {
        C total = 0;
        for (int64_t begin = 0; begin < n; begin += kChunk) total += piece(n - begin < kChunk ? n - begin : kChunk, x + begin);
        return total;
    }
    static MEGACTL_INLINE C dot(int64_t n, const C* x, const C* y) {
        C total = 0;
        for (int64_t begin = 0; begin < n; begin += kChunk) total += piece(n - begin < kChunk ? n - begin : kChunk, x + begin, y + begin);
        return total;
    }

    // The largest; -infinity where n is 0. NaN is passed over.
    static MEGACTL_INLINE C max(int64_t n, const C* x) {
        Vector best = Vector{} - static_cast<C>(__builtin_inff()), next;
        int64_t i = 0;
        for (; i + kCount <= n; i += kCount) {
            read(x + i, next);
            best = next > best ? next : best;
        }
        C top = best[0];
        for (int64_t lane = 1; lane < kCount; ++lane) top = best[lane] > top ? best[lane] : top;
        for (; i < n; ++i) top = x[i] > top ? x[i] : top;
        return top;
    }

   private:
    static MEGACTL_INLINE void read(const C* x, Vector& v) { memcpy(&v, x, sizeof v); }

    static MEGACTL_INLINE C joined(Vector& sums, C rest) {
        for (int64_t width = kCount / 2; width > 0; width /= 2) {
            for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
        }
        return sums[0] + rest;
    }

    static MEGACTL_INLINE C piece(int64_t n, const C* x) {
        Vector sums{}, next;
        C rest = 0;
        int64_t i = 0;
        for (; i + kCount <= n; i += kCount) {
            read(x + i, next);
            sums += next;
        }
        for (; i < n; ++i) rest += x[i];
        return joined(sums, rest);
    }

    static MEGACTL_INLINE C piece(int64_t n, const C* x, const C* y) {
        Vector sums{}, one, other;
        C rest = 0;
        int64_t i = 0;
        for (; i + kCount <= n; i += kCount) {
            read(x + i, one), read(y + i, other);
            sums += one * other;
        }
        for (; i < n; ++i) rest += x[i] * y[i];
        return joined(sums, rest);
    }
};

// softmax(scale * scores) over the keys among [0, visible) that `mask` (or null) allows, zeros at the others up to n. `room` has
// `visible` elements. The largest score is taken off before scaling, so that the scale's rounding error does not grow with the scores.
template <typename T, typename C>
MEGACTL_INLINE void softmax_run(int64_t n, int64_t visible, const uint8_t* __restrict mask, C scale, const T* scores, C* room, T* y) {
    memset(static_cast<void*>(y + visible), 0, static_cast<size_t>(n - visible) * sizeof(T));
    const C sign = scale < C(0) ? C(-1) : C(1), factor = scale * sign * static_cast<C>(kLog2E);
    const C* values = widened(visible, scores, room);
    if (mask || sign < C(0)) {
        C* __restrict const to = room;
        for (int64_t i = 0; i < visible; ++i) to[i] = values[i] * sign;
        values = room;
    }
    if (mask) {
        C* __restrict const to = room;
        for (int64_t i = 0; i < visible; ++i) to[i] = mask[i] ? to[i] : -static_cast<C>(__builtin_inff());
    }
    const C top = Lanes<C>::max(visible, values);
    C* const e = unrounded(y, room);
    for (int64_t i = 0; i < visible; ++i) e[i] = power_of_two_up_to_1((values[i] - top) * factor);
    if (mask) {
        // -infinity is not 0 yet where the factor is 0, nor where all scores are -infinity.
        for (int64_t i = 0; i < visible; ++i) e[i] = mask[i] ? e[i] : C(0);
    }
    const C sum = Lanes<C>::sum(visible, e);
    const C share = sum == C(0) ? C(0) : C(1) / sum;  // 0 where nothing is allowed: the largest score's power is 1
    for (int64_t i = 0; i < visible; ++i) e[i] *= share;
    if (mask && share != share) {
        for (int64_t i = 0; i < visible; ++i) e[i] = mask[i] ? e[i] : C(0);
    }
    rounded(visible, e, y);
}

// scale * y * (grad - sum(grad * y)) at the allowed keys, zeros elsewhere. `room` has 2 * visible elements.
template <typename T, typename C>
MEGACTL_INLINE void softmax_backward_run(int64_t n, int64_t visible, const uint8_t* __restrict mask, C scale, const T* grad, const T* y,
                                         C* room, T* grad_scores) {
    memset(static_cast<void*>(grad_scores + visible), 0, static_cast<size_t>(n - visible) * sizeof(T));
    const C *grads = widened(visible, grad, room), *const ys = widened(visible, y, room + visible);
    if (mask) {
        for (int64_t i = 0; i < visible; ++i) room[i] = mask[i] ? grads[i] : C(0);
        grads = room;
    }
    const C dot = Lanes<C>::dot(visible, grads, ys);
    C* const out = unrounded(grad_scores, room);
    for (int64_t i = 0; i < visible; ++i) out[i] = scale * ys[i] * (grads[i] - dot);
    if (mask) {
        for (int64_t i = 0; i < visible; ++i) out[i] = mask[i] ? out[i] : C(0);
    }
    rounded(visible, out, grad_scores);
}

#define MEGACTL_SOFTMAX_KERNELS(T, C)                                                                                            \
    MEGACTL_CLONES static void softmax(int64_t n, int64_t visible, const uint8_t* mask, C scale, const T* scores, C* room, T* y) { \
        softmax_run(n, visible, mask, scale, scores, room, y);                                                                   \
    }                                                                                                                            \
    MEGACTL_CLONES static void softmax_backward(int64_t n, int64_t visible, const uint8_t* mask, C scale, const T* grad,         \
                                                const T* y, C* room, T* grad_scores) {                                           \
        softmax_backward_run(n, visible, mask, scale, grad, y, room, grad_scores);                                               \
    }
MEGACTL_SOFTMAX_KERNELS(double, double)
MEGACTL_SOFTMAX_KERNELS(float, float)
MEGACTL_SOFTMAX_KERNELS(BFloat16, float)
MEGACTL_SOFTMAX_KERNELS(Float16, float)
#undef MEGACTL_SOFTMAX_KERNELS

}  // namespace megactl::cpu
