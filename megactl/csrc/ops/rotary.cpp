// Rotary position embedding of a packed qkv product, taken apart on the way, and its backward.
#include "ops/rows.h"
#include "ops/tensors.h"

#include <algorithm>
#include <tuple>

#include "kernels/cpu/rotary.h"
#ifdef USE_CUDA
#include "kernels/cuda/rotary.h"
#endif

namespace megactl {
namespace {

struct Apart {
    Tensor q, k, v;
};

struct Packed {
    int64_t batch, positions;
    RotaryShape shape;
    int64_t tokens() const { return batch * positions; }
    int64_t token_elements() const { return shape.groups * (shape.heads + 2) * shape.width; }
};

void check_angles(const Tensor& cos, const Tensor& sin, const Tensor& like, Packed& packed) {
    for (const auto* angles : {&cos, &sin}) {
        check_dense(*angles, "cos or sin");
        MEGACTL_CHECK(angles->dim() == 3 && angles->size(0) == packed.batch && angles->size(1) == packed.positions &&
                          angles->size(2) == cos.size(2) && 2 * angles->size(2) <= packed.shape.width,
                      "cos and sin must be [b, s, w / 2], with w at most the width of a head");
        MEGACTL_CHECK(angles->scalar_type() == ScalarType::Float && angles->device() == like.device(), "cos and sin must be float32 on its device");
    }
    packed.shape.half = cos.size(2);
}

Packed checked_packed(const Tensor& qkv, const Tensor& cos, const Tensor& sin) {
    check_dense(qkv, "qkv");
    MEGACTL_CHECK(qkv.dim() == 5 && qkv.size(3) >= 3 && qkv.size(4) % 2 == 0, "qkv must be [b, s, g, r + 2, d], r at least 1 and d even");
    Packed packed{qkv.size(0), qkv.size(1), {qkv.size(2), qkv.size(3) - 2, qkv.size(4), 0}};
    check_angles(cos, sin, qkv, packed);
    return packed;
}

Packed checked_apart(const Apart& grads, const Tensor& cos, const Tensor& sin) {
    const Tensor& k = grads.k;
    for (const auto* grad : {&grads.q, &grads.k, &grads.v}) {
        MEGACTL_CHECK(grad->dim() == 4 && grad->size(0) == k.size(0) && grad->size(1) == k.size(1) && grad->size(3) == k.size(3),
                      "gradients must be [b, s, heads, d], alike but for their heads");
        MEGACTL_CHECK(grad->scalar_type() == k.scalar_type() && grad->device() == k.device(), "gradients must be of one dtype and device");
        MEGACTL_CHECK(grad->numel() == 0 || grad->stride(3) == 1, "a gradient's rows must be contiguous: call .contiguous()");
    }
    MEGACTL_CHECK(grads.v.size(2) == k.size(2) && k.size(2) > 0 && grads.q.size(2) % k.size(2) == 0 && k.size(3) % 2 == 0,
                  "gradients must be [b, s, g r, d] and twice [b, s, g, d], d even");
    Packed packed{k.size(0), k.size(1), {k.size(2), grads.q.size(2) / k.size(2), k.size(3), 0}};
    check_angles(cos, sin, k, packed);
    return packed;
}

Apart empty_apart(const Tensor& qkv, const Packed& packed) {
    const auto empty = [&](int64_t heads) {
        return torch::stable::new_empty(qkv, {packed.batch, packed.positions, heads, packed.shape.width});
    };
    return {empty(packed.shape.groups * packed.shape.heads), empty(packed.shape.groups), empty(packed.shape.groups)};
}

Tensor empty_packed(const Tensor& like, const Packed& packed) {
    const RotaryShape& shape = packed.shape;
    return torch::stable::new_empty(like, {packed.batch, packed.positions, shape.groups, shape.heads + 2, shape.width});
}

RowStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

template <typename T>
T* token_of(T* base, const RowStrides& strides, int64_t batch, int64_t position) {
    return base + batch * strides.batch + position * strides.position;
}

// ---- CPU ----

template <typename T>
void rotary_tokens(const Packed& packed, bool pack, T* whole, const Apart& apart, const float* cos, const float* sin) {
    using C = typename Compute<T>::type;
    const RotaryShape& shape = packed.shape;
    const RowStrides q = strides_of(apart.q), k = strides_of(apart.k), v = strides_of(apart.v);
    const int64_t grain = std::max<int64_t>(1, kGrain / packed.token_elements());
    torch::stable::parallel_for(0, packed.tokens(), grain, [&](int64_t begin, int64_t end) {
        const Rows<C> rooms = new_rows<C>(2 * shape.half + 1);
        C *const c = rooms.get(), *const s = c + shape.half;
        for (int64_t token = begin; token < end; ++token) {
            const int64_t batch = token / packed.positions, position = token % packed.positions;
            for (int64_t i = 0; i < shape.half; ++i) {
                c[i] = cos[token * shape.half + i];
                s[i] = pack ? -sin[token * shape.half + i] : sin[token * shape.half + i];
            }
            cpu::rotary_token(pack, shape, whole + token * packed.token_elements(), token_of(data<T>(apart.q), q, batch, position), q.head,
                              token_of(data<T>(apart.k), k, batch, position), k.head, token_of(data<T>(apart.v), v, batch, position), v.head, c, s);
        }
    });
}

void rotary_cpu(const Packed& packed, bool pack, const Tensor& whole, const Apart& apart, const Tensor& cos, const Tensor& sin) {
    if (whole.numel() == 0) return;
    with_type(whole, [&](auto zero) {
        using T = decltype(zero);
        rotary_tokens<T>(packed, pack, data<T>(whole), apart, const_data<float>(cos), const_data<float>(sin));
    });
}

// ---- CUDA ----

#ifdef USE_CUDA

void rotary_cuda(const Packed& packed, bool pack, const Tensor& whole, const Apart& apart, const Tensor& cos, const Tensor& sin) {
    if (whole.numel() == 0) return;
    const cuda::Rotary tensors{packed.batch,
                               packed.positions,
                               packed.shape,
                               whole.mutable_data_ptr(),
                               apart.q.mutable_data_ptr(),
                               apart.k.mutable_data_ptr(),
                               apart.v.mutable_data_ptr(),
                               strides_of(apart.q),
                               strides_of(apart.k),
                               strides_of(apart.v),
                               cos.const_data_ptr(),
                               sin.const_data_ptr()};
    on_device(whole, [&](void* on) { return cuda::rotary(cuda_type(whole), tensors, pack, on); });
}

#endif

using Turn = void (*)(const Packed&, bool, const Tensor&, const Apart&, const Tensor&, const Tensor&);

template <Turn kTurn>
std::tuple<Tensor, Tensor, Tensor> rotary_qkv(Tensor qkv, Tensor cos, Tensor sin) {
    const Packed packed = checked_packed(qkv, cos, sin);
    const Apart apart = empty_apart(qkv, packed);
    kTurn(packed, false, qkv, apart, cos, sin);
    return {apart.q, apart.k, apart.v};
}

template <Turn kTurn>
Tensor rotary_qkv_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin) {
    const Apart grads{grad_q, grad_k, grad_v};
    const Packed packed = checked_apart(grads, cos, sin);
    Tensor grad_qkv = empty_packed(grad_k, packed);
    kTurn(packed, true, grad_qkv, grads, cos, sin);
    return grad_qkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megactl, m) {
    m.def("rotary_qkv(Tensor qkv, Tensor cos, Tensor sin) -> (Tensor, Tensor, Tensor)");
    m.def("rotary_qkv_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megactl, CPU, m) {
    m.impl("rotary_qkv", TORCH_BOX(&rotary_qkv<rotary_cpu>));
    m.impl("rotary_qkv_backward", TORCH_BOX(&rotary_qkv_backward<rotary_cpu>));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megactl, CUDA, m) {
    m.impl("rotary_qkv", TORCH_BOX(&rotary_qkv<rotary_cuda>));
    m.impl("rotary_qkv_backward", TORCH_BOX(&rotary_qkv_backward<rotary_cuda>));
}
#endif

}  // namespace megactl
