// Launchers of gelu.cu.
#pragma once

#include "kernels/cuda/types.h"

namespace megactl::cuda {

struct Gelu {
    int64_t rows, columns;
    bool tanh;
};

// `partial` [gelu_row_blocks, columns] and `grad_bias` [columns] are float (double for double).
struct GeluBackward {
    const void *grad, *x, *bias;
    void *grad_x, *partial, *grad_bias;
};

// Parts into which backward cuts the rows. It follows from the shape alone, so every GPU sums a bias's gradient in the same order.
int64_t gelu_row_blocks(const Gelu& shape);

int bias_gelu(Type type, const Gelu& shape, const void* x, const void* bias, void* y, void* stream);
int bias_gelu_backward(Type type, const Gelu& shape, const GeluBackward& tensors, void* stream);

}  // namespace megactl::cuda
