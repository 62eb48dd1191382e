// 16-bit elements to float and back over runs. AVX-512 does it with instructions that compilers do not find in the bit operations of
// dtype.h; both give the same bits (NaN payloads apart).
#pragma once

#include <cstdint>

#include "kernels/cpu/clones.h"
#include "kernels/dtype.h"

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define MEGACTL_AVX512
#endif

namespace megactl::cpu {

template <typename T>
MEGACTL_INLINE void widen_run(int64_t begin, int64_t n, const T* __restrict x, float* __restrict to) {
    for (int64_t i = begin; i < n; ++i) to[i] = load(x[i]);
}
template <typename T>
MEGACTL_INLINE void round_run(int64_t begin, int64_t n, const float* __restrict x, T* __restrict to) {
    for (int64_t i = begin; i < n; ++i) to[i] = Store<T>::from(x[i]);
}

#ifdef MEGACTL_AVX512

// One function a set of instructions; the loader picks, as for MEGACTL_CLONES. The forms with a mask of ones are those whose unused
// operand is not left undefined, which GCC warns of.
#define MEGACTL_FOR(set) __attribute__((target(set), unused)) static void
#define MEGACTL_AVX512_INLINE __attribute__((target("avx512f"), always_inline)) inline
constexpr uint16_t kAllLanes = 0xffff;

MEGACTL_AVX512_INLINE __m512 wide(const Float16*, __m256i bits) { return _mm512_maskz_cvtph_ps(kAllLanes, bits); }
MEGACTL_AVX512_INLINE __m512 wide(const BFloat16*, __m256i bits) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAllLanes, _mm512_maskz_cvtepu16_epi32(kAllLanes, bits), 16));
}
MEGACTL_AVX512_INLINE __m256i narrow(const Float16*, __m512 x) {
    return _mm512_maskz_cvtps_ph(kAllLanes, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MEGACTL_AVX512_INLINE __m256i narrow(const BFloat16*, __m512 x) {
    const __m512i bits = _mm512_castps_si512(x), last = _mm512_and_si512(_mm512_maskz_srli_epi32(kAllLanes, bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    const __m512i rounded = _mm512_maskz_srli_epi32(kAllLanes, sum, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_maskz_cvtepi32_epi16(kAllLanes, _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

#define MEGACTL_CONVERSIONS(T)                                                                                               \
    MEGACTL_FOR("avx512f") widen(int64_t n, const T* x, float* to) {                                                         \
        int64_t i = 0;                                                                                                       \
        for (; i + 16 <= n; i += 16) {                                                                                       \
            _mm512_storeu_ps(to + i, wide(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));                  \
        }                                                                                                                    \
        widen_run(i, n, x, to);                                                                                              \
    }                                                                                                                        \
    MEGACTL_FOR("avx2") widen(int64_t n, const T* x, float* to) { widen_run(0, n, x, to); }                                  \
    MEGACTL_FOR("default") widen(int64_t n, const T* x, float* to) { widen_run(0, n, x, to); }                               \
    MEGACTL_FOR("avx512f") round(int64_t n, const float* x, T* to) {                                                         \
        int64_t i = 0;                                                                                                       \
        for (; i + 16 <= n; i += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), narrow(to, _mm512_loadu_ps(x + i))); \
        round_run(i, n, x, to);                                                                                              \
    }                                                                                                                        \
    MEGACTL_FOR("avx2") round(int64_t n, const float* x, T* to) { round_run(0, n, x, to); }                                  \
    MEGACTL_FOR("default") round(int64_t n, const float* x, T* to) { round_run(0, n, x, to); }
MEGACTL_CONVERSIONS(BFloat16)
MEGACTL_CONVERSIONS(Float16)
#undef MEGACTL_CONVERSIONS
#undef MEGACTL_AVX512_INLINE
#undef MEGACTL_FOR
#undef MEGACTL_AVX512

#else

#define MEGACTL_CONVERSIONS(T)                                                                             \
    MEGACTL_CLONES static void widen(int64_t n, const T* x, float* to) { widen_run(0, n, x, to); }         \
    MEGACTL_CLONES static void round(int64_t n, const float* x, T* to) { round_run(0, n, x, to); }
MEGACTL_CONVERSIONS(BFloat16)
MEGACTL_CONVERSIONS(Float16)
#undef MEGACTL_CONVERSIONS

#endif

}  // namespace megactl::cpu
