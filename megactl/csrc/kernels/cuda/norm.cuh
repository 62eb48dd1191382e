// What the forward and backward kernels of LayerNorm and RMSNorm share.
//
// A row is worked on by blockDim.x threads, a multiple of a warp; where that is one warp or few, a thread block has several rows beside
// each other, threadIdx.y. A thread holds every blockDim.x-th pack of N elements, so that a warp reads consecutive packs.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/norm.h"
#include "kernels/cuda/packs.cuh"
#include "kernels/norm.h"

namespace megactl::cuda {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;  // of a thread block

// Partial sums of the warps of a thread block.
template <int K, typename C>
struct WarpSums {
    C v[K][kMostThreads / kWarp];
};

// Replaces each thread's `v` by its sum over the row. Trees of fixed shape: the same bits in every run, and in every thread.
// All threads of the block must come here, unless a row is one warp. `shared` must not be the one of the call before.
template <int K, typename C>
__device__ __forceinline__ void row_sums(C (&v)[K], WarpSums<K, C>& shared) {
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) {
#pragma unroll
        for (int k = 0; k < K; ++k) v[k] += __shfl_xor_sync(0xffffffffu, v[k], lane);
    }
    const int warps = blockDim.x / kWarp;
    if (warps == 1) return;
    const int lane = threadIdx.x % kWarp, first = threadIdx.y * warps;
    if (lane == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) shared.v[k][first + threadIdx.x / kWarp] = v[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = lane < warps ? shared.v[k][first + lane] : C(0);
    int half = kWarp / 2;
    while (half >= warps) half /= 2;  // lanes past the last warp hold zeros
    for (; half > 0; half /= 2) {
#pragma unroll
        for (int k = 0; k < K; ++k) v[k] += __shfl_xor_sync(0xffffffffu, v[k], half);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = __shfl_sync(0xffffffffu, v[k], 0);
}

// Makes the compiler widen 16-bit elements again where they are used next: to keep them widened between two passes over a row takes
// twice the registers, hence half the threads in flight.
template <typename T, int N>
__device__ __forceinline__ void stay_packed(RowPack<T, N>& pack) {
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
        for (int w = 0; w < N / 2; ++w) asm volatile("" : "+r"(pack.pair[w]));
    }
}

// N weights. Parameters may lie anywhere in a flat buffer; where they are not aligned they are read one by one, from the cache.
template <int N, typename W, typename C>
__device__ __forceinline__ void load_weights(const W* from, bool vectors, C (&to)[N]) {
    if (vectors) {
        widen(*reinterpret_cast<const RowPack<W, N>*>(from), to);
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) to[j] = load(from[j]);
    }
}

inline int round_to_warps(int64_t threads) { return static_cast<int>((threads + kWarp - 1) / kWarp * kWarp); }

// Calls use(T{}, W{}) with the types of rows and weights.
template <typename Use>
int with_types(Type type, Type weight_type, const Use& use) {
    const bool same = type == weight_type;
    if (!same && weight_type != Type::kFloat) return cudaErrorInvalidValue;
    switch (type) {
        case Type::kDouble:
            return same ? use(double{}, double{}) : static_cast<int>(cudaErrorInvalidValue);
        case Type::kFloat:
            return use(float{}, float{});
        case Type::kBFloat16:
            return same ? use(__nv_bfloat16{}, __nv_bfloat16{}) : use(__nv_bfloat16{}, float{});
        case Type::kFloat16:
            return same ? use(__half{}, __half{}) : use(__half{}, float{});
    }
    return cudaErrorInvalidValue;
}

}  // namespace megactl::cuda
