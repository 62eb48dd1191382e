// Launcher of rotary.cu.
#pragma once

#include "kernels/cuda/types.h"
#include "kernels/rotary.h"

namespace megactl::cuda {

// packed [batch, positions, groups, heads + 2, width] is contiguous, rows of q, k and v are; cos and sin are float [batch, positions, half].
struct Rotary {
    int64_t batch, positions;
    RotaryShape shape;
    void *packed, *q, *k, *v;
    RowStrides q_strides, k_strides, v_strides;
    const void *cos, *sin;
};

// From packed to q, k, v, turned; with `pack` the other way, turned back.
int rotary(Type type, const Rotary& tensors, bool pack, void* stream);

}  // namespace megactl::cuda
