// Softmax of masked, scaled attention scores.
#include "ops/tensors.h"

#include <algorithm>

#include "kernels/cpu/softmax.h"
#include "kernels/softmax.h"
#ifdef USE_CUDA
#include "kernels/cuda/softmax.h"
#endif

namespace megactl {
namespace {

// Stride of the mask in a dimension: 0 where it has size 1.
int64_t mask_stride(const Tensor& mask, const Tensor& scores, int64_t dim, int64_t stride) {
    const int64_t size = mask.size(dim);
    MEGACTL_CHECK(size == 1 || size == scores.size(dim), "mask has ", size, " in dimension ", dim, ", must have 1 or ", scores.size(dim));
    return size == 1 ? 0 : stride;
}

Softmax checked_softmax(const Tensor& scores, const std::optional<Tensor>& mask, bool causal, const char* name) {
    check_dense(scores, name);
    MEGACTL_CHECK(scores.dim() == 4, name, " must be [batch, heads, queries, keys], has ", scores.dim(), " dimensions");
    const int64_t rows = scores.size(0) * scores.size(1) * scores.size(2);
    MEGACTL_CHECK(rows < (int64_t{1} << 31), name, " has ", rows, " rows, must have fewer than 2^31: use smaller micro-batches");
    Softmax s{rows, scores.size(1), scores.size(2), scores.size(3), nullptr, 0, 0, 0, causal};
    if (!mask) return s;
    check_dense(*mask, "mask");
    MEGACTL_CHECK(mask->scalar_type() == ScalarType::Bool && mask->device() == scores.device(), "mask must be bool, on the device of ", name);
    MEGACTL_CHECK(mask->dim() == 4 && mask->size(3) == s.keys, "mask must be [batch or 1, heads or 1, queries or 1, ", s.keys, "]");
    s.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    s.mask_query = mask_stride(*mask, scores, 2, s.keys);
    s.mask_head = mask_stride(*mask, scores, 1, mask->size(2) * s.keys);
    s.mask_batch = mask_stride(*mask, scores, 0, mask->size(1) * mask->size(2) * s.keys);
    return s;
}

// ---- CPU ----

// Calls use(row, what it sees, room for `factor` rows) for each row.
template <typename C, typename Use>
void for_each_row(const Softmax& s, int64_t factor, const Use& use) {
    torch::stable::parallel_for(0, s.rows, std::max<int64_t>(1, kGrain / 4 / s.keys), [&](int64_t begin, int64_t end) {
        std::vector<C> room(static_cast<size_t>(factor * s.keys));
        for (int64_t row = begin; row < end; ++row) use(row, sight(s, static_cast<uint32_t>(row)), room.data());
    });
}

Tensor masked_softmax_cpu(Tensor scores, std::optional<Tensor> mask, double scale, bool causal) {
    const Softmax s = checked_softmax(scores, mask, causal, "scores");
    Tensor y = torch::stable::empty_like(scores);
    if (scores.numel() == 0) return y;
    with_type(scores, [&](auto zero) {
        using T = decltype(zero);
        using C = typename Compute<T>::type;
        const T* const from = const_data<T>(scores);
        T* const to = data<T>(y);
        for_each_row<C>(s, 1, [&](int64_t row, const Sight& seen, C* room) {
            cpu::softmax(s.keys, seen.visible, seen.mask, static_cast<C>(scale), from + row * s.keys, room, to + row * s.keys);
        });
    });
    return y;
}

Tensor masked_softmax_backward_cpu(Tensor grad, Tensor y, std::optional<Tensor> mask, double scale, bool causal) {
    const Softmax s = checked_softmax(y, mask, causal, "y");
    check_twin(grad, y, "grad");
    Tensor grad_scores = torch::stable::empty_like(y);
    if (y.numel() == 0) return grad_scores;
    with_type(y, [&](auto zero) {
        using T = decltype(zero);
        using C = typename Compute<T>::type;
        const T *const gs = const_data<T>(grad), *const ys = const_data<T>(y);
        T* const to = data<T>(grad_scores);
        for_each_row<C>(s, 2, [&](int64_t row, const Sight& seen, C* room) {
            const int64_t at = row * s.keys;
            cpu::softmax_backward(s.keys, seen.visible, seen.mask, static_cast<C>(scale), gs + at, ys + at, room, to + at);
        });
    });
    return grad_scores;
}

// ---- CUDA ----

#ifdef USE_CUDA

Tensor masked_softmax_cuda(Tensor scores, std::optional<Tensor> mask, double scale, bool causal) {
    const Softmax s = checked_softmax(scores, mask, causal, "scores");
    Tensor y = torch::stable::empty_like(scores);
    if (scores.numel() == 0) return y;
    on_device(scores, [&](void* on) {
        return cuda::softmax(cuda_type(scores), s, scale, scores.const_data_ptr(), y.mutable_data_ptr(), on);
    });
    return y;
}

Tensor masked_softmax_backward_cuda(Tensor grad, Tensor y, std::optional<Tensor> mask, double scale, bool causal) {
    const Softmax s = checked_softmax(y, mask, causal, "y");
    check_twin(grad, y, "grad");
    Tensor grad_scores = torch::stable::empty_like(y);
    if (y.numel() == 0) return grad_scores;
    on_device(y, [&](void* on) {
        return cuda::softmax_backward(cuda_type(y), s, scale, grad.const_data_ptr(), y.const_data_ptr(), grad_scores.mutable_data_ptr(), on);
    });
    return grad_scores;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megactl, m) {
    // The mask is contiguous [batch or 1, heads or 1, queries or 1, keys].
    m.def("masked_softmax(Tensor scores, Tensor? mask, float scale, bool causal) -> Tensor");
    m.def("masked_softmax_backward(Tensor grad, Tensor y, Tensor? mask, float scale, bool causal) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megactl, CPU, m) {
    m.impl("masked_softmax", TORCH_BOX(&masked_softmax_cpu));
    m.impl("masked_softmax_backward", TORCH_BOX(&masked_softmax_backward_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megactl, CUDA, m) {
    m.impl("masked_softmax", TORCH_BOX(&masked_softmax_cuda));
    m.impl("masked_softmax_backward", TORCH_BOX(&masked_softmax_backward_cuda));
}
#endif

}  // namespace megactl
