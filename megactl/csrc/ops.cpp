// The one file that includes torch, and of torch only its stable ABI: operator schemas, checks, and their CPU and CUDA kernels.
// Fake and autograd registration, and the reference in plain torch, are in megactl/engine/ops.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cpu/adamw.h"
#include "kernels/cpu/random.h"
#include "kernels/rectangle.h"
#ifdef USE_CUDA
#include "kernels/cuda/launch.h"
#endif

namespace megactl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Checks that throw, with a message of strings and numbers. Not STD_TORCH_CHECK: that one writes through std::ostringstream, whose locale
// tables are a second copy where a toolchain links libstdc++ statically into extensions, and it then crashes on the first number.
std::string text(const char* value) { return value; }
std::string text(double value) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", value);
    return digits;
}
template <typename T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
std::string text(T value) {
    return std::to_string(value);
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::string message;
    ((message += text(parts)), ...);
    throw std::runtime_error(message);
}

#define MEGACTL_CHECK(condition, ...)    \
    do {                                 \
        if (!(condition)) {              \
            fail(__VA_ARGS__);           \
        }                                \
    } while (false)

// Work a thread should have before another one is woken: some 20 microseconds.
constexpr int64_t kGrain = 1 << 15;

Stream make_stream(int64_t seed, int64_t stream, int64_t step) {
    const auto key = static_cast<uint64_t>(seed);
    return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(stream), static_cast<uint32_t>(step)};
}

void check_dense(const Tensor& t, const char* name) { MEGACTL_CHECK(t.is_contiguous(), name, " must be contiguous: call .contiguous()"); }

void check_twin(const Tensor& t, const Tensor& model, const char* name) {
    check_dense(t, name);
    MEGACTL_CHECK(t.scalar_type() == model.scalar_type(), name, " must have the dtype of the tensor it goes with");
    MEGACTL_CHECK(t.numel() == model.numel(), name, " has ", t.numel(), " elements, must have ", model.numel());
    MEGACTL_CHECK(t.device() == model.device(), name, " must lie on the device of the tensor it goes with");
}

// Calls use(T{}) with the element type of `t` as the CPU kernels name it.
template <typename Use>
void with_type(const Tensor& t, const Use& use) {
    switch (t.scalar_type()) {
        case ScalarType::Double:
            return use(double{});
        case ScalarType::Float:
            return use(float{});
        case ScalarType::BFloat16:
            return use(BFloat16{});
        case ScalarType::Half:
            return use(Float16{});
        default:
            MEGACTL_CHECK(false, "dtype must be float64, float32, bfloat16 or float16");
    }
}

template <typename T>
T* data(const Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
}

// ---- checks shared by the devices ----

void check_bits(const Tensor& out) {
    check_dense(out, "out");
    MEGACTL_CHECK(out.scalar_type() == ScalarType::Long, "out must be int64: a word is unsigned 32 bits");
}

Rectangle checked_rectangle(const Tensor& out, const std::vector<int64_t>& logical, const std::vector<int64_t>& first) {
    check_dense(out, "out");
    const auto held = out.sizes();
    MEGACTL_CHECK(logical.size() == held.size() && first.size() == held.size(), "logical_shape and rectangle must have ", held.size(),
                    " dimensions, as out has");
    MEGACTL_CHECK(held.size() <= kMaxDims, "at most ", kMaxDims, " dimensions");
    for (size_t d = 0; d < held.size(); ++d) {
        MEGACTL_CHECK(first[d] >= 0 && first[d] + held[d] <= logical[d], "dimension ", d, " of the rectangle, [", first[d], ", ",
                        first[d] + held[d], "), leaves the logical shape, which has ", logical[d]);
    }
    return make_rectangle(static_cast<int>(held.size()), logical.data(), first.data(), held.data());
}

// Local and whole sizes of dropout's [batch, outer, *inner].
struct DropoutShape {
    int64_t batch, outer, inner, outer_offset, outer_size;
};

