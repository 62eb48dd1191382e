// CUDA twin of kernels/cpu/adamw.h.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/adamw.h"

namespace megactl::cuda {

struct None {};  // no low-precision copy

// A work item is N consecutive elements.
template <typename T, typename Low, int N>
__global__ void adamw_kernel(AdamWTensors t, AdamWSettings settings, int64_t items) {
    if (*static_cast<const T*>(t.skip) != T(0)) return;
    // The powers are taken once a thread block, in double: 1 - beta^step loses most of its digits in float at the first steps.
    __shared__ AdamW<T> shared;
    if (threadIdx.x == 0) {
        const double step = *static_cast<const T*>(t.step), lr = *static_cast<const T*>(t.lr), scale = *static_cast<const T*>(t.grad_scale);
        shared = adamw_constants<T>(settings, lr, scale, 1.0 - pow(settings.beta1, step), 1.0 - pow(settings.beta2, step));
    }
    __syncthreads();
    const AdamW<T> constants = shared;
    const auto grads = static_cast<const Pack<T, N>*>(t.grad);
    const auto weights = static_cast<Pack<T, N>*>(t.weight), averages = static_cast<Pack<T, N>*>(t.exp_avg),
               squares = static_cast<Pack<T, N>*>(t.exp_avg_sq);
    for (int64_t i = thread_index(); i < items; i += thread_count()) {
        const Pack<T, N> grad = grads[i];
        Pack<T, N> weight = weights[i], average = averages[i], square = squares[i];
#pragma unroll
        for (int j = 0; j < N; ++j) adamw_element(constants, grad.v[j], weight.v[j], average.v[j], square.v[j]);
        weights[i] = weight, averages[i] = average, squares[i] = square;
        if constexpr (!std::is_same_v<Low, None>) {
            Pack<Low, N> low;
#pragma unroll
            for (int j = 0; j < N; ++j) low.v[j] = store<Low>(static_cast<typename Compute<Low>::type>(weight.v[j]));
            static_cast<Pack<Low, N>*>(t.low)[i] = low;
        }
    }
}

template <typename T, typename Low>
int launch(const AdamWTensors& t, const AdamWSettings& settings, void* stream) {
    constexpr int N = 16 / sizeof(T);
    const bool vectors = t.n % N == 0 && aligned(t.grad) && aligned(t.weight) && aligned(t.exp_avg) && aligned(t.exp_avg_sq) && aligned(t.low);
    const int64_t items = vectors ? t.n / N : t.n;
    // A few thousand thread blocks fill any GPU; more would only repeat the powers.
    const unsigned blocks = blocks_for(items, 4096);
    const auto on = static_cast<cudaStream_t>(stream);
    if (vectors) {
        adamw_kernel<T, Low, N><<<blocks, kThreads, 0, on>>>(t, settings, items);
    } else {
        adamw_kernel<T, Low, 1><<<blocks, kThreads, 0, on>>>(t, settings, items);
    }
    return cudaGetLastError();
}

template <typename T>
int dispatch_low(Type low_type, const AdamWTensors& t, const AdamWSettings& settings, void* stream) {
    if (t.low == nullptr) return launch<T, None>(t, settings, stream);
    if (low_type == Type::kBFloat16) return launch<T, __nv_bfloat16>(t, settings, stream);
    if (low_type == Type::kFloat16) return launch<T, __half>(t, settings, stream);
    if constexpr (std::is_same_v<T, double>) {
        if (low_type == Type::kFloat) return launch<T, float>(t, settings, stream);
    }
    return cudaErrorInvalidValue;
}

int adamw(Type type, Type low_type, const AdamWTensors& tensors, const AdamWSettings& settings, void* stream) {
    if (type == Type::kFloat) return dispatch_low<float>(low_type, tensors, settings, stream);
    if (type == Type::kDouble) return dispatch_low<double>(low_type, tensors, settings, stream);
    return cudaErrorInvalidValue;
}

}  // namespace megactl::cuda
