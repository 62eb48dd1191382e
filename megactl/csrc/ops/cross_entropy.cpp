// Cross entropy over a vocabulary shard, without a copy of the logits in a wider type.
#include "ops/tensors.h"

#include <algorithm>
#include <tuple>

#include "kernels/cpu/cross_entropy.h"
#ifdef USE_CUDA
#include "kernels/cuda/cross_entropy.h"
#endif

namespace megactl {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

VocabularyShard checked_shard(const Tensor& logits, const Tensor& labels, int64_t first_row, int64_t num_rows) {
    check_dense(logits, "logits");
    check_dense(labels, "labels");
    MEGACTL_CHECK(logits.dim() >= 1, "logits must be [..., columns], have no dimension");
    const int64_t columns = logits.size(logits.dim() - 1);
    MEGACTL_CHECK(labels.scalar_type() == ScalarType::Long && labels.device() == logits.device(),
                  "labels must be int64 on the device of the logits");
    MEGACTL_CHECK(columns < (int64_t{1} << 31), "logits have ", columns, " columns, must have fewer than 2^31");
    MEGACTL_CHECK(num_rows >= 0 && num_rows <= columns, "num_rows = ", num_rows, " must lie in [0, ", columns, "], the columns held");
    MEGACTL_CHECK(first_row >= 0, "first_row = ", first_row, " must not be negative");
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < logits.dim(); ++d) rows *= logits.size(d);
    MEGACTL_CHECK(rows < (int64_t{1} << 31), "logits have ", rows, " rows, must have fewer than 2^31");
    MEGACTL_CHECK(labels.numel() == rows, "labels have ", labels.numel(), " elements, must have one for each of ", rows, " rows of logits");
    return {rows, columns, first_row, num_rows};
}

ScalarType statistics_type(const Tensor& logits) {
    return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor row_statistic(const Tensor& logits, const Tensor& labels) {
    return torch::stable::new_empty(logits, labels.sizes(), statistics_type(logits));
}

struct RowTensors {
    const Tensor &logits, &labels, &top, &total, &scale;
};

VocabularyShard checked_backward(const RowTensors& t, int64_t first_row, int64_t num_rows) {
    const VocabularyShard shard = checked_shard(t.logits, t.labels, first_row, num_rows);
    const std::pair<const Tensor*, const char*> rows[] = {{&t.top, "maximum"}, {&t.total, "total"}, {&t.scale, "scale"}};
    for (const auto& [tensor, name] : rows) {
        check_dense(*tensor, name);
        MEGACTL_CHECK(tensor->numel() == shard.rows && tensor->scalar_type() == statistics_type(t.logits) &&
                          tensor->device() == t.logits.device(),
                      name, " must have one element a row, float32 (float64 for float64 logits), on the device of the logits");
    }
    return shard;
}

// ---- CPU ----

int64_t row_grain(const VocabularyShard& shard) { return std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, shard.columns)); }

// kLoss: the third result is the loss, not the label's logit.
template <bool kLoss>
Three forward_cpu(const Tensor& logits, const Tensor& labels, int64_t first_row, int64_t num_rows) {
    const VocabularyShard shard = checked_shard(logits, labels, first_row, num_rows);
    Tensor top = row_statistic(logits, labels), total = row_statistic(logits, labels), third = row_statistic(logits, labels);
    const int64_t* const label = const_data<int64_t>(labels);
    with_type(logits, [&](auto zero) {
        using T = decltype(zero);
        using C = typename Compute<T>::type;
        const T* const from = const_data<T>(logits);
        C *const tops = data<C>(top), *const totals = data<C>(total), *const thirds = data<C>(third);
        torch::stable::parallel_for(0, shard.rows, row_grain(shard), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const T* const l = from + row * shard.columns;
                const int64_t column = shard.column_of(label[row]);
                SoftmaxSum<C> sum;
                cpu::softmax_sum(l, shard.held, &sum);
                const C target = column < 0 ? C(0) : load(l[column]);
                tops[row] = sum.top, totals[row] = sum.total, thirds[row] = kLoss ? token_loss(sum, target) : target;
            }
        });
    });
    return {top, total, third};
}

