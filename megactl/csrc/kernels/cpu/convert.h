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

#define MEGACTL_CONVERSIONS(T)                                                                                              \
    [[maybe_unused]] MEGACTL_CLONES static void widen_plain(const T* __restrict from, int64_t n, float* __restrict to) {    \
        for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);                                                              \
    }                                                                                                                       \
    [[maybe_unused]] MEGACTL_CLONES static void narrow_plain(const float* __restrict from, int64_t n, T* __restrict to) {   \
        for (int64_t i = 0; i < n; ++i) to[i] = Store<T>::from(from[i]);                                                    \
    }
MEGACTL_CONVERSIONS(BFloat16)
MEGACTL_CONVERSIONS(Float16)
#undef MEGACTL_CONVERSIONS

// Two to five times as fast: float16 has instructions of its own, and in AVX-512 16 lanes are cut to 16 bits by one; a compiler finds
// neither in the loops above.
#ifdef MEGACTL_HALF_INSTRUCTIONS

#define MEGACTL_F16C __attribute__((target("avx2,f16c"))) inline
#define MEGACTL_AVX512 __attribute__((target("avx512f"))) inline

MEGACTL_F16C void widen_f16c(const Float16* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    for (; i < n; ++i) to[i] = load(from[i]);
}

MEGACTL_F16C void narrow_f16c(const float* from, int64_t n, Float16* to) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < n; ++i) to[i] = Store<Float16>::from(from[i]);
}

// The forms with a mask of ones are those that leave no operand undefined, which GCC warns of.
constexpr uint16_t kAllLanes = 0xffff;

MEGACTL_AVX512 __m512 wide(const Float16*, __m256i bits) { return _mm512_maskz_cvtph_ps(kAllLanes, bits); }
MEGACTL_AVX512 __m512 wide(const BFloat16*, __m256i bits) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAllLanes, _mm512_maskz_cvtepu16_epi32(kAllLanes, bits), 16));
}
MEGACTL_AVX512 __m256i cut(const Float16*, __m512 x) { return _mm512_maskz_cvtps_ph(kAllLanes, x, _MM_FROUND_TO_NEAREST_INT); }
MEGACTL_AVX512 __m256i cut(const BFloat16*, __m512 x) {
    const __m512i bits = _mm512_castps_si512(x), half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16)), number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    const __m512i sum = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_maskz_srli_epi32(kAllLanes, sum, 16);
    return _mm512_mask_cvtepi32_epi16(_mm256_set1_epi16(0x7fc0), number, rounded);
}

template <typename T>
MEGACTL_AVX512 void widen_avx512(const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(to + i, wide(from, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
    for (; i < n; ++i) to[i] = load(from[i]);
}

template <typename T>
MEGACTL_AVX512 void narrow_avx512(const float* from, int64_t n, T* to) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), cut(to, _mm512_loadu_ps(from + i)));
    for (; i < n; ++i) to[i] = Store<T>::from(from[i]);
}

#undef MEGACTL_F16C
#undef MEGACTL_AVX512

inline bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
inline bool has_f16c() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
#endif

inline void widen(const BFloat16* from, int64_t n, float* to) {
#ifdef MEGACTL_HALF_INSTRUCTIONS
    if (has_avx512()) return widen_avx512(from, n, to);
#endif
    widen_plain(from, n, to);
}

inline void widen(const Float16* from, int64_t n, float* to) {
#ifdef MEGACTL_HALF_INSTRUCTIONS
    if (has_avx512()) return widen_avx512(from, n, to);
    if (has_f16c()) return widen_f16c(from, n, to);
#endif
    widen_plain(from, n, to);
}

inline void narrow(const float* from, int64_t n, BFloat16* to) {
#ifdef MEGACTL_HALF_INSTRUCTIONS
    if (has_avx512()) return narrow_avx512(from, n, to);
#endif
    narrow_plain(from, n, to);
}

inline void narrow(const float* from, int64_t n, Float16* to) {
#ifdef MEGACTL_HALF_INSTRUCTIONS
    if (has_avx512()) return narrow_avx512(from, n, to);
    if (has_f16c()) return narrow_f16c(from, n, to);
#endif
    narrow_plain(from, n, to);
}

}  // namespace megactl::cpu
