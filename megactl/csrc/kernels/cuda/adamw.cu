// CUDA twin of kernels/cpu/adamw.h, over one tensor or a list.
#include "kernels/cuda/adamw.h"
#include "kernels/cuda/lists.cuh"

namespace megactl::cuda {

struct None {};  // no low-precision copy

constexpr int kAdamWChunk = 4096;

template <typename T, typename Low, int N>
__device__ __forceinline__ void update(const AdamW<T>& constants, const AdamWTensor& t, int64_t at) {
    using V = Pack<T, N>;
    const V grad = *reinterpret_cast<const V*>(static_cast<const T*>(t.grad) + at);
    V* const weights = reinterpret_cast<V*>(static_cast<T*>(t.weight) + at);
    V* const averages = reinterpret_cast<V*>(static_cast<T*>(t.exp_avg) + at);
    V* const squares = reinterpret_cast<V*>(static_cast<T*>(t.exp_avg_sq) + at);
    V weight = *weights, average = *averages, square = *squares;
#pragma unroll
    for (int j = 0; j < N; ++j) adamw_element(constants, grad.v[j], weight.v[j], average.v[j], square.v[j]);
    *weights = weight, *averages = average, *squares = square;
    if constexpr (!std::is_same_v<Low, None>) {
        Pack<Low, N> low;
#pragma unroll
        for (int j = 0; j < N; ++j) low.v[j] = store<Low>(static_cast<typename Compute<Low>::type>(weight.v[j]));
        *reinterpret_cast<Pack<Low, N>*>(static_cast<Low*>(t.low) + at) = low;
    }
}

template <typename T, typename Low, int kMost>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ ListTable<AdamWTensor, kMost> table, AdamWScalars scalars, AdamWSettings settings) {
    constexpr int N = 16 / sizeof(T);
    if (*static_cast<const T*>(scalars.skip) != T(0)) return;
    // The powers are taken once a thread block, in double: 1 - beta^step loses most of its digits in float at the first steps.
    __shared__ AdamW<T> shared;
    const double lr = *static_cast<const T*>(scalars.lr);
    if (threadIdx.x == 0) {
        const double step = *static_cast<const T*>(scalars.step), scale = *static_cast<const T*>(scalars.grad_scale);
        shared = adamw_constants<T>(settings, lr, scale, 1.0 - pow(settings.beta1, step), 1.0 - pow(settings.beta2, step));
    }
    __syncthreads();
    AdamW<T> constants = shared;
    for (int64_t i = blockIdx.x; i < table.chunks; i += gridDim.x) {
        const Chunk chunk = find_chunk<kAdamWChunk>(table, i);
        const AdamWTensor t = table.entry[chunk.tensor];
        constants.decay = adamw_decay<T>(lr, t.weight_decay);
        const bool vectors = starts_vector(t.grad) && starts_vector(t.weight) && starts_vector(t.exp_avg) &&
                             starts_vector(t.exp_avg_sq) && starts_vector(t.low);
        const int64_t whole = vectors ? (chunk.end - chunk.begin) / N : 0;
        for (int64_t j = threadIdx.x; j < whole; j += kThreads) update<T, Low, N>(constants, t, chunk.begin + j * N);
        for (int64_t at = chunk.begin + whole * N + threadIdx.x; at < chunk.end; at += kThreads) update<T, Low, 1>(constants, t, at);
    }
}

template <typename T, typename Low>
int launch(const AdamWTensor* tensors, int64_t count, const AdamWScalars& scalars, const AdamWSettings& settings, cudaStream_t stream) {
    const auto with_table = [&](const auto& table) {
        const unsigned blocks = static_cast<unsigned>(table.chunks < 0x7fffffff ? table.chunks : 0x7fffffff);
        adamw_kernel<T, Low><<<blocks, kThreads, 0, stream>>>(table, scalars, settings);
    };
    if (count == 1) {  // a flat buffer: no need to carry a whole table
        for_tables<1, kAdamWChunk>(tensors, count, with_table);
    } else {
        for_tables<kListTensors, kAdamWChunk>(tensors, count, with_table);
    }
    return cudaGetLastError();
}

int adamw(Type type, Type low_type, const AdamWTensor* tensors, int64_t count, const AdamWScalars& scalars, const AdamWSettings& settings,
          void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    // The first tensor may be empty, and then has no address.
    bool low = false;
    for (int64_t i = 0; i < count; ++i) low = low || tensors[i].low != nullptr;
    if (type == Type::kFloat) {
        if (!low) return launch<float, None>(tensors, count, scalars, settings, on);
        if (low_type == Type::kBFloat16) return launch<float, __nv_bfloat16>(tensors, count, scalars, settings, on);
        if (low_type == Type::kFloat16) return launch<float, __half>(tensors, count, scalars, settings, on);
    } else if (type == Type::kDouble) {
        if (!low) return launch<double, None>(tensors, count, scalars, settings, on);
        if (low_type == Type::kFloat) return launch<double, float>(tensors, count, scalars, settings, on);
        if (low_type == Type::kBFloat16) return launch<double, __nv_bfloat16>(tensors, count, scalars, settings, on);
        if (low_type == Type::kFloat16) return launch<double, __half>(tensors, count, scalars, settings, on);
    }
    return cudaErrorInvalidValue;
}

}  // namespace megactl::cuda
