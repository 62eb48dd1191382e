// AdamW over a flat segment.
#include "ops/tensors.h"

#include <cmath>

#include "kernels/cpu/adamw.h"
#ifdef USE_CUDA
#include "kernels/cuda/adamw.h"
#endif

namespace megactl {
namespace {

struct AdamWArguments {
    const Tensor &master, &grad, &exp_avg, &exp_avg_sq, &lr, &step, &grad_scale, &skip;
    const std::optional<Tensor>& low;
};

void check_adamw(const AdamWArguments& a) {
    const auto type = a.master.scalar_type();
    check_dense(a.master, "master");
    MEGACTL_CHECK(type == ScalarType::Float || type == ScalarType::Double, "master must be float32 or float64");
    check_twin(a.grad, a.master, "grad");
    check_twin(a.exp_avg, a.master, "exp_avg");
    check_twin(a.exp_avg_sq, a.master, "exp_avg_sq");
    const Tensor* scalars[] = {&a.lr, &a.step, &a.grad_scale, &a.skip};
    for (const Tensor* scalar : scalars) {
        MEGACTL_CHECK(scalar->numel() == 1 && scalar->scalar_type() == type && scalar->device() == a.master.device(),
                        "lr, step, grad_scale and skip must be scalar tensors of the master's dtype and device");
    }
    if (!a.low) return;
    check_dense(*a.low, "param");
    const auto low = a.low->scalar_type();
    MEGACTL_CHECK(low == ScalarType::BFloat16 || low == ScalarType::Half || (low == ScalarType::Float && type == ScalarType::Double),
                    "param must be bfloat16, float16, or float32 beside a float64 master; where it has the master's dtype pass the master itself");
    MEGACTL_CHECK(a.low->numel() == a.master.numel() && a.low->device() == a.master.device(),
                    "param must have the master's size and device");
}

// ---- CPU ----

template <typename T, typename... Low>
void adamw_cpu_typed(const AdamWArguments& a, const AdamWSettings& settings, Low*... low) {
    const double step = *const_data<T>(a.step);
    const AdamW<T> constants = adamw_constants<T>(settings, *const_data<T>(a.lr), *const_data<T>(a.grad_scale),
                                                  1.0 - std::pow(settings.beta1, step), 1.0 - std::pow(settings.beta2, step));
    const T* const grad = const_data<T>(a.grad);
    T *const weight = data<T>(a.master), *const exp_avg = data<T>(a.exp_avg), *const exp_avg_sq = data<T>(a.exp_avg_sq);
    torch::stable::parallel_for(0, a.master.numel(), kGrain, [&](int64_t begin, int64_t end) {
        cpu::adamw(constants, end - begin, grad + begin, weight + begin, exp_avg + begin, exp_avg_sq + begin, low + begin...);
    });
}

template <typename T>
void adamw_cpu_low(const AdamWArguments& a, const AdamWSettings& settings) {
    if (*const_data<T>(a.skip) != T(0)) return;
    if (!a.low) return adamw_cpu_typed<T>(a, settings);
    switch (a.low->scalar_type()) {
        case ScalarType::BFloat16:
            return adamw_cpu_typed<T>(a, settings, data<BFloat16>(*a.low));
        case ScalarType::Half:
            return adamw_cpu_typed<T>(a, settings, data<Float16>(*a.low));
        default:
            if constexpr (std::is_same_v<T, double>) return adamw_cpu_typed<T>(a, settings, data<float>(*a.low));
    }
}

void adamw_cpu(Tensor master, std::optional<Tensor> low, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor lr, Tensor step,
               Tensor grad_scale, Tensor skip, double beta1, double beta2, double eps, double weight_decay) {
    const AdamWArguments a{master, grad, exp_avg, exp_avg_sq, lr, step, grad_scale, skip, low};
    check_adamw(a);
    const AdamWSettings settings{beta1, beta2, eps, weight_decay};
    return master.scalar_type() == ScalarType::Float ? adamw_cpu_low<float>(a, settings) : adamw_cpu_low<double>(a, settings);
}

// ---- CUDA ----

#ifdef USE_CUDA

void adamw_cuda(Tensor master, std::optional<Tensor> low, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor lr, Tensor step,
                Tensor grad_scale, Tensor skip, double beta1, double beta2, double eps, double weight_decay) {
    check_adamw({master, grad, exp_avg, exp_avg_sq, lr, step, grad_scale, skip, low});
    if (master.numel() == 0) return;
    const cuda::AdamWTensors tensors{master.numel(),
                                     grad.const_data_ptr(),
                                     master.mutable_data_ptr(),
                                     exp_avg.mutable_data_ptr(),
                                     exp_avg_sq.mutable_data_ptr(),
                                     low ? low->mutable_data_ptr() : nullptr,
                                     lr.const_data_ptr(),
                                     step.const_data_ptr(),
                                     grad_scale.const_data_ptr(),
                                     skip.const_data_ptr()};
    const auto low_type = cuda_type(low ? *low : master);
    on_device(master,
              [&](void* on) { return cuda::adamw(cuda_type(master), low_type, tensors, {beta1, beta2, eps, weight_decay}, on); });
}

#endif

}  // namespace

// Scalars that change from step to step are tensors, so that nothing synchronises and a captured graph replays with new values.
STABLE_TORCH_LIBRARY_FRAGMENT(megactl, m) {
    m.def(
        "adamw_(Tensor(a!) master, Tensor(b!)? low, Tensor grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor lr, Tensor step, "
        "Tensor grad_scale, Tensor skip, float beta1, float beta2, float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megactl, CPU, m) { m.impl("adamw_", TORCH_BOX(&adamw_cpu)); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megactl, CUDA, m) { m.impl("adamw_", TORCH_BOX(&adamw_cuda)); }
#endif

}  // namespace megactl
