// SwiGLU's activation and its backward.
#include "ops/tensors.h"

#include <algorithm>

#include "kernels/cpu/swiglu.h"
#ifdef USE_CUDA
#include "kernels/cuda/swiglu.h"
#endif

namespace megactl {
namespace {

// Elements f of a gate, for x [..., 2f].
int64_t checked_width(const Tensor& x) {
    check_dense(x, "x");
    MEGACTL_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0, "x must be [..., 2f], gate and up: it has ", x.dim() ? x.size(-1) : 1, " columns");
    return x.size(-1) / 2;
}

void check_grad(const Tensor& grad, const Tensor& x) {
    check_dense(grad, "grad");
    MEGACTL_CHECK(grad.scalar_type() == x.scalar_type() && grad.device() == x.device(), "grad must have the dtype and device of x");
    MEGACTL_CHECK(2 * grad.numel() == x.numel(), "grad has ", grad.numel(), " elements, must have half of x's ", x.numel());
}

Tensor empty_result(const Tensor& x, int64_t width) {
    std::vector<int64_t> shape;
    for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) shape.push_back(x.size(dim));
    shape.push_back(width);
    return torch::stable::new_empty(x, shape);
}

// Calls run(n, at, in) for runs of at most a row: n elements of the result from `at` on, whose gates begin at `in` of x.
template <typename Run>
void over_runs(int64_t elements, int64_t width, const Run& run) {
    torch::stable::parallel_for(0, elements, kGrain / 4, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end;) {
            const int64_t row = at / width, n = std::min((row + 1) * width, end) - at;
            run(n, at, at + row * width);
            at += n;
        }
    });
}

Tensor swiglu_cpu(Tensor x) {
    const int64_t f = checked_width(x);
    Tensor y = empty_result(x, f);
    if (y.numel() == 0) return y;
    with_type(x, [&](auto zero) {
        using T = decltype(zero);
        const T* const from = const_data<T>(x);
        T* const to = data<T>(y);
        over_runs(y.numel(), f, [&](int64_t n, int64_t at, int64_t in) { cpu::swiglu(n, from + in, from + in + f, to + at); });
    });
    return y;
}

Tensor swiglu_backward_cpu(Tensor grad, Tensor x) {
    const int64_t f = checked_width(x);
    check_grad(grad, x);
    Tensor grad_x = torch::stable::empty_like(x);
    if (grad.numel() == 0) return grad_x;
    with_type(x, [&](auto zero) {
        using T = decltype(zero);
        const T *const from = const_data<T>(x), *const grads = const_data<T>(grad);
        T* const to = data<T>(grad_x);
        over_runs(grad.numel(), f, [&](int64_t n, int64_t at, int64_t in) {
            cpu::swiglu_backward(n, grads + at, from + in, from + in + f, to + in, to + in + f);
        });
    });
    return grad_x;
}

#ifdef USE_CUDA

Tensor swiglu_cuda(Tensor x) {
    const int64_t f = checked_width(x);
    Tensor y = empty_result(x, f);
    if (y.numel() == 0) return y;
    on_device(x, [&](void* on) { return cuda::swiglu(cuda_type(x), y.numel() / f, f, x.const_data_ptr(), y.mutable_data_ptr(), on); });
    return y;
}

Tensor swiglu_backward_cuda(Tensor grad, Tensor x) {
    const int64_t f = checked_width(x);
    check_grad(grad, x);
    Tensor grad_x = torch::stable::empty_like(x);
    if (grad.numel() == 0) return grad_x;
    on_device(x, [&](void* on) {
        return cuda::swiglu_backward(cuda_type(x), grad.numel() / f, f, grad.const_data_ptr(), x.const_data_ptr(), grad_x.mutable_data_ptr(), on);
    });
    return grad_x;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megactl, m) {
    m.def("swiglu(Tensor x) -> Tensor");
    m.def("swiglu_backward(Tensor grad, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megactl, CPU, m) {
    m.impl("swiglu", TORCH_BOX(&swiglu_cpu));
    m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megactl, CUDA, m) {
    m.impl("swiglu", TORCH_BOX(&swiglu_cuda));
    m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cuda));
}
#endif

}  // namespace megactl
