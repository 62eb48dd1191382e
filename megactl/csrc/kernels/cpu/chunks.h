// Pieces of rows in the type of the arithmetic. A loop over one width of element vectorises well, a loop over two badly, so kernels
// convert a piece that stays in the first-level cache, work on it, and convert the result.
#pragma once

#include <cstdint>

#include "kernels/cpu/convert.h"
#include "kernels/dtype.h"

namespace megactl::cpu {

constexpr int64_t kChunk = 1024;

// x[0..n) in the type of the arithmetic: x itself where it has that type, else `room`, converted.
template <typename T>
MEGACTL_INLINE const float* widened(int64_t n, const T* x, float* room) {
    widen(x, n, room);
    return room;
}
MEGACTL_INLINE const float* widened(int64_t, const float* x, float*) { return x; }
MEGACTL_INLINE const double* widened(int64_t, const double* x, double*) { return x; }

// Where a result of n elements goes before `rounded` writes it to y: y itself where no rounding is needed.
template <typename T>
MEGACTL_INLINE float* unrounded(T*, float* room) {
    return room;
}
MEGACTL_INLINE float* unrounded(float* y, float*) { return y; }
MEGACTL_INLINE double* unrounded(double* y, double*) { return y; }

template <typename T>
MEGACTL_INLINE void rounded(int64_t n, const float* from, T* y) {
    narrow(from, n, y);
}
MEGACTL_INLINE void rounded(int64_t, const float*, float*) {}
MEGACTL_INLINE void rounded(int64_t, const double*, double*) {}

}  // namespace megactl::cpu
