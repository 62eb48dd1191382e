// The element types of tensors as the CPU kernels see them. Conversions round to nearest, ties to even, are free of branches and
// use integer operations alone, so they vectorise on every instruction set and agree with torch's bit for bit (NaN payloads apart).
#pragma once

#include <cstdint>

#include "kernels/philox.h"

namespace megactl {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// The type arithmetic is done in.
template <typename T>
struct Compute {
    using type = float;
};
template <>
struct Compute<double> {
    using type = double;
};

template <typename T>
MEGACTL_INLINE T load(T x) {
    return x;
}
MEGACTL_INLINE float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
MEGACTL_INLINE float load(Float16 x) {
    // Shifted into float's layout the exponent is short by 112. A subnormal gets a leading 1 that is then subtracted: multiplying by 2^112
    // would be shorter, but x86 takes a hundred times as long over a subnormal factor, and gradients in float16 are full of them.
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
    const uint32_t normal = rest + (112u << 23), tiny = bit_cast<uint32_t>(bit_cast<float>(rest + (113u << 23)) - 6.103515625e-05f);
    const uint32_t finite = rest < 0x00800000u ? tiny : normal;
    return bit_cast<float>(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : finite));
}

template <typename T>
struct Store;
template <>
struct Store<double> {
    static MEGACTL_INLINE double from(double x) { return x; }
};
template <>
struct Store<float> {
    static MEGACTL_INLINE float from(float x) { return x; }
};
template <>
struct Store<BFloat16> {
    static MEGACTL_INLINE BFloat16 from(float x) {
        const uint32_t bits = bit_cast<uint32_t>(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
    }
};
template <>
struct Store<Float16> {
    static MEGACTL_INLINE Float16 from(float x) {
        const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
        // Below 2^-14 the result is subnormal: adding 1/2 puts its last bit at the end of the mantissa, and the FPU rounds.
        const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
        const uint32_t normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
        const uint32_t finite = rest < 0x38800000u ? tiny : normal;
        const uint32_t huge = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
        return {static_cast<uint16_t>(sign | (rest >= 0x47800000u ? huge : finite))};
    }
};

}  // namespace megactl
