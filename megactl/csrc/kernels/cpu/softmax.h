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

    // Sum in short pieces, so that rounding errors do not add up over a long row.
    static MEGACTL_INLINE C sum(int64_t n, const C* x) {
        C total = 0;
        for (int64_t begin = 0; begin < n; begin += kChunk) total += piece(n - begin < kChunk ? n - begin : kChunk, x + begin);
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

    static MEGACTL_INLINE C piece(int64_t n, const C* x) {
        Vector sums{}, next;
        int64_t i = 0;
        for (; i + kCount <= n; i += kCount) {
            read(x + i, next);
            sums += next;
        }
        C rest = 0;
        for (; i < n; ++i) rest += x[i];
        for (int64_t width = kCount / 2; width > 0; width /= 2) {
            for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
        }
        return sums[0] + rest;
    }
};

// softmax(scale * scores) over the keys among [0, visible) that `mask` (or null) allows, zeros at the others up to n. `room` has
// `visible` elements. The largest score is taken off before scaling, so that the scale's rounding error does not grow with the scores.
template <typename T, typename C>
MEGACTL_INLINE void softmax_run(int64_t n, int64_t visible, const uint8_t* __restrict mask, C scale, const T* __restrict scores,
                                C* __restrict room, T* __restrict y) {
    const C sign = scale < C(0) ? C(-1) : C(1), factor = scale * sign * static_cast<C>(kLog2E);
    for (int64_t i = 0; i < visible; ++i) room[i] = load(scores[i]) * sign;
    bool any = visible > 0;
    if (mask) {
        int32_t seen = 0;
        for (int64_t i = 0; i < visible; ++i) seen |= mask[i];
        any = seen != 0;
        for (int64_t i = 0; i < visible; ++i) room[i] = mask[i] ? room[i] : -static_cast<C>(__builtin_inff());
    }
    if (!any) {
        memset(static_cast<void*>(y), 0, static_cast<size_t>(n) * sizeof(T));
        return;
    }
    const C top = Lanes<C>::max(visible, room);
    for (int64_t i = 0; i < visible; ++i) room[i] = power_of_two((room[i] - top) * factor);
    if (mask) {
        // Not 0 yet where the factor is: -infinity * 0 is NaN.
        for (int64_t i = 0; i < visible; ++i) room[i] = mask[i] ? room[i] : C(0);
    }
    const C share = C(1) / Lanes<C>::sum(visible, room);
    for (int64_t i = 0; i < visible; ++i) y[i] = Store<T>::from(room[i] * share);
    if (mask) {
        // Only a row with NaN in it needs this: elsewhere what is masked is 0 already.
        if (share != share) {
            for (int64_t i = 0; i < visible; ++i) y[i] = mask[i] ? y[i] : T{};
        }
    }
    if (visible < n) memset(static_cast<void*>(y + visible), 0, static_cast<size_t>(n - visible) * sizeof(T));
}

// scale * y * (grad - sum(grad * y)) at the allowed keys, zeros elsewhere. `room` has 2 * visible elements.
template <typename T, typename C>
MEGACTL_INLINE void softmax_backward_run(int64_t n, int64_t visible, const uint8_t* __restrict mask, C scale, const T* __restrict grad,
                                         const T* __restrict y, C* __restrict room, T* __restrict grad_scores) {
    C *__restrict const products = room, *__restrict const grads = room + visible;
    for (int64_t i = 0; i < visible; ++i) grads[i] = load(grad[i]);
    for (int64_t i = 0; i < visible; ++i) products[i] = load(y[i]);
    if (mask) {
        for (int64_t i = 0; i < visible; ++i) grads[i] = mask[i] ? grads[i] : C(0);
        for (int64_t i = 0; i < visible; ++i) products[i] = mask[i] ? products[i] : C(0);
    }
    for (int64_t i = 0; i < visible; ++i) products[i] *= grads[i];
    const C dot = Lanes<C>::sum(visible, products);
    for (int64_t i = 0; i < visible; ++i) products[i] = scale * load(y[i]) * (grads[i] - dot);
    for (int64_t i = 0; i < visible; ++i) grad_scores[i] = Store<T>::from(products[i]);
    if (mask) {
        for (int64_t i = 0; i < visible; ++i) grad_scores[i] = mask[i] ? grad_scores[i] : T{};
    }
    if (visible < n) memset(static_cast<void*>(grad_scores + visible), 0, static_cast<size_t>(n - visible) * sizeof(T));
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
