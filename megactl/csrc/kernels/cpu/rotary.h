// Rotary position embedding on the CPU, one token at a time.
#pragma once

#include <cstdint>

#include "kernels/cpu/chunks.h"
#include "kernels/cpu/clones.h"
#include "kernels/rotary.h"

namespace megactl::cpu {

// to = from with its first 2 half elements turned, the rest copied.
template <typename T, typename C>
MEGACTL_INLINE void turn_row(const RotaryShape& shape, const T* from, const C* cos, const C* sin, T* to) {
    alignas(64) C rooms[4][kChunk];
    for (int64_t begin = 0; begin < shape.half; begin += kChunk) {
        const int64_t n = shape.half - begin < kChunk ? shape.half - begin : kChunk;
        const int64_t second = shape.half + begin;
        const C *const low = widened(n, from + begin, rooms[0]), *const high = widened(n, from + second, rooms[1]);
        const C *const c = cos + begin, *const s = sin + begin;
        C *__restrict const to_low = unrounded(to + begin, rooms[2]), *__restrict const to_high = unrounded(to + second, rooms[3]);
        for (int64_t i = 0; i < n; ++i) {
            to_low[i] = low[i] * c[i] - high[i] * s[i];
            to_high[i] = high[i] * c[i] + low[i] * s[i];
        }
        rounded(n, to_low, to + begin);
        rounded(n, to_high, to + second);
    }
    for (int64_t i = 2 * shape.half; i < shape.width; ++i) to[i] = from[i];
}

template <typename T>
MEGACTL_INLINE void copy_row(int64_t n, const T* from, T* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// The rows of one token from `packed` to q, k, v, or with kPack the other way. *_head: elements from one head to the next.
template <bool kPack, typename T, typename C>
MEGACTL_INLINE void rotary_rows(const RotaryShape& shape, T* packed, T* q, int64_t q_head, T* k, int64_t k_head, T* v, int64_t v_head,
                                const C* cos, const C* sin) {
    for (int64_t group = 0; group < shape.groups; ++group) {
        for (int64_t head = 0; head <= shape.heads; ++head, packed += shape.width) {
            T* const apart = head < shape.heads ? q + (group * shape.heads + head) * q_head : k + group * k_head;
            turn_row(shape, kPack ? apart : packed, cos, sin, kPack ? packed : apart);
        }
        T* const apart = v + group * v_head;
        copy_row(shape.width, kPack ? apart : packed, kPack ? packed : apart);
        packed += shape.width;
    }
}

#define MEGACTL_ROTARY_KERNELS(T, C)                                                                                                    \
    MEGACTL_CLONES static void rotary_token(bool pack, const RotaryShape& shape, T* packed, T* q, int64_t q_head, T* k, int64_t k_head, \
                                            T* v, int64_t v_head, const C* cos, const C* sin) {                                         \
        return pack ? rotary_rows<true, T, C>(shape, packed, q, q_head, k, k_head, v, v_head, cos, sin)                                 \
                    : rotary_rows<false, T, C>(shape, packed, q, q_head, k, k_head, v, v_head, cos, sin);                               \
    }
MEGACTL_ROTARY_KERNELS(double, double)
MEGACTL_ROTARY_KERNELS(float, float)
MEGACTL_ROTARY_KERNELS(BFloat16, float)
MEGACTL_ROTARY_KERNELS(Float16, float)
#undef MEGACTL_ROTARY_KERNELS

}  // namespace megactl::cpu
