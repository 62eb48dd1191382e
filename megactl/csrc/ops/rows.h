// Rows of numbers that CPU kernels work on, beside the tensors.
#pragma once

#include <memory>
#include <new>

#include "kernels/cpu/convert.h"
#include "ops/tensors.h"

namespace megactl {

struct FreeRows {
    void operator()(void* rows) const { ::operator delete[](rows, std::align_val_t(64)); }
};

// On the boundaries of vectors, as torch's own tensors are: a vector across two lines of the cache takes twice as long.
template <typename C>
using Rows = std::unique_ptr<C[], FreeRows>;

template <typename C>
Rows<C> new_rows(int64_t size) {
    return Rows<C>(static_cast<C*>(::operator new[](static_cast<size_t>(size) * sizeof(C), std::align_val_t(64))));
}

// A weight or bias in the type of the arithmetic: itself where it has that type, else a copy in `copy`. T is x's type.
template <typename C, typename T>
const C* wide_copy(const Tensor& t, Rows<C>& copy, T) {
    if (t.element_size() == sizeof(C)) return const_data<C>(t);
    copy = new_rows<C>(t.numel());
    if constexpr (!std::is_same_v<T, C>) cpu::widen(const_data<T>(t), t.numel(), copy.get());
    return copy.get();
}

}  // namespace megactl
