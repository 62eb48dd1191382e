// bias + GELU, and its backward with the bias's gradient.
#include "ops/rows.h"
#include "ops/tensors.h"

#include <algorithm>
#include <tuple>

#include "kernels/cpu/gelu.h"
#ifdef USE_CUDA
#include "kernels/cuda/gelu.h"
#endif

namespace megactl {
namespace {

struct Matrix {
    int64_t rows, columns;
};

Matrix checked_gelu(const Tensor& x, const Tensor& bias) {
    check_dense(x, "x");
    check_dense(bias, "bias");
    MEGACTL_CHECK(x.dim() >= 1 && bias.dim() == 1 && bias.size(0) == x.size(-1), "bias must be [f] for x [..., f]: bias has ", bias.numel(),
                  " elements, x ", x.dim() ? x.size(-1) : 0, " columns");
    MEGACTL_CHECK(bias.scalar_type() == x.scalar_type() && bias.device() == x.device(), "bias must have the dtype and device of x");
    return {bias.numel() ? x.numel() / bias.numel() : 0, bias.numel()};
}

ScalarType sum_type(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// ---- CPU ----

Tensor bias_gelu_cpu(Tensor x, Tensor bias, bool tanh) {
    const Matrix shape = checked_gelu(x, bias);
    Tensor y = torch::stable::empty_like(x);
    if (x.numel() == 0) return y;
    with_type(x, [&](auto zero) {
        using T = decltype(zero);
        using C = typename Compute<T>::type;
        Rows<C> copy;
        const C* const add = wide_copy(bias, copy, zero);
        const T* const from = const_data<T>(x);
        T* const to = data<T>(y);
        torch::stable::parallel_for(0, x.numel(), kGrain / 4, [&](int64_t begin, int64_t end) {
            for (int64_t at = begin; at < end;) {
                const int64_t column = at % shape.columns, n = std::min(shape.columns - column, end - at);
                cpu::bias_gelu(tanh, n, from + at, add + column, to + at);
                at += n;
            }
        });
    });
    return y;
}

// Rows whose bias gradients are summed one after the other. The partition follows from the shape alone, so any number of threads
// gives the same bits; 64 blocks keep many threads busy, 16 rows make the partial sums a small part of the traffic.
int64_t rows_a_block(int64_t rows) { return std::max<int64_t>(16, (rows + 63) / 64); }

template <typename T, typename C>
void gelu_backward_blocks(const Matrix& shape, bool tanh, const T* grad, const T* x, const C* bias, T* grad_x, C* sums) {
    const int64_t rows = rows_a_block(shape.rows), blocks = (shape.rows + rows - 1) / rows, n = shape.columns;
    std::vector<C> partial(static_cast<size_t>(blocks * n), C(0));
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / 4 / (rows * n)), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            for (int64_t row = block * rows; row < std::min(shape.rows, (block + 1) * rows); ++row) {
                cpu::bias_gelu_backward(tanh, n, grad + row * n, x + row * n, bias, grad_x + row * n, partial.data() + block * n);
            }
        }
    });
    std::fill(sums, sums + n, C(0));
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t column = 0; column < n; ++column) sums[column] += partial[static_cast<size_t>(block * n + column)];
    }
}

std::tuple<Tensor, Tensor> bias_gelu_backward_cpu(Tensor grad, Tensor x, Tensor bias, bool tanh) {
    const Matrix shape = checked_gelu(x, bias);
    check_twin(grad, x, "grad");
    Tensor grad_x = torch::stable::empty_like(x), grad_bias = torch::stable::new_empty(bias, {shape.columns}, sum_type(x));
    if (shape.columns == 0) return {grad_x, grad_bias};
    with_type(x, [&](auto zero) {
        using T = decltype(zero);
        using C = typename Compute<T>::type;
        Rows<C> copy;
        const C* const add = wide_copy(bias, copy, zero);
        gelu_backward_blocks(shape, tanh, const_data<T>(grad), const_data<T>(x), add, data<T>(grad_x), data<C>(grad_bias));
    });
    return {grad_x, grad_bias};
}

// ---- CUDA ----

#ifdef USE_CUDA

Tensor bias_gelu_cuda(Tensor x, Tensor bias, bool tanh) {
    const Matrix shape = checked_gelu(x, bias);
    Tensor y = torch::stable::empty_like(x);
    if (x.numel() == 0) return y;
    const cuda::Gelu settings{shape.rows, shape.columns, tanh};
    on_device(x, [&](void* on) {
        return cuda::bias_gelu(cuda_type(x), settings, x.const_data_ptr(), bias.const_data_ptr(), y.mutable_data_ptr(), on);
    });
    return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward_cuda(Tensor grad, Tensor x, Tensor bias, bool tanh) {
    const Matrix shape = checked_gelu(x, bias);
    check_twin(grad, x, "grad");
    Tensor grad_x = torch::stable::empty_like(x), grad_bias = torch::stable::new_empty(bias, {shape.columns}, sum_type(x));
    if (shape.columns == 0) return {grad_x, grad_bias};
    const cuda::Gelu settings{shape.rows, shape.columns, tanh};
    Tensor partial = torch::stable::new_empty(bias, {cuda::gelu_row_blocks(settings), shape.columns}, sum_type(x));
    const cuda::GeluBackward tensors{grad.const_data_ptr(),     x.const_data_ptr(),         bias.const_data_ptr(),
                                     grad_x.mutable_data_ptr(), partial.mutable_data_ptr(), grad_bias.mutable_data_ptr()};
    on_device(x, [&](void* on) { return cuda::bias_gelu_backward(cuda_type(x), settings, tensors, on); });
    return {grad_x, grad_bias};
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megactl, m) {
    m.def("bias_gelu(Tensor x, Tensor bias, bool tanh) -> Tensor");
    // The second result is the bias's gradient, in float32 (float64 for double).
    m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, bool tanh) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megactl, CPU, m) {
    m.impl("bias_gelu", TORCH_BOX(&bias_gelu_cpu));
    m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megactl, CUDA, m) {
    m.impl("bias_gelu", TORCH_BOX(&bias_gelu_cuda));
    m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward_cuda));
}
#endif

}  // namespace megactl
