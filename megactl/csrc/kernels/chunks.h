// Many tensors as one run of work: each is cut into chunks of a fixed number of elements, which do not depend on threads or devices, so
// neither do sums over chunks.
#pragma once

#include <cstdint>

#include "kernels/philox.h"

namespace megactl {

// The last i in [0, count) with first[i] <= at; first is sorted and first[0] <= at. Where several are equal (tensors without
// elements), the last one is the one that holds `at`.
MEGACTL_INLINE int64_t find_span(const int64_t* first, int64_t count, int64_t at) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (first[middle] <= at) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

}  // namespace megactl
