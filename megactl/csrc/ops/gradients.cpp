// Squared norm and scaling of lists of gradients.
#include "ops/lists.h"

#include <algorithm>

#include "kernels/cpu/gradients.h"
#ifdef USE_CUDA
#include "kernels/cuda/gradients.h"
#endif

namespace megactl {
namespace {

using Tensors = std::vector<Tensor>;

void check_list(const Tensors& tensors) {
    MEGACTL_CHECK(!tensors.empty(), "the list of tensors must not be empty");
    for (const Tensor& t : tensors) {
        check_dense(t, "every tensor");
        MEGACTL_CHECK(t.device() == tensors[0].device(), "all tensors must lie on one device");
        with_type(t, [](auto) {});  // an error inside parallel_for would lose its message
    }
}

void check_factor(const Tensors& tensors, const Tensor& factor) {
    const auto type = factor.scalar_type();
    const bool fits = type == ScalarType::Float || type == ScalarType::Double;
    MEGACTL_CHECK(fits && factor.numel() == 1 && factor.device() == tensors[0].device(),
                  "factor must be a float32 or float64 scalar on the device of the tensors");
}

// ---- CPU ----

// Pairs of halves, then of quarters: as accurate as it is independent of the threads that filled `sums`.
double pairwise_sum(const double* sums, int64_t n) {
    if (n == 0) return 0.0;
    return n == 1 ? sums[0] : pairwise_sum(sums, n / 2) + pairwise_sum(sums + n / 2, n - n / 2);
}

Tensor squared_norm_cpu(Tensors tensors) {
    check_list(tensors);
    const Spans spans(tensors, cpu::kSumChunk);
    std::vector<double> sums(static_cast<size_t>(spans.total));
    torch::stable::parallel_for(0, spans.total, kGrain / cpu::kSumChunk, [&](int64_t begin, int64_t end) {
        spans.each(begin, end, [&](int64_t i, int64_t from, int64_t to) {
            const int64_t n = tensors[i].numel();
            with_type(tensors[i], [&](auto zero) {
                const auto* const x = const_data<decltype(zero)>(tensors[i]);
                for (int64_t chunk = from; chunk < to; ++chunk) {
                    const int64_t start = chunk * cpu::kSumChunk;
                    sums[spans.first[i] + chunk] = cpu::squares(x + start, std::min(cpu::kSumChunk, n - start));
                }
            });
        });
    });
    Tensor out = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
    *data<double>(out) = pairwise_sum(sums.data(), spans.total);
    return out;
}

void scale_cpu(Tensors tensors, Tensor factor) {
    check_list(tensors);
    check_factor(tensors, factor);
    const double by = factor.scalar_type() == ScalarType::Double ? *const_data<double>(factor) : *const_data<float>(factor);
    if (by == 1.0) return;
    const Spans spans(tensors, 1);
    torch::stable::parallel_for(0, spans.total, kGrain, [&](int64_t begin, int64_t end) {
        spans.each(begin, end, [&](int64_t i, int64_t from, int64_t to) {
            with_type(tensors[i], [&](auto zero) {
                using T = decltype(zero);
                cpu::scale(static_cast<typename Compute<T>::type>(by), to - from, data<T>(tensors[i]) + from);
            });
        });
    });
}

// ---- CUDA ----

#ifdef USE_CUDA

std::vector<cuda::ListTensor> pointers(const Tensors& tensors) {
    std::vector<cuda::ListTensor> found;
    for (const Tensor& t : tensors) found.push_back({t.numel(), t.mutable_data_ptr(), cuda_type(t)});
    return found;
}

Tensor squared_norm_cuda(Tensors tensors) {
    check_list(tensors);
    const auto list = pointers(tensors);
    const int64_t count = static_cast<int64_t>(list.size());
    Tensor out = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
    Tensor scratch = torch::stable::new_empty(tensors[0], {cuda::squared_norm_scratch(count)}, ScalarType::Double);
    on_device(out, [&](void* on) { return cuda::squared_norm(list.data(), count, data<double>(scratch), data<double>(out), on); });
    return out;
}

void scale_cuda(Tensors tensors, Tensor factor) {
    check_list(tensors);
    check_factor(tensors, factor);
    const auto list = pointers(tensors);
    on_device(factor, [&](void* on) {
        return cuda::scale(list.data(), static_cast<int64_t>(list.size()), cuda_type(factor), factor.const_data_ptr(), on);
    });
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megactl, m) {
    m.def("squared_norm(Tensor[] tensors) -> Tensor");
    m.def("scale_(Tensor(a!)[] tensors, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megactl, CPU, m) {
    m.impl("squared_norm", TORCH_BOX(&squared_norm_cpu));
    m.impl("scale_", TORCH_BOX(&scale_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megactl, CUDA, m) {
    m.impl("squared_norm", TORCH_BOX(&squared_norm_cuda));
    m.impl("scale_", TORCH_BOX(&scale_cuda));
}
#endif

}  // namespace megactl
