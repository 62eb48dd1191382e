// Neighbouring elements that are moved at once and computed with in the type of the arithmetic.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/cuda/common.cuh"

namespace megactl::cuda {

// N elements as they lie in memory. 16-bit ones stay in pairs, a pair in a register: taken apart, each would have a register of
// its own, and joining them for a store would cost more instructions than the arithmetic.
template <typename T, int N, bool kPairs = sizeof(T) == 2 && N % 2 == 0>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) RowPack {
    T v[N];
};
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) RowPack<T, N, true> {
    uint32_t pair[N / 2];
};

// The elements in the type of the arithmetic.
template <typename T, int N, typename C>
__device__ __forceinline__ void widen(const RowPack<T, N>& pack, C (&to)[N]) {
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
        for (int w = 0; w < N / 2; ++w) {
            if constexpr (std::is_same_v<T, __half>) {
                __half2 two;
                memcpy(&two, &pack.pair[w], sizeof two);
                to[2 * w] = __low2float(two), to[2 * w + 1] = __high2float(two);
            } else {
                to[2 * w] = __uint_as_float(pack.pair[w] << 16), to[2 * w + 1] = __uint_as_float(pack.pair[w] & 0xffff0000u);
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) to[j] = load(pack.v[j]);
    }
}

// Rounded to T.
template <typename T, int N, typename C>
__device__ __forceinline__ RowPack<T, N> narrow(const C (&from)[N]) {
    RowPack<T, N> pack;
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
        for (int w = 0; w < N / 2; ++w) {
            if constexpr (std::is_same_v<T, __half>) {
                const __half2 two = __floats2half2_rn(from[2 * w], from[2 * w + 1]);
                memcpy(&pack.pair[w], &two, sizeof two);
            } else {
                const __nv_bfloat162 two = __floats2bfloat162_rn(from[2 * w], from[2 * w + 1]);
                memcpy(&pack.pair[w], &two, sizeof two);
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) pack.v[j] = store<T>(from[j]);
    }
    return pack;
}

// What nobody will read again is the first to leave the caches, and so what is written stays there for who reads that next.
template <typename P>
__device__ __forceinline__ P load_once(const P* from) {
    static_assert(sizeof(P) % 16 == 0, "moved 16 bytes at a time");
    constexpr int kParts = sizeof(P) / 16;
    uint4 parts[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) parts[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
    P pack;
    memcpy(&pack, parts, sizeof pack);
    return pack;
}

}  // namespace megactl::cuda
