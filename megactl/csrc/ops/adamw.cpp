// AdamW over a flat segment, and over many tensors at once.
#include "ops/lists.h"

#include <cmath>

#include "kernels/cpu/adamw.h"
#ifdef USE_CUDA
#include "kernels/cuda/adamw.h"
#endif

namespace megactl {
namespace {

using Tensors = std::vector<Tensor>;

// Scalar tensors of a step.
struct StepScalars {
    const Tensor &lr, &step, &grad_scale, &skip;
};

// `lows` is empty where no tensor has a low-precision copy.
struct AdamWLists {
    const Tensors &masters, &lows, &grads, &exp_avgs, &exp_avg_sqs;
    const std::vector<double>& weight_decays;

    const Tensor* low(size_t i) const { return lows.empty() ? nullptr : &lows[i]; }
};

void check_low(const Tensor& low, const Tensor& master) {
    check_dense(low, "param");
    const auto type = low.scalar_type();
    MEGACTL_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half ||
                      (type == ScalarType::Float && master.scalar_type() == ScalarType::Double),
                  "param must be bfloat16, float16, or float32 beside a float64 master; where it has the master's dtype pass the "
                  "master itself");
    MEGACTL_CHECK(low.numel() == master.numel() && low.device() == master.device(), "param must have the master's size and device");
}

void check_adamw(const AdamWLists& lists, const StepScalars& scalars) {
    const size_t count = lists.masters.size();
    MEGACTL_CHECK(count > 0, "the list of masters must not be empty");
    MEGACTL_CHECK(lists.grads.size() == count && lists.exp_avgs.size() == count && lists.exp_avg_sqs.size() == count &&
                      lists.weight_decays.size() == count && (lists.lows.empty() || lists.lows.size() == count),
                  "masters, grads, exp_avgs, exp_avg_sqs, weight_decays (and params, where there are any) must have one length");
    const Tensor& first = lists.masters[0];
    const auto type = first.scalar_type();
    MEGACTL_CHECK(type == ScalarType::Float || type == ScalarType::Double, "master must be float32 or float64");
    for (size_t i = 0; i < count; ++i) {
        const Tensor& master = lists.masters[i];
        check_dense(master, "master");
        MEGACTL_CHECK(master.scalar_type() == type && master.device() == first.device(), "masters must have one dtype and one device");
        check_twin(lists.grads[i], master, "grad");
        check_twin(lists.exp_avgs[i], master, "exp_avg");
        check_twin(lists.exp_avg_sqs[i], master, "exp_avg_sq");
        if (const Tensor* low = lists.low(i)) {
            check_low(*low, master);
            MEGACTL_CHECK(low->scalar_type() == lists.lows[0].scalar_type(), "params must have one dtype");
        }
    }
    const Tensor* each[] = {&scalars.lr, &scalars.step, &scalars.grad_scale, &scalars.skip};
    for (const Tensor* scalar : each) {
        MEGACTL_CHECK(scalar->numel() == 1 && scalar->scalar_type() == type && scalar->device() == first.device(),
                      "lr, step, grad_scale and skip must be scalar tensors of the master's dtype and device");
    }
}

// ---- CPU ----

// Threads share the elements of all tensors, so that many small ones are split as well as one large one.
template <typename T, typename... Low>
void adamw_cpu_typed(const AdamWLists& lists, const StepScalars& scalars, const AdamWSettings& settings) {
    if (*const_data<T>(scalars.skip) != T(0)) return;
    const double step = *const_data<T>(scalars.step), lr = *const_data<T>(scalars.lr);
    const AdamW<T> shared = adamw_constants<T>(settings, lr, *const_data<T>(scalars.grad_scale), 1.0 - std::pow(settings.beta1, step),
                                               1.0 - std::pow(settings.beta2, step));
    const Spans spans(lists.masters, 1);
    torch::stable::parallel_for(0, spans.total, kGrain, [&](int64_t begin, int64_t end) {
        spans.each(begin, end, [&](int64_t i, int64_t from, int64_t to) {
            AdamW<T> constants = shared;
            constants.decay = adamw_decay<T>(lr, lists.weight_decays[i]);
            cpu::adamw(constants, to - from, const_data<T>(lists.grads[i]) + from, data<T>(lists.masters[i]) + from,
                       data<T>(lists.exp_avgs[i]) + from, data<T>(lists.exp_avg_sqs[i]) + from, (data<Low>(lists.lows[i]) + from)...);
        });
    });
}

template <typename T>
void adamw_cpu_low(const AdamWLists& lists, const StepScalars& scalars, const AdamWSettings& settings) {
    if (lists.lows.empty()) return adamw_cpu_typed<T>(lists, scalars, settings);
    switch (lists.lows[0].scalar_type()) {
        case ScalarType::BFloat16:
            return adamw_cpu_typed<T, BFloat16>(lists, scalars, settings);
        case ScalarType::Half:
            return adamw_cpu_typed<T, Float16>(lists, scalars, settings);
        default:
            if constexpr (std::is_same_v<T, double>) return adamw_cpu_typed<T, float>(lists, scalars, settings);
    }
}

void adamw_cpu(const AdamWLists& lists, const StepScalars& scalars, const AdamWSettings& settings) {
    return lists.masters[0].scalar_type() == ScalarType::Float ? adamw_cpu_low<float>(lists, scalars, settings)
                                                              : adamw_cpu_low<double>(lists, scalars, settings);
}

// ---- CUDA ----

#ifdef USE_CUDA

void adamw_cuda(const AdamWLists& lists, const StepScalars& scalars, const AdamWSettings& settings) {
    std::vector<cuda::AdamWTensor> tensors;
    for (size_t i = 0; i < lists.masters.size(); ++i) {
        const Tensor* const low = lists.low(i);
        tensors.push_back({lists.masters[i].numel(), lists.grads[i].const_data_ptr(), lists.masters[i].mutable_data_ptr(),
                           lists.exp_avgs[i].mutable_data_ptr(), lists.exp_avg_sqs[i].mutable_data_ptr(),
                           low ? low->mutable_data_ptr() : nullptr, lists.weight_decays[i]});
    }
    const cuda::AdamWScalars on_gpu{scalars.lr.const_data_ptr(), scalars.step.const_data_ptr(), scalars.grad_scale.const_data_ptr(),
                                    scalars.skip.const_data_ptr()};
    const Tensor& first = lists.masters[0];
    const auto low_type = cuda_type(lists.lows.empty() ? first : lists.lows[0]);
    const auto count = static_cast<int64_t>(tensors.size());
    on_device(first, [&](void* on) { return cuda::adamw(cuda_type(first), low_type, tensors.data(), count, on_gpu, settings, on); });
}

#endif

// ---- both ----

using Kernel = void (*)(const AdamWLists&, const StepScalars&, const AdamWSettings&);

template <Kernel kKernel>
void adamw_many(Tensors masters, Tensors lows, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensor lr, Tensor step,
                Tensor grad_scale, Tensor skip, double beta1, double beta2, double eps, std::vector<double> weight_decays) {
    const AdamWLists lists{masters, lows, grads, exp_avgs, exp_avg_sqs, weight_decays};
    const StepScalars scalars{lr, step, grad_scale, skip};
    check_adamw(lists, scalars);
    kKernel(lists, scalars, {beta1, beta2, eps});
}

template <Kernel kKernel>
void adamw(Tensor master, std::optional<Tensor> low, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor lr, Tensor step,
           Tensor grad_scale, Tensor skip, double beta1, double beta2, double eps, double weight_decay) {
    const Tensors lows = low ? Tensors{*low} : Tensors{};
    adamw_many<kKernel>({master}, lows, {grad}, {exp_avg}, {exp_avg_sq}, lr, step, grad_scale, skip, beta1, beta2, eps, {weight_decay});
}

}  // namespace

// Scalars that change from step to step are tensors, so that nothing synchronises and a captured graph replays with new values.
STABLE_TORCH_LIBRARY_FRAGMENT(megactl, m) {
    m.def(
        "adamw_(Tensor(a!) master, Tensor(b!)? low, Tensor grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor lr, Tensor step, "
        "Tensor grad_scale, Tensor skip, float beta1, float beta2, float eps, float weight_decay) -> ()");
    m.def(
        "adamw_many_(Tensor(a!)[] masters, Tensor(b!)[] lows, Tensor[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor lr, "
        "Tensor step, Tensor grad_scale, Tensor skip, float beta1, float beta2, float eps, float[] weight_decays) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megactl, CPU, m) {
    m.impl("adamw_", TORCH_BOX(&adamw<&adamw_cpu>));
    m.impl("adamw_many_", TORCH_BOX(&adamw_many<&adamw_cpu>));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megactl, CUDA, m) {
    m.impl("adamw_", TORCH_BOX(&adamw<&adamw_cuda>));
    m.impl("adamw_many_", TORCH_BOX(&adamw_many<&adamw_cuda>));
}
#endif

}  // namespace megactl
