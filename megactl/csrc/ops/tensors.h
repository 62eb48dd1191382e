// What every operator file shares: checks that throw, element types, the current CUDA stream. Torch is included here and in the files
// of this folder alone, and of torch only its stable ABI. Fake and autograd registration, and the reference in plain torch, are in
// megactl/engine/ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/dtype.h"
#ifdef USE_CUDA
#include "kernels/cuda/types.h"
#endif

namespace megactl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Checks that throw, with a message of strings and numbers. Not STD_TORCH_CHECK: that one writes through std::ostringstream, whose locale
// tables are a second copy where a toolchain links libstdc++ statically into extensions, and it then crashes on the first number.
inline std::string text(const char* value) { return value; }
inline std::string text(double value) {
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

inline void check_dense(const Tensor& t, const char* name) { MEGACTL_CHECK(t.is_contiguous(), name, " must be contiguous: call .contiguous()"); }

inline void check_twin(const Tensor& t, const Tensor& model, const char* name) {
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

#ifdef USE_CUDA

inline cuda::Type cuda_type(const Tensor& t) {
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

#endif

}  // namespace megactl
