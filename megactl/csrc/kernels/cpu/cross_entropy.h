// Cross entropy on the CPU: a row is read once, in blocks that stay in the first-level cache.
#pragma once

#include <cstdint>

#include "kernels/cpu/chunks.h"
#include "kernels/cpu/clones.h"
#include "kernels/cross_entropy.h"
#include "kernels/dtype.h"

namespace megactl::cpu {

constexpr int kLogits = 512;  // a power of two: blocks are reduced by halving, which vectorises and keeps rounding errors small

// The next kLogits logits in the type of the arithmetic: themselves, or a copy in `room`; behind the last of them minus infinity.
template <typename T, typename C>
MEGACTL_INLINE const C* logits_block(const T* logits, int64_t count, C* room) {
    if (count >= kLogits) return widened(kLogits, logits, room);
    const C* const found = widened(count, logits, room);
    for (int64_t i = 0; i < count; ++i) room[i] = found[i];
    for (int64_t i = count; i < kLogits; ++i) room[i] = static_cast<C>(-__builtin_inf());
    return room;
}

template <typename C>
MEGACTL_INLINE C block_maximum(const C* block) {
    alignas(64) C best[kLogits / 2];
    for (int i = 0; i < kLogits / 2; ++i) best[i] = block[i] > block[i + kLogits / 2] ? block[i] : block[i + kLogits / 2];
    for (int half = kLogits / 4; half >= 1; half /= 2) {
        for (int i = 0; i < half; ++i) best[i] = best[i] > best[i + half] ? best[i] : best[i + half];
    }
    return best[0];
}

template <typename C>
MEGACTL_INLINE C block_sum(C* block) {
    for (int half = kLogits / 2; half >= 1; half /= 2) {
        for (int i = 0; i < half; ++i) block[i] += block[i + half];
    }
    return block[0];
}

template <typename T>
MEGACTL_INLINE void softmax_sum_row(const T* logits, int64_t n, SoftmaxSum<typename Compute<T>::type>* out) {
    using C = typename Compute<T>::type;
    alignas(64) C room[kLogits], block[kLogits];
    // Blocks are added up in double: one addition for each 512 logits.
    SoftmaxSum<double> sum;
    for (int64_t begin = 0; begin < n; begin += kLogits) {
        const C* const from = logits_block(logits + begin, n - begin, room);
        sum.raise(static_cast<double>(block_maximum(from)));
        const C shift = finite_top(static_cast<C>(sum.top));
        for (int i = 0; i < kLogits; ++i) block[i] = exp_from_top(from[i], shift);
        sum.total += static_cast<double>(block_sum(block));
    }
    out->top = static_cast<C>(sum.top);
    out->total = static_cast<C>(sum.total);
}

// out = exp(logits - top) * factor; `out` may be `logits`.
template <typename T, typename C>
MEGACTL_INLINE void softmax_gradient_row(const T* logits, int64_t n, C top, C factor, T* out) {
    alignas(64) C rooms[2][kLogits];
    for (int64_t begin = 0; begin < n; begin += kLogits) {
        const int64_t count = n - begin < kLogits ? n - begin : kLogits;
        const C* const from = widened(count, logits + begin, rooms[0]);
        C* const to = unrounded(out + begin, rooms[1]);
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) to[i] = exp_from_top(from[i], top) * factor;
        rounded(count, to, out + begin);
    }
}

#define MEGACTL_CROSS_ENTROPY_KERNELS(T)                                                                                       \
    MEGACTL_CLONES static void softmax_sum(const T* logits, int64_t n, SoftmaxSum<typename Compute<T>::type>* out) {           \
        softmax_sum_row(logits, n, out);                                                                                       \
    }                                                                                                                          \
    MEGACTL_CLONES static void softmax_gradient(const T* logits, int64_t n, typename Compute<T>::type top,                     \
                                                typename Compute<T>::type factor, T* out) {                                    \
        softmax_gradient_row(logits, n, top, factor, out);                                                                     \
    }
MEGACTL_CROSS_ENTROPY_KERNELS(double)
MEGACTL_CROSS_ENTROPY_KERNELS(float)
MEGACTL_CROSS_ENTROPY_KERNELS(BFloat16)
MEGACTL_CROSS_ENTROPY_KERNELS(Float16)
#undef MEGACTL_CROSS_ENTROPY_KERNELS

// The gradient of one row, label and padding included. A scale of zero (a masked token) gives zeros whatever the logits are.
template <typename T>
void cross_entropy_gradient(const VocabularyShard& shard, const T* logits, int64_t label, typename Compute<T>::type top,
                            typename Compute<T>::type total, typename Compute<T>::type scale, T* out) {
    using C = typename Compute<T>::type;
    int64_t filled = 0;
    if (scale != C(0)) {
        const int64_t column = shard.column_of(label);
        const C factor = scale / total, target = column < 0 ? C(0) : load(logits[column]);
        softmax_gradient(logits, shard.held, top, factor, out);
        if (column >= 0) out[column] = Store<T>::from(exp_from_top(target, top) * factor - scale);
        filled = shard.held;
    }
    for (int64_t i = filled; i < shard.columns; ++i) out[i] = Store<T>::from(C(0));
}

}  // namespace megactl::cpu