DropoutShape checked_dropout(const Tensor& x, const std::optional<Tensor>& residual, double p, const Tensor& rng, int64_t outer_offset,
                             int64_t outer_size) {
    check_dense(x, "x");
    if (residual) check_twin(*residual, x, "residual");
    MEGACTL_CHECK(x.dim() >= 2, "x must be [batch, outer, *inner], has ", x.dim(), " dimensions");
    MEGACTL_CHECK(p >= 0.0 && p < 1.0, "p = ", p, " must lie in [0, 1)");
    check_dense(rng, "rng");
    MEGACTL_CHECK(rng.scalar_type() == ScalarType::Long && rng.numel() == 3, "rng must be int64 [3]: seed, step, first sample");
    MEGACTL_CHECK(rng.device() == x.device(), "rng must lie on the device of x");
    const int64_t whole = outer_size > 0 ? outer_size : x.size(1);
    MEGACTL_CHECK(outer_offset >= 0 && outer_offset + x.size(1) <= whole, "outer positions [", outer_offset, ", ", outer_offset + x.size(1),
                    ") leave the outer size ", whole);
    const int64_t samples = x.size(0) * x.size(1);
    return {x.size(0), x.size(1), samples ? x.numel() / samples : 0, outer_offset, whole};
}

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

void bits_cpu(Tensor out, int64_t first, int64_t seed, int64_t stream, int64_t step) {
    check_bits(out);
    const Stream words = make_stream(seed, stream, step);
    int64_t* const to = data<int64_t>(out);
    torch::stable::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
        cpu::bits(words, static_cast<uint64_t>(first + begin), end - begin, to + begin);
    });
}

void normal_cpu(Tensor out, std::vector<int64_t> logical_shape, std::vector<int64_t> offsets, int64_t seed, int64_t stream, double std) {
    const Rectangle rectangle = checked_rectangle(out, logical_shape, offsets);
    const Stream words = make_stream(seed, stream, kInitialisationStep);
    with_type(out, [&](auto zero) {
        using T = decltype(zero);
        T* const to = data<T>(out);
        torch::stable::parallel_for(0, out.numel(), kGrain / 8, [&](int64_t begin, int64_t end) {
            for (int64_t at = begin; at < end;) {
                const int64_t row = at / rectangle.run, column = at % rectangle.run;
                const int64_t n = std::min(rectangle.run - column, end - at);
                cpu::normal(words, static_cast<uint64_t>(rectangle.row_start(row) + column), n, std, to + at);
                at += n;
            }
        });
    });
}

Tensor dropout_add_cpu(Tensor x, std::optional<Tensor> residual, double p, Tensor rng, int64_t site, int64_t outer_offset,
                       int64_t outer_size) {
    const DropoutShape shape = checked_dropout(x, residual, p, rng, outer_offset, outer_size);
    const int64_t* const state = const_data<int64_t>(rng);
    const Stream words = make_stream(state[0], site, state[1]);
    const int64_t first_sample = state[2], run = shape.outer * shape.inner;
    Tensor y = torch::stable::empty_like(x);
    with_type(x, [&](auto zero) {
        using T = decltype(zero);
        const T *const from = const_data<T>(x), *const add = residual ? const_data<T>(*residual) : nullptr;
        T* const to = data<T>(y);
        torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
            for (int64_t at = begin; at < end;) {
                const int64_t sample = at / run, column = at % run, n = std::min(run - column, end - at);
                const int64_t element = ((first_sample + sample) * shape.outer_size + shape.outer_offset) * shape.inner + column;
                cpu::dropout_add(words, static_cast<uint64_t>(element), n, drop_threshold(p), 1.0 / (1.0 - p), from + at,
                                 add ? add + at : nullptr, to + at);
                at += n;
            }
        });
    });
    return y;
}

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

