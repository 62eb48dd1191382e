// CUDA twin of kernels/cpu/rotary.h. A thread block takes one token at a time, a thread N elements and the N they are turned against.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/rotary.h"

namespace megactl::cuda {

template <typename T>
__device__ __forceinline__ T* row_of(void* base, const RowStrides& strides, int64_t batch, int64_t position, int64_t head) {
    return static_cast<T*>(base) + batch * strides.batch + position * strides.position + head * strides.head;
}

template <typename T, int N, bool kPack>
__global__ void __launch_bounds__(kThreads) rotary_kernel(Rotary t) {
    using C = typename Compute<T>::type;
    const RotaryShape shape = t.shape;
    const unsigned half_units = static_cast<unsigned>(shape.half / N), row_units = static_cast<unsigned>(shape.width / 2 / N);
    const unsigned slots = static_cast<unsigned>(shape.heads + 2), units = static_cast<unsigned>(shape.groups) * slots * row_units;
    for (int64_t token = blockIdx.x; token < t.batch * t.positions; token += gridDim.x) {
        const int64_t batch = token / t.positions, position = token % t.positions;
        for (unsigned unit = threadIdx.x; unit < units; unit += blockDim.x) {
            const unsigned row = unit / row_units, part = unit % row_units, group = row / slots, slot = row % slots;
            T* const packed = static_cast<T*>(t.packed) + (token * shape.groups * slots + row) * shape.width;
            T* const apart = slot < shape.heads    ? row_of<T>(t.q, t.q_strides, batch, position, group * shape.heads + slot)
                             : slot == shape.heads ? row_of<T>(t.k, t.k_strides, batch, position, group)
                                                   : row_of<T>(t.v, t.v_strides, batch, position, group);
            const T* const from = kPack ? apart : packed;
            T* const to = kPack ? packed : apart;
            const bool turns = slot <= shape.heads && part < half_units;
            // What is not turned, the end of a row or all of a value, is copied two packs at a time.
            const int64_t low = turns || slot > shape.heads ? static_cast<int64_t>(part) * N * (turns ? 1 : 2)
                                                            : 2 * shape.half + 2 * static_cast<int64_t>(part - half_units) * N;
            const int64_t high = turns ? low + shape.half : low + N;
            Pack<T, N> first = *reinterpret_cast<const Pack<T, N>*>(from + low), second = *reinterpret_cast<const Pack<T, N>*>(from + high);
            if (turns) {
                const int64_t at = token * shape.half + low;
                const Pack<float, N> cos = *reinterpret_cast<const Pack<float, N>*>(static_cast<const float*>(t.cos) + at);
                const Pack<float, N> sin = *reinterpret_cast<const Pack<float, N>*>(static_cast<const float*>(t.sin) + at);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    const C a = load(first.v[j]), b = load(second.v[j]), c = cos.v[j], s = kPack ? -sin.v[j] : sin.v[j];
                    first.v[j] = store<T>(a * c - b * s);
                    second.v[j] = store<T>(b * c + a * s);
                }
            }
            *reinterpret_cast<Pack<T, N>*>(to + low) = first;
            *reinterpret_cast<Pack<T, N>*>(to + high) = second;
        }
    }
}

inline bool whole_packs(const RowStrides& strides, int64_t n) {
    return strides.batch % n == 0 && strides.position % n == 0 && strides.head % n == 0;
}

template <typename T, int N, bool kPack>
int launch_rotary(const Rotary& t, cudaStream_t stream) {
    const int64_t units = t.shape.groups * (t.shape.heads + 2) * (t.shape.width / 2 / N);
    // As few idle threads as there can be: a token's units over the fewest rounds of a block, in whole warps.
    const int64_t rounds = (units + kThreads - 1) / kThreads, threads = ((units + rounds - 1) / rounds + 31) / 32 * 32;
    const int64_t tokens = t.batch * t.positions, most = 1 << 20;
    rotary_kernel<T, N, kPack><<<static_cast<unsigned>(tokens < most ? tokens : most), static_cast<unsigned>(threads), 0, stream>>>(t);
    return cudaGetLastError();
}

template <typename T>
int rotary_typed(const Rotary& t, bool pack, void* stream) {
    constexpr int N = 16 / sizeof(T);
    const bool vectors = t.shape.half % N == 0 && t.shape.width % (2 * N) == 0 && aligned(t.packed) && aligned(t.q) && aligned(t.k) &&
                         aligned(t.v) && aligned(t.cos) && aligned(t.sin) && whole_packs(t.q_strides, N) && whole_packs(t.k_strides, N) &&
                         whole_packs(t.v_strides, N);
    const auto launch = vectors ? (pack ? launch_rotary<T, N, true> : launch_rotary<T, N, false>)
                                : (pack ? launch_rotary<T, 1, true> : launch_rotary<T, 1, false>);
    return launch(t, static_cast<cudaStream_t>(stream));
}

int rotary(Type type, const Rotary& tensors, bool pack, void* stream) {
    switch (type) {
        case Type::kDouble:
            return rotary_typed<double>(tensors, pack, stream);
        case Type::kFloat:
            return rotary_typed<float>(tensors, pack, stream);
        case Type::kBFloat16:
            return rotary_typed<__nv_bfloat16>(tensors, pack, stream);
        case Type::kFloat16:
            return rotary_typed<__half>(tensors, pack, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace megactl::cuda
