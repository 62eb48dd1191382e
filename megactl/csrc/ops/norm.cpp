// LayerNorm and RMSNorm over the last dimension, alone or behind the addition of a residual.
#include "ops/rows.h"
#include "ops/tensors.h"

#include <algorithm>
#include <tuple>

#include "kernels/cpu/norm.h"
#ifdef USE_CUDA
#include "kernels/cuda/norm.h"
#endif

namespace megactl {
namespace {

// An uninitialised contiguous tensor on the device of `model`. Not
// torch::stable::new_empty, whose way through the dispatcher takes as long as a small norm.
Tensor new_tensor(const Tensor& model, std::vector<int64_t> sizes, ScalarType type) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size(); d > 1; --d) strides[d - 2] = strides[d - 1] * std::max<int64_t>(sizes[d - 1], 1);
    int32_t device = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(model.get(), &device));
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device,
                                                    model.get_device_index(), &made));
    return Tensor(made);
}

Tensor new_like(const Tensor& model) { return new_tensor(model, {model.sizes().begin(), model.sizes().end()}, model.scalar_type()); }

// Inputs of a forward or backward pass. RMSNorm has neither bias nor mean.
struct NormInputs {
    const Tensor &x, &weight;
    int64_t rows, columns;

    NormInputs(const Tensor& x, const Tensor& weight) : x(x), weight(weight), rows(0), columns(0) {
        check_dense(x, "x");
        check_dense(weight, "weight");
        MEGACTL_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "x must have at least one dimension and one column");
        columns = x.size(-1), rows = x.numel() / columns;
        MEGACTL_CHECK(weight.numel() == columns, "weight has ", weight.numel(), " elements, must have ", columns, ", x's last dimension");
        MEGACTL_CHECK(weight.scalar_type() == x.scalar_type() || (weight.scalar_type() == ScalarType::Float && x.element_size() == 2),
                      "weight must have the dtype of x, or be float32 beside a 16-bit x");
        MEGACTL_CHECK(weight.device() == x.device(), "weight must lie on the device of x");
    }

    // The type of the arithmetic, of statistics and of weight gradients.
    ScalarType compute_type() const { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

    Tensor new_statistic() const {
        const auto sizes = x.sizes();
        return new_tensor(x, {sizes.begin(), sizes.end() - 1}, compute_type());
    }

    Tensor new_weight_gradient() const { return new_tensor(x, {columns}, compute_type()); }

    void check_statistic(const Tensor& t, const char* name) const {
        check_dense(t, name);
        MEGACTL_CHECK(t.scalar_type() == compute_type(), name, " must be float32, or float64 beside a float64 x");
        MEGACTL_CHECK(t.numel() == rows, name, " has ", t.numel(), " elements, must have one a row, ", rows);
        MEGACTL_CHECK(t.device() == x.device(), name, " must lie on the device of x");
    }
};

struct NormOutputs {
    Tensor y, sum, mean, rstd;
};

struct NormGradients {
    Tensor x, weight, bias;
};

// ---- CPU ----

// Runs of rows whose weight gradients are summed together: few enough to add up in one go, enough of them for all threads. Fixed by the
// number of rows, so that results do not depend on the number of threads.
int64_t rows_a_run(int64_t rows) { return std::clamp<int64_t>((rows + 63) / 64, 4, 64); }

int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, kGrain / columns); }

template <typename T, typename C>
Rows<C> row_scratch(int64_t columns) {
    return std::is_same_v<T, C> ? nullptr : new_rows<C>(cpu::kScratchRows * columns);
}

void forward_cpu(const NormInputs& in, const Tensor* residual, const Tensor* bias, double epsilon, NormOutputs& out) {
    with_type(in.x, [&](auto zero) {
        using T = decltype(zero);
        using C = typename Compute<T>::type;
        Rows<C> copies[2];
        const C *const weight = wide_copy(in.weight, copies[0], zero), *const shift = bias ? wide_copy(*bias, copies[1], zero) : nullptr;
        const T *const x = const_data<T>(in.x), *const add = residual ? const_data<T>(*residual) : nullptr;
        T *const y = data<T>(out.y), *const sum = residual ? data<T>(out.sum) : nullptr;
        C *const mean = bias ? data<C>(out.mean) : nullptr, *const rstd = data<C>(out.rstd);
        torch::stable::parallel_for(0, in.rows, row_grain(in.columns), [&](int64_t begin, int64_t end) {
            const auto scratch = row_scratch<T, C>(in.columns);
            const int64_t at = begin * in.columns;
            cpu::norm_forward({end - begin, in.columns, weight, shift, static_cast<C>(epsilon), mean ? mean + begin : nullptr,
                               rstd + begin, scratch.get()},
                              x + at, add ? add + at : nullptr, sum ? sum + at : nullptr, y + at);
        });
    });
}

