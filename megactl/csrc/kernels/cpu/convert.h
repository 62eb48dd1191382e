// Rows of 16-bit elements to float and back: round to nearest, ties to even, as kernels/dtype.h does element by element.
#pragma once

#include <cstdint>

#include "kernels/cpu/clones.h"
#include "kernels/dtype.h"

#if defined(__x86_64__) && defined(__GLIBC__)
#define MEGACTL_HALF_INSTRUCTIONS
#include <immintrin.h>
#endif

namespace megactl::cpu {

#define MEGACTL_CONVERSIONS(T, NAME)                                                                                 \
    [[maybe_unused]] MEGACTL_CLONES static void widen##NAME(const T* __restrict from, int64_t n, float* __restrict to) { \
        for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);                                                      \
    }                                                                                                               \
    [[maybe_unused]] MEGACTL_CLONES static void narrow##NAME(const float* __restrict from, int64_t n, T* __restrict to) { \
        for (int64_t i = 0; i < n; ++i) to[i] = Store<T>::from(from[i]);                                            \
    }
MEGACTL_CONVERSIONS(BFloat16, )
MEGACTL_CONVERSIONS(Float16, _plain)
#undef MEGACTL_CONVERSIONS

// float16 has instructions of its own, some five times as fast as integer operations; a compiler does not find them in the latter.
#ifdef MEGACTL_HALF_INSTRUCTIONS

__attribute__((target("avx2,f16c"))) inline void widen_f16c(const Float16* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    for (; i < n; ++i) to[i] = load(from[i]);
}

__attribute__((target("avx2,f16c"))) inline void narrow_f16c(const float* from, int64_t n, Float16* to) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < n; ++i) to[i] = Store<Float16>::from(from[i]);
}

inline bool has_f16c() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
#endif

inline void widen(const Float16* from, int64_t n, float* to) {
#ifdef MEGACTL_HALF_INSTRUCTIONS
    if (has_f16c()) return widen_f16c(from, n, to);
#endif
    widen_plain(from, n, to);
}

inline void narrow(const float* from, int64_t n, Float16* to) {
#ifdef MEGACTL_HALF_INSTRUCTIONS
    if (has_f16c()) return narrow_f16c(from, n, to);
#endif
    narrow_plain(from, n, to);
}

}  // namespace megactl::cpu
