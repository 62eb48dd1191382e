// Element types and launch shapes of the CUDA kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/types.h"

namespace megactl::cuda {

template <typename T>
struct Compute {
    using type = float;
};
template <>
struct Compute<double> {
    using type = double;
};

__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float load(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T store(typename Compute<T>::type x);
template <>
__device__ __forceinline__ double store<double>(double x) {
    return x;
}
template <>
__device__ __forceinline__ float store<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 store<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half store<__half>(float x) {
    return __float2half_rn(x);
}

// N elements moved at once. 16 bytes is the widest single access.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    T v[N];
};

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

constexpr int kThreads = 256;

// Thread blocks for n work items of a grid-stride loop.
inline unsigned blocks_for(int64_t n, int64_t most = 0x7fffffff) {
    const int64_t wanted = (n + kThreads - 1) / kThreads;
    return static_cast<unsigned>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

// Multiprocessors of the current device.
inline int processors() {
    int device = 0, count = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

__device__ __forceinline__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

}  // namespace megactl::cuda