cuda::Type cuda_type(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Double:
            return cuda::Type::kDouble;
        case ScalarType::Float:
            return cuda::Type::kFloat;
        case ScalarType::BFloat16:
            return cuda::Type::kBFloat16;
        case ScalarType::Half:
            return cuda::Type::kFloat16;
        default:
            MEGACTL_CHECK(false, "dtype must be float64, float32, bfloat16 or float16");
    }
    return cuda::Type::kFloat;
}

// Calls launch(stream) with torch's current stream of the tensor's device.
template <typename Launch>
void on_device(const Tensor& t, const Launch& launch) {
    const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    const int error = launch(stream);
    MEGACTL_CHECK(error == 0, "CUDA launch failed: ", cuda::error_text(error));
}

void bits_cuda(Tensor out, int64_t first, int64_t seed, int64_t stream, int64_t step) {
    check_bits(out);
    if (out.numel() == 0) return;
    on_device(out, [&](void* on) {
        return cuda::bits(make_stream(seed, stream, step), static_cast<uint64_t>(first), out.numel(), data<int64_t>(out), on);
    });
}

void normal_cuda(Tensor out, std::vector<int64_t> logical_shape, std::vector<int64_t> offsets, int64_t seed, int64_t stream, double std) {
    const Rectangle rectangle = checked_rectangle(out, logical_shape, offsets);
    if (out.numel() == 0) return;
    const Stream words = make_stream(seed, stream, kInitialisationStep);
    on_device(out, [&](void* on) { return cuda::normal(cuda_type(out), words, rectangle, std, out.mutable_data_ptr(), on); });
}

Tensor dropout_add_cuda(Tensor x, std::optional<Tensor> residual, double p, Tensor rng, int64_t site, int64_t outer_offset,
                        int64_t outer_size) {
    const DropoutShape shape = checked_dropout(x, residual, p, rng, outer_offset, outer_size);
    Tensor y = torch::stable::empty_like(x);
    if (x.numel() == 0) return y;
    const cuda::Dropout settings{shape.batch,        shape.outer,
                                 shape.inner,        shape.outer_offset,
                                 shape.outer_size,   const_data<int64_t>(rng),
                                 static_cast<uint32_t>(site), drop_threshold(p),
                                 1.0 / (1.0 - p)};
    const void* const add = residual ? residual->const_data_ptr() : nullptr;
    on_device(x, [&](void* on) { return cuda::dropout_add(cuda_type(x), settings, x.const_data_ptr(), add, y.mutable_data_ptr(), on); });
    return y;
}

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
STABLE_TORCH_LIBRARY(megactl, m) {
    m.def("philox_bits_(Tensor(a!) out, int first_element, int seed, int stream, int step) -> ()");
    m.def("normal_(Tensor(a!) out, int[] logical_shape, int[] offsets, int seed, int stream, float std) -> ()");
    // outer_size 0: the outer dimension is whole here.
    m.def("dropout_add(Tensor x, Tensor? residual, float p, Tensor rng, int site, int outer_offset, int outer_size) -> Tensor");
    m.def(
        "adamw_(Tensor(a!) master, Tensor(b!)? low, Tensor grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor lr, Tensor step, "
        "Tensor grad_scale, Tensor skip, float beta1, float beta2, float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megactl, CPU, m) {
    m.impl("philox_bits_", TORCH_BOX(&bits_cpu));
    m.impl("normal_", TORCH_BOX(&normal_cpu));
    m.impl("dropout_add", TORCH_BOX(&dropout_add_cpu));
    m.impl("adamw_", TORCH_BOX(&adamw_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megactl, CUDA, m) {
    m.impl("philox_bits_", TORCH_BOX(&bits_cuda));
    m.impl("normal_", TORCH_BOX(&normal_cuda));
    m.impl("dropout_add", TORCH_BOX(&dropout_add_cuda));
    m.impl("adamw_", TORCH_BOX(&adamw_cuda));
}
#endif

}  // namespace megactl

// Importing the module runs the registrations above; it holds nothing itself.
PyMODINIT_FUNC PyInit__ops() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_ops", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&definition);
}
