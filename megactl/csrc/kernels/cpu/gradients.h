// Squared norm and scaling of gradients on the CPU.
#pragma once

#include <cstdint>

#include "kernels/cpu/clones.h"
#include "kernels/dtype.h"

namespace megactl::cpu {

// Elements summed up as one piece. Pieces do not depend on the number of threads, so neither does the order of additions.
constexpr int64_t kSumChunk = 8192;

constexpr int kLanes = 32;

// The sum of squares of up to kSumChunk elements, in double: squares of float are exact, and nothing overflows.
template <typename T>
MEGACTL_INLINE double squares_run(const T* x, int64_t n) {
    double lanes[kLanes] = {};
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) {
            const double value = static_cast<double>(load(x[i + j]));
            lanes[j] += value * value;
        }
    }
    for (int64_t i = whole; i < n; ++i) {
        const double value = static_cast<double>(load(x[i]));
        lanes[i - whole] += value * value;
    }
    for (int half = kLanes / 2; half >= 1; half /= 2) {
        for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    return lanes[0];
}

template <typename T>
MEGACTL_INLINE void scale_run(typename Compute<T>::type factor, int64_t n, T* x) {
    for (int64_t i = 0; i < n; ++i) x[i] = Store<T>::from(load(x[i]) * factor);
}

#define MEGACTL_GRADIENT_KERNELS(T)                                                                          \
    MEGACTL_CLONES static double squares(const T* x, int64_t n) { return squares_run(x, n); }                \
    MEGACTL_CLONES static void scale(typename Compute<T>::type factor, int64_t n, T* x) { scale_run(factor, n, x); }
MEGACTL_GRADIENT_KERNELS(double)
MEGACTL_GRADIENT_KERNELS(float)
MEGACTL_GRADIENT_KERNELS(BFloat16)
MEGACTL_GRADIENT_KERNELS(Float16)
#undef MEGACTL_GRADIENT_KERNELS

}  // namespace megactl::cpu
