// Random words, normal deviates, dropout.
#include "ops/tensors.h"

#include <algorithm>
#include <utility>

#include "kernels/cpu/random.h"
#include "kernels/rectangle.h"
#ifdef USE_CUDA
#include "kernels/cuda/random.h"
#endif

namespace megactl {
namespace {

Stream make_stream(int64_t seed, int64_t stream, int64_t step) {
    const auto key = static_cast<uint64_t>(seed);
    return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(stream), static_cast<uint32_t>(step)};
}

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
    // A batch of one may run on into the next samples: a range of the flattened [batch, outer] has consecutive elements wherever it is cut.
    MEGACTL_CHECK(outer_offset >= 0 && (x.size(0) == 1 || outer_offset + x.size(1) <= whole), "outer positions [", outer_offset, ", ",
                    outer_offset + x.size(1), ") leave the outer size ", whole);
    const int64_t samples = x.size(0) * x.size(1);
    return {x.size(0), x.size(1), samples ? x.numel() / samples : 0, outer_offset, whole};
}

// Rows and columns of dropout_add_rows: x is [*rows, columns].
struct DropoutRowsShape {
    int64_t rows, columns;
};

DropoutRowsShape checked_rows(const Tensor& x, const std::optional<Tensor>& residual, double p, const Tensor& rng, const Tensor& ids) {
    check_dense(x, "x");
    if (residual) check_twin(*residual, x, "residual");
    MEGACTL_CHECK(x.dim() >= 2, "x must be [*rows, columns], has ", x.dim(), " dimensions");
    MEGACTL_CHECK(p >= 0.0 && p < 1.0, "p = ", p, " must lie in [0, 1)");
    for (const auto& [tensor, name] : {std::pair<const Tensor&, const char*>{rng, "rng"}, {ids, "rows"}}) {
        check_dense(tensor, name);
        MEGACTL_CHECK(tensor.scalar_type() == ScalarType::Long, name, " must be int64");
        MEGACTL_CHECK(tensor.device() == x.device(), name, " must lie on the device of x");
    }
    MEGACTL_CHECK(rng.numel() == 3, "rng must be [3]: seed, step, first sample");
    const int64_t columns = x.size(x.dim() - 1);
    MEGACTL_CHECK(ids.numel() * columns == x.numel(), "rows has ", ids.numel(), " elements, must have one for each row of x");
    return {ids.numel(), columns};
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

Tensor dropout_add_rows_cpu(Tensor x, std::optional<Tensor> residual, double p, Tensor rng, int64_t site, Tensor rows) {
    const DropoutRowsShape shape = checked_rows(x, residual, p, rng, rows);
    const int64_t *const state = const_data<int64_t>(rng), *const ids = const_data<int64_t>(rows);
    const Stream words = make_stream(state[0], site, state[1]);
    Tensor y = torch::stable::empty_like(x);
    with_type(x, [&](auto zero) {
        using T = decltype(zero);
        const T *const from = const_data<T>(x), *const add = residual ? const_data<T>(*residual) : nullptr;
        T* const to = data<T>(y);
        const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shape.columns));
        torch::stable::parallel_for(0, shape.rows, grain, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end;) {
                // Rows that follow each other are one run: a drawing of words serves many short ones.
                int64_t next = row + 1;
                while (next < end && ids[next] == ids[next - 1] + 1) ++next;
                const int64_t at = row * shape.columns;
                cpu::dropout_add(words, static_cast<uint64_t>(ids[row] * shape.columns), (next - row) * shape.columns, drop_threshold(p),
                                 1.0 / (1.0 - p), from + at, add ? add + at : nullptr, to + at);
                row = next;
            }
        });
    });
    return y;
}

// ---- CUDA ----

#ifdef USE_CUDA

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

Tensor dropout_add_rows_cuda(Tensor x, std::optional<Tensor> residual, double p, Tensor rng, int64_t site, Tensor rows) {
    const DropoutRowsShape shape = checked_rows(x, residual, p, rng, rows);
    Tensor y = torch::stable::empty_like(x);
    if (x.numel() == 0) return y;
    const cuda::DropoutRows settings{shape.rows,
                                     shape.columns,
                                     const_data<int64_t>(rows),
                                     const_data<int64_t>(rng),
                                     static_cast<uint32_t>(site),
                                     drop_threshold(p),
                                     1.0 / (1.0 - p)};
    const void* const add = residual ? residual->const_data_ptr() : nullptr;
    on_device(x, [&](void* on) {
        return cuda::dropout_add_rows(cuda_type(x), settings, x.const_data_ptr(), add, y.mutable_data_ptr(), on);
    });
    return y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megactl, m) {
    m.def("philox_bits_(Tensor(a!) out, int first_element, int seed, int stream, int step) -> ()");
    m.def("normal_(Tensor(a!) out, int[] logical_shape, int[] offsets, int seed, int stream, float std) -> ()");
    // outer_size 0: the outer dimension is whole here.
    m.def("dropout_add(Tensor x, Tensor? residual, float p, Tensor rng, int site, int outer_offset, int outer_size) -> Tensor");
    m.def("dropout_add_rows(Tensor x, Tensor? residual, float p, Tensor rng, int site, Tensor rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megactl, CPU, m) {
    m.impl("philox_bits_", TORCH_BOX(&bits_cpu));
    m.impl("normal_", TORCH_BOX(&normal_cpu));
    m.impl("dropout_add", TORCH_BOX(&dropout_add_cpu));
    m.impl("dropout_add_rows", TORCH_BOX(&dropout_add_rows_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megactl, CUDA, m) {
    m.impl("philox_bits_", TORCH_BOX(&bits_cuda));
    m.impl("normal_", TORCH_BOX(&normal_cuda));
    m.impl("dropout_add", TORCH_BOX(&dropout_add_cuda));
    m.impl("dropout_add_rows", TORCH_BOX(&dropout_add_rows_cuda));
}
#endif

}  // namespace megactl
