// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) and the normal deviates made from it.
//
// Shared by the CPU and CUDA kernels and written out in basic operations that IEEE 754 rounds exactly (no libm, no fused
// multiply-add; the build passes -ffp-contract=off and --fmad=false), so every machine draws the same bits.
// Constants of log, sin and cos: FreeBSD msun e_log.c, k_sin.c, k_cos.c (error below one unit in the last place).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MEGACTL_INLINE __host__ __device__ __forceinline__
#define MEGACTL_UNROLL_ROUNDS _Pragma("unroll")
#else
#define MEGACTL_INLINE inline __attribute__((always_inline))
#define MEGACTL_UNROLL_ROUNDS _Pragma("GCC unroll 10")
#endif

namespace megactl {

// One random stream: the words that do not change from element to element.
struct Stream {
    uint32_t key_lo, key_hi;  // seed
    uint32_t stream, step;    // counter words 2 and 3
};

// Counter word 3 of parameter initialisation; no training step may use it.
constexpr uint32_t kInitialisationStep = 0xFFFFFFFFu;

// The four 32-bit words of counter (block, stream, step). Element e of a stream is word e & 3 of block e >> 2.
MEGACTL_INLINE void philox(const Stream& s, uint64_t block, uint32_t out[4]) {
    uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = s.stream, c3 = s.step;
    uint32_t k0 = s.key_lo, k1 = s.key_hi;
    MEGACTL_UNROLL_ROUNDS
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

template <typename To, typename From>
MEGACTL_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// n in [0, 2^52) as a double: exact, and unlike a conversion from uint64_t it vectorises without AVX-512.
MEGACTL_INLINE double small_to_double(uint64_t n) { return bit_cast<double>(n | 0x4330000000000000ull) - 4503599627370496.0; }

// log(n * 2^-32) for n in [1, 2^32].
MEGACTL_INLINE double log_unit(uint64_t n) {
    // The mantissa is brought into [sqrt(1/2), sqrt(2)), where log(1 + f) is f - f^2/2 + s * (f^2/2 + R), s = f / (2 + f).
    const uint64_t bits = bit_cast<uint64_t>(small_to_double(n)) + (0x3ff0000000000000ull - 0x3fe6a09e00000000ull);
    const double k = small_to_double(bits >> 52) - (1023.0 + 32.0);
    const double f = bit_cast<double>((bits & 0x000fffffffffffffull) + 0x3fe6a09e00000000ull) - 1.0;
    const double half_square = 0.5 * f * f, s = f / (2.0 + f), z = s * s, w = z * z;
    const double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    const double odd = z * (6.666666666666735130e-01 +
                            w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    return s * (half_square + (odd + even)) + k * 1.90821492927058770002e-10 - half_square + f + k * 6.93147180369123816490e-01;
}

// cos and sin of 2 pi n / 2^32.
MEGACTL_INLINE void cos_sin_turn(uint32_t n, double* cosine, double* sine) {
    // The nearest quarter turn is taken off in integers, which is exact; the rest lies in [-pi/4, pi/4).
    const uint32_t quarter = (n + 0x20000000u) >> 30;
    const double x = static_cast<double>(static_cast<int32_t>(n - (quarter << 30))) * 1.4629180792671596e-09;
    const double z = x * x, w = z * z;
    const double s_tail = 8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 + z * 2.75573137070700676789e-06) +
                          z * w * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10);
    const double s = x + z * x * (-1.66666666666666324348e-01 + z * s_tail);
    const double c_tail = z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * 2.48015872894767294178e-05)) +
                          w * w * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11));
    const double half = 0.5 * z, rest = 1.0 - half;
    const double c = rest + (((1.0 - rest) - half) + z * c_tail);
    const bool swap = quarter & 1u;
    const double cosine_of = swap ? s : c, sine_of = swap ? c : s;
    *cosine = ((quarter + 1u) & 2u) ? -cosine_of : cosine_of;
    *sine = (quarter & 2u) ? -sine_of : sine_of;
}

#ifdef __CUDACC__
MEGACTL_INLINE double square_root(double x) {
#ifdef __CUDA_ARCH__
    return __dsqrt_rn(x);
#else
    return sqrt(x);
#endif
}
#else
MEGACTL_INLINE double square_root(double x) { return __builtin_sqrt(x); }
#endif

// Two N(0, 1) deviates from two words, by Box and Muller; the first word is mapped to (0, 1], so the logarithm is finite.
MEGACTL_INLINE void box_muller(uint32_t first, uint32_t second, double* z0, double* z1) {
    const double radius = square_root(-2.0 * log_unit(static_cast<uint64_t>(first) + 1u));
    double cosine, sine;
    cos_sin_turn(second, &cosine, &sine);
    *z0 = radius * cosine;
    *z1 = radius * sine;
}

// Dropout keeps an element whose 32 bits are at or above this: floor(p * 2^32). p in [0, 1).
//
// The upper 16 of them are half a word: element e has half e & 1 (the low one first) of word e >> 1, hence of block e >> 3. The lower 16
// are the same half of the stream `drop_ties`, and matter only where the upper ones equal the threshold's, once in 65536: with eight
// elements a block, not four, a GPU draws faster than it reads and writes.
MEGACTL_INLINE uint32_t drop_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

MEGACTL_INLINE Stream drop_ties(Stream s) {
    s.stream ^= 0x80000000u;  // sites are below
    return s;
}

// 16 bits of element `lane` (0 to 7) of a block.
MEGACTL_INLINE uint32_t half_word(const uint32_t words[4], int lane) { return words[lane >> 1] >> 16 * (lane & 1) & 0xffffu; }

}  // namespace megactl
