// The part of a logical tensor that one rank holds, as runs of consecutive elements.
#pragma once

#include <cstdint>

#include "kernels/philox.h"

namespace megactl {

constexpr int kMaxDims = 8;

// rows runs of `run` elements. Row r starts at logical element start + sum of (digit of r in base size[d]) * stride[d].
struct Rectangle {
    int dims = 0;
    int64_t size[kMaxDims] = {}, stride[kMaxDims] = {};
    int64_t start = 0, rows = 1, run = 1;

    MEGACTL_INLINE int64_t row_start(int64_t row) const {
        int64_t element = start;
        for (int d = dims - 1; d >= 0; --d) {
            element += (row % size[d]) * stride[d];
            row /= size[d];
        }
        return element;
    }
};

// logical[d] elements a dimension, of which [first[d], first[d] + held[d]) are held. dims at most kMaxDims.
inline Rectangle make_rectangle(int dims, const int64_t* logical, const int64_t* first, const int64_t* held) {
    Rectangle r;
    int inner = dims;  // dimensions from here on are held whole, so they belong to one run
    int64_t stride = 1;
    while (inner > 0 && held[inner - 1] == logical[inner - 1]) stride *= logical[--inner];
    r.run = stride;
    if (inner > 0) {  // the innermost dimension that is cut is still consecutive
        --inner;
        r.run = stride * held[inner];
        r.start = first[inner] * stride;
        stride *= logical[inner];
    }
    r.dims = inner;
    for (int d = inner - 1; d >= 0; --d) {
        r.size[d] = held[d];
        r.stride[d] = stride;
        r.rows *= held[d];
        r.start += first[d] * stride;
        stride *= logical[d];
    }
    return r;
}

}  // namespace megactl