void backward_cpu(const RowTensors& t, int64_t first_row, int64_t num_rows, const Tensor& out) {
    const VocabularyShard shard = checked_backward(t, first_row, num_rows);
    const int64_t* const label = const_data<int64_t>(t.labels);
    with_type(t.logits, [&](auto zero) {
        using T = decltype(zero);
        using C = typename Compute<T>::type;
        const T* const from = const_data<T>(t.logits);
        T* const to = data<T>(out);
        const C *const tops = const_data<C>(t.top), *const totals = const_data<C>(t.total), *const scales = const_data<C>(t.scale);
        torch::stable::parallel_for(0, shard.rows, row_grain(shard), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const int64_t at = row * shard.columns;
                cpu::cross_entropy_gradient(shard, from + at, label[row], tops[row], totals[row], scales[row], to + at);
            }
        });
    });
}

// ---- CUDA ----

#ifdef USE_CUDA

template <bool kLoss>
Three forward_cuda(const Tensor& logits, const Tensor& labels, int64_t first_row, int64_t num_rows) {
    const VocabularyShard shard = checked_shard(logits, labels, first_row, num_rows);
    Tensor top = row_statistic(logits, labels), total = row_statistic(logits, labels), third = row_statistic(logits, labels);
    if (shard.rows == 0) return {top, total, third};
    const cuda::CrossEntropyRows rows{const_data<int64_t>(labels), top.mutable_data_ptr(), total.mutable_data_ptr(),
                                      third.mutable_data_ptr()};
    on_device(logits,
              [&](void* on) { return cuda::cross_entropy_forward(cuda_type(logits), shard, logits.const_data_ptr(), rows, kLoss, on); });
    return {top, total, third};
}

void backward_cuda(const RowTensors& t, int64_t first_row, int64_t num_rows, const Tensor& out) {
    const VocabularyShard shard = checked_backward(t, first_row, num_rows);
    if (t.logits.numel() == 0) return;
    const cuda::CrossEntropyGradient rows{const_data<int64_t>(t.labels), t.top.const_data_ptr(), t.total.const_data_ptr(),
                                          t.scale.const_data_ptr()};
    on_device(t.logits, [&](void* on) {
        return cuda::cross_entropy_backward(cuda_type(t.logits), shard, t.logits.const_data_ptr(), rows, out.mutable_data_ptr(), on);
    });
}

#endif

// ---- both ----

template <auto kForward>
Three forward(Tensor logits, Tensor labels, int64_t first_row, int64_t num_rows) {
    return kForward(logits, labels, first_row, num_rows);
}

template <auto kBackward>
Tensor backward(Tensor logits, Tensor labels, Tensor top, Tensor total, Tensor scale, int64_t first_row, int64_t num_rows) {
    Tensor grad = torch::stable::empty_like(logits);
    kBackward({logits, labels, top, total, scale}, first_row, num_rows, grad);
    return grad;
}

template <auto kBackward>
void backward_in_place(Tensor logits, Tensor labels, Tensor top, Tensor total, Tensor scale, int64_t first_row, int64_t num_rows) {
    kBackward({logits, labels, top, total, scale}, first_row, num_rows, logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megactl, m) {
    m.def("cross_entropy(Tensor logits, Tensor labels, int first_row, int num_rows) -> (Tensor maximum, Tensor total, Tensor loss)");
    m.def(
        "cross_entropy_forward(Tensor logits, Tensor labels, int first_row, int num_rows) "
        "-> (Tensor maximum, Tensor total, Tensor target)");
    m.def(
        "cross_entropy_backward(Tensor logits, Tensor labels, Tensor maximum, Tensor total, Tensor scale, int first_row, int num_rows) "
        "-> Tensor");
    m.def(
        "cross_entropy_backward_(Tensor(a!) logits, Tensor labels, Tensor maximum, Tensor total, Tensor scale, int first_row, "
        "int num_rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megactl, CPU, m) {
    m.impl("cross_entropy", TORCH_BOX(&forward<&forward_cpu<true>>));
    m.impl("cross_entropy_forward", TORCH_BOX(&forward<&forward_cpu<false>>));
    m.impl("cross_entropy_backward", TORCH_BOX(&backward<&backward_cpu>));
    m.impl("cross_entropy_backward_", TORCH_BOX(&backward_in_place<&backward_cpu>));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megactl, CUDA, m) {
    m.impl("cross_entropy", TORCH_BOX(&forward<&forward_cuda<true>>));
    m.impl("cross_entropy_forward", TORCH_BOX(&forward<&forward_cuda<false>>));
    m.impl("cross_entropy_backward", TORCH_BOX(&backward<&backward_cuda>));
    m.impl("cross_entropy_backward_", TORCH_BOX(&backward_in_place<&backward_cuda>));
}
#endif

}  // namespace megactl