void backward_cpu(const NormInputs& in, const Tensor& grad_y, const Tensor* mean, const Tensor& rstd, const Tensor* grad_sum,
                  NormGradients& out) {
    const int64_t step = rows_a_run(in.rows), runs = (in.rows + step - 1) / step, columns = in.columns;
    with_type(in.x, [&](auto zero) {
        using T = decltype(zero);
        using C = typename Compute<T>::type;
        Rows<C> copy;
        const Rows<C> partial = new_rows<C>((mean ? 2 : 1) * runs * columns);
        const C* const weight = wide_copy(in.weight, copy, zero);
        const T *const gs = const_data<T>(grad_y), *const xs = const_data<T>(in.x), *const add = grad_sum ? const_data<T>(*grad_sum) : nullptr;
        T* const to = data<T>(out.x);
        // The kernels read the statistics and write none.
        C *const means = mean ? const_cast<C*>(const_data<C>(*mean)) : nullptr, *const rstds = const_cast<C*>(const_data<C>(rstd));
        torch::stable::parallel_for(0, runs, std::max<int64_t>(1, row_grain(columns) / step), [&](int64_t begin, int64_t end) {
            const auto scratch = row_scratch<T, C>(columns);
            for (int64_t run = begin; run < end; ++run) {
                const int64_t row = run * step, at = row * columns;
                cpu::norm_backward({std::min(step, in.rows - row), columns, weight, nullptr, C(0), means ? means + row : nullptr, rstds + row,
                                    scratch.get()},
                                   gs + at, xs + at, add ? add + at : nullptr, to + at, partial.get() + run * columns,
                                   mean ? partial.get() + (runs + run) * columns : nullptr);
            }
        });
        C *const grad_weight = data<C>(out.weight), *const grad_bias = mean ? data<C>(out.bias) : nullptr;
        torch::stable::parallel_for(0, columns, std::max<int64_t>(128, kGrain / std::max<int64_t>(1, runs)), [&](int64_t begin, int64_t end) {
            cpu::sum_runs(runs, columns, begin, end, partial.get(), grad_weight);
            if (mean) cpu::sum_runs(runs, columns, begin, end, partial.get() + runs * columns, grad_bias);
        });
    });
}

// ---- CUDA ----

#ifdef USE_CUDA

void forward_cuda(const NormInputs& in, const Tensor* residual, const Tensor* bias, double epsilon, NormOutputs& out) {
    if (in.rows == 0) return;
    const cuda::NormForward tensors{in.rows,
                                    in.columns,
                                    in.x.const_data_ptr(),
                                    residual ? residual->const_data_ptr() : nullptr,
                                    in.weight.const_data_ptr(),
                                    bias ? bias->const_data_ptr() : nullptr,
                                    epsilon,
                                    out.y.mutable_data_ptr(),
                                    residual ? out.sum.mutable_data_ptr() : nullptr,
                                    bias ? out.mean.mutable_data_ptr() : nullptr,
                                    out.rstd.mutable_data_ptr()};
    on_device(in.x, [&](void* on) { return cuda::norm_forward(cuda_type(in.x), cuda_type(in.weight), tensors, on); });
}

void backward_cuda(const NormInputs& in, const Tensor& grad_y, const Tensor* mean, const Tensor& rstd, const Tensor* grad_sum,
                   NormGradients& out) {
    cuda::NormBackward tensors{in.rows,
                               in.columns,
                               grad_y.const_data_ptr(),
                               in.x.const_data_ptr(),
                               in.weight.const_data_ptr(),
                               mean ? mean->const_data_ptr() : nullptr,
                               rstd.const_data_ptr(),
                               grad_sum ? grad_sum->const_data_ptr() : nullptr,
                               out.x.mutable_data_ptr(),
                               out.weight.mutable_data_ptr(),
                               mean ? out.bias.mutable_data_ptr() : nullptr,
                               nullptr};
    on_device(in.x, [&](void* on) {
        const int64_t size = cuda::norm_backward_scratch(cuda_type(in.x), tensors);
        const Tensor scratch = new_tensor(in.x, {size}, in.compute_type());
        tensors.scratch = scratch.mutable_data_ptr();
        return cuda::norm_backward(cuda_type(in.x), cuda_type(in.weight), tensors, on);
    });
}

#endif

// ---- Operators: the same checks and outputs on each device, whose work is done by `run` ----

using RunForward = void (*)(const NormInputs&, const Tensor*, const Tensor*, double, NormOutputs&);
using RunBackward = void (*)(const NormInputs&, const Tensor&, const Tensor*, const Tensor&, const Tensor*, NormGradients&);

