// CUDA twins of kernels/cpu/swiglu.h. A thread takes N adjacent columns of some rows: x is in columns along blockIdx.x, rows along blockIdx.y.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/swiglu.h"
#include "kernels/swiglu.h"

namespace megactl::cuda {

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> gated_pack(const T* p) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(int64_t rows, int64_t f, const T* __restrict__ x, T* __restrict__ y) {
    const int64_t column = thread_index() * N, step = static_cast<int64_t>(gridDim.y) * blockDim.y;
    if (column >= f) return;
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += step) {
        const T* const from = x + row * 2 * f + column;
        const Pack<T, N> gate = gated_pack<T, N>(from), up = gated_pack<T, N>(from + f);
        Pack<T, N> out;
#pragma unroll
        for (int j = 0; j < N; ++j) out.v[j] = store<T>(silu(load(gate.v[j])) * load(up.v[j]));
        *reinterpret_cast<Pack<T, N>*>(y + row * f + column) = out;
    }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(int64_t rows, int64_t f, const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ grad_x) {
    using C = typename Compute<T>::type;
    const int64_t column = thread_index() * N, step = static_cast<int64_t>(gridDim.y) * blockDim.y;
    if (column >= f) return;
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += step) {
        const int64_t at = row * 2 * f + column;
        const Pack<T, N> grads = gated_pack<T, N>(grad + row * f + column), gate = gated_pack<T, N>(x + at), up = gated_pack<T, N>(x + at + f);
        Pack<T, N> to_gate, to_up;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const C g = load(gate.v[j]);
            C value;
            const C slope = silu_slope(g, negative_exponential(g), &value);
            to_gate.v[j] = store<T>(load(grads.v[j]) * load(up.v[j]) * slope);
            to_up.v[j] = store<T>(load(grads.v[j]) * value);
        }
        *reinterpret_cast<Pack<T, N>*>(grad_x + at) = to_gate;
        *reinterpret_cast<Pack<T, N>*>(grad_x + at + f) = to_up;
    }
}

// Thread blocks of columns x rows, as many columns side by side as there are; beyond 65535 blocks of rows a thread takes several rows.
struct GatedGrid {
    dim3 grid, block;
    GatedGrid(int64_t rows, int64_t packs) {
        unsigned x = 1;
        while (x < kThreads && x < packs) x *= 2;
        block = dim3(x, kThreads / x);
        const int64_t wanted = (rows + block.y - 1) / block.y;
        grid = dim3(static_cast<unsigned>((packs + x - 1) / x), static_cast<unsigned>(wanted < 65535 ? wanted : 65535));
    }
};

template <typename T>
int swiglu_typed(int64_t rows, int64_t f, const void* x, void* y, void* stream) {
    constexpr int N = 16 / sizeof(T);
    const auto from = static_cast<const T*>(x);
    const auto to = static_cast<T*>(y);
    const auto on = static_cast<cudaStream_t>(stream);
    if (f % N == 0 && aligned(x) && aligned(y)) {
        const GatedGrid shape(rows, f / N);
        swiglu_kernel<T, N><<<shape.grid, shape.block, 0, on>>>(rows, f, from, to);
    } else {
        const GatedGrid shape(rows, f);
        swiglu_kernel<T, 1><<<shape.grid, shape.block, 0, on>>>(rows, f, from, to);
    }
    return cudaGetLastError();
}

template <typename T>
int swiglu_backward_typed(int64_t rows, int64_t f, const void* grad, const void* x, void* grad_x, void* stream) {
    constexpr int N = 16 / sizeof(T);
    const auto grads = static_cast<const T*>(grad);
    const auto from = static_cast<const T*>(x);
    const auto to = static_cast<T*>(grad_x);
    const auto on = static_cast<cudaStream_t>(stream);
    if (f % N == 0 && aligned(grad) && aligned(x) && aligned(grad_x)) {
        const GatedGrid shape(rows, f / N);
        swiglu_backward_kernel<T, N><<<shape.grid, shape.block, 0, on>>>(rows, f, grads, from, to);
    } else {
        const GatedGrid shape(rows, f);
        swiglu_backward_kernel<T, 1><<<shape.grid, shape.block, 0, on>>>(rows, f, grads, from, to);
    }
    return cudaGetLastError();
}

int swiglu(Type type, int64_t rows, int64_t f, const void* x, void* y, void* stream) {
    switch (type) {
        case Type::kDouble:
            return swiglu_typed<double>(rows, f, x, y, stream);
        case Type::kFloat:
            return swiglu_typed<float>(rows, f, x, y, stream);
        case Type::kBFloat16:
            return swiglu_typed<__nv_bfloat16>(rows, f, x, y, stream);
        case Type::kFloat16:
            return swiglu_typed<__half>(rows, f, x, y, stream);
    }
    return cudaErrorInvalidValue;
}

int swiglu_backward(Type type, int64_t rows, int64_t f, const void* grad, const void* x, void* grad_x, void* stream) {
    switch (type) {
        case Type::kDouble:
            return swiglu_backward_typed<double>(rows, f, grad, x, grad_x, stream);
        case Type::kFloat:
            return swiglu_backward_typed<float>(rows, f, grad, x, grad_x, stream);
        case Type::kBFloat16:
            return swiglu_backward_typed<__nv_bfloat16>(rows, f, grad, x, grad_x, stream);
        case Type::kFloat16:
            return swiglu_backward_typed<__half>(rows, f, grad, x, grad_x, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace megactl::cuda
