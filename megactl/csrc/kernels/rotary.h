// The shape of rotary position embedding on packed queries, keys and values, shared by the CPU and CUDA kernels. Source: Su et al.,
// "RoFormer", 2021: element i of a head is turned against element i + half by the angle of its position and i.
#pragma once

#include <cstdint>

namespace megactl {

// A token has `groups` x (heads + 2) rows of `width` elements: a group's heads, its key, its value. The first 2 half of a row are turned.
struct RotaryShape {
    int64_t groups, heads, width, half;
};

// Elements from one batch, position and head to the next.
struct RowStrides {
    int64_t batch, position, head;
};

}  // namespace megactl