template <RunForward run>
NormOutputs forward(const Tensor& x, const Tensor* residual, const Tensor& weight, const Tensor* bias, double epsilon) {
    const NormInputs in(x, weight);
    if (residual) check_twin(*residual, x, "residual");
    if (bias) check_twin(*bias, weight, "bias");
    MEGACTL_CHECK(epsilon >= 0.0, "epsilon = ", epsilon, " must not be negative");
    NormOutputs out{new_like(x), residual ? new_like(x) : Tensor(), bias ? in.new_statistic() : Tensor(), in.new_statistic()};
    run(in, residual, bias, epsilon, out);
    return out;
}

template <RunBackward run>
NormGradients backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor* mean, const Tensor& rstd,
                       const std::optional<Tensor>& grad_sum) {
    const NormInputs in(x, weight);
    check_twin(grad_y, x, "grad_y");
    if (grad_sum) check_twin(*grad_sum, x, "grad_sum");
    if (mean) in.check_statistic(*mean, "mean");
    in.check_statistic(rstd, "rstd");
    NormGradients out{new_like(x), in.new_weight_gradient(), mean ? in.new_weight_gradient() : Tensor()};
    if (in.rows == 0) {
        torch::stable::zero_(out.weight);
        if (mean) torch::stable::zero_(out.bias);
        return out;
    }
    run(in, grad_y, mean, rstd, grad_sum ? &*grad_sum : nullptr, out);
    return out;
}

template <RunForward run>
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Tensor x, Tensor weight, Tensor bias, double epsilon) {
    const NormOutputs out = forward<run>(x, nullptr, weight, &bias, epsilon);
    return {out.y, out.mean, out.rstd};
}

template <RunForward run>
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, double epsilon) {
    const NormOutputs out = forward<run>(x, &residual, weight, &bias, epsilon);
    return {out.y, out.sum, out.mean, out.rstd};
}

template <RunBackward run>
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor mean, Tensor rstd,
                                                       std::optional<Tensor> grad_sum) {
    const NormGradients out = backward<run>(grad_y, x, weight, &mean, rstd, grad_sum);
    return {out.x, out.weight, out.bias};
}

template <RunForward run>
std::tuple<Tensor, Tensor> rms_norm_forward(Tensor x, Tensor weight, double epsilon) {
    const NormOutputs out = forward<run>(x, nullptr, weight, nullptr, epsilon);
    return {out.y, out.rstd};
}

template <RunForward run>
std::tuple<Tensor, Tensor, Tensor> add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, double epsilon) {
    const NormOutputs out = forward<run>(x, &residual, weight, nullptr, epsilon);
    return {out.y, out.sum, out.rstd};
}

template <RunBackward run>
std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, std::optional<Tensor> grad_sum) {
    const NormGradients out = backward<run>(grad_y, x, weight, nullptr, rstd, grad_sum);
    return {out.x, out.weight};
}

}  // namespace

// Statistics and weight gradients are float32 (float64 beside a float64 x) whatever x and weight are. `sum` is x + residual in x's
// dtype; what the backward passes call x is then `sum`, and grad_sum its gradient from elsewhere, which grad_x includes.
STABLE_TORCH_LIBRARY_FRAGMENT(megactl, m) {
    m.def("layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float epsilon) -> (Tensor y, Tensor mean, Tensor rstd)");
    m.def(
        "add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, float epsilon) -> "
        "(Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
    m.def(
        "layer_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor mean, Tensor rstd, Tensor? grad_sum) -> "
        "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
    m.def("rms_norm_forward(Tensor x, Tensor weight, float epsilon) -> (Tensor y, Tensor rstd)");
    m.def("add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor y, Tensor sum, Tensor rstd)");
    m.def(
        "rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, Tensor? grad_sum) -> (Tensor grad_x, Tensor grad_weight)");
}

#define MEGACTL_REGISTER_NORM(DEVICE, FORWARD, BACKWARD)                             \
    STABLE_TORCH_LIBRARY_IMPL(megactl, DEVICE, m) {                                  \
        m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward<FORWARD>));         \
        m.impl("add_layer_norm_forward", TORCH_BOX(&add_layer_norm_forward<FORWARD>)); \
        m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward<BACKWARD>));      \
        m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward<FORWARD>));             \
        m.impl("add_rms_norm_forward", TORCH_BOX(&add_rms_norm_forward<FORWARD>));     \
        m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward<BACKWARD>));          \
    }

MEGACTL_REGISTER_NORM(CPU, forward_cpu, backward_cpu)
#ifdef USE_CUDA
MEGACTL_REGISTER_NORM(CUDA, forward_cuda, backward_cuda)
#endif
#undef MEGACTL_REGISTER_NORM

}  // namespace megactl
