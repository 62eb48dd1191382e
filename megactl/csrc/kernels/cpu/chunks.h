// Pieces of rows in the type of the arithmetic. A loop over one width of element vectorises well, a loop over two badly, so kernels
// convert a piece that stays in the first-level cache, work on it, and convert the result.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace megactl::cpu {

constexpr int64_t kChunk = 1024;

// x[0..n) in the type of the arithmetic: x itself where it has that type, else `room`, converted.
template <typename T, typename C>
MEGACTL_INLINE const C* widened(int64_t n, const T* __restrict x, C* __restrict room) {
    for (int64_t i = 0; i < n; ++i) room[i] = load(x[i]);
    return room;
}
template <typename C>
MEGACTL_INLINE const C* widened(int64_t, const C* x, C*) {
    return x;
}

// Where a result of n elements goes before `rounded` writes it to y: y itself where no rounding is needed.
template <typename T, typename C>
MEGACTL_INLINE C* unrounded(T*, C* room) {
    return room;
}
template <typename C>
MEGACTL_INLINE C* unrounded(C* y, C*) {
    return y;
}

template <typename T, typename C>
MEGACTL_INLINE void rounded(int64_t n, const C* __restrict from, T* __restrict y) {
    for (int64_t i = 0; i < n; ++i) y[i] = Store<T>::from(from[i]);
}
template <typename C>
MEGACTL_INLINE void rounded(int64_t, const C*, C*) {}

}  // namespace megactl::cpu
