// Lists of tensors as one run of elements, for operators that take many tensors at once.
#pragma once

#include "kernels/chunks.h"
#include "ops/tensors.h"

namespace megactl {

// Tensors cut into chunks of `chunk` elements (1: elements), counted through.
struct Spans {
    std::vector<int64_t> first;  // where each tensor starts
    int64_t chunk, total = 0;

    Spans(const std::vector<Tensor>& tensors, int64_t chunk) : chunk(chunk) {
        for (const Tensor& tensor : tensors) {
            first.push_back(total);
            total += (tensor.numel() + chunk - 1) / chunk;
        }
    }

    // Calls use(tensor, from, to) for the pieces of chunks [begin, end); from and to count the tensor's chunks.
    template <typename Use>
    void each(int64_t begin, int64_t end, const Use& use) const {
        const int64_t count = static_cast<int64_t>(first.size());
        for (int64_t tensor = begin < end ? find_span(first.data(), count, begin) : count; begin < end; ++tensor) {
            const int64_t next = tensor + 1 < count ? first[tensor + 1] : total, stop = next < end ? next : end;
            if (stop > begin) use(tensor, begin - first[tensor], stop - first[tensor]);
            begin = stop > begin ? stop : begin;
        }
    }
};

}  // namespace megactl
