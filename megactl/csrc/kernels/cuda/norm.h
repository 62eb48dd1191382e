// Launchers of norm_forward.cu and norm_backward.cu.
#pragma once

#include "kernels/cuda/types.h"

namespace megactl::cuda {

// y = norm(x), or norm of sum = x + residual. RMSNorm has neither bias nor mean: null. Statistics have the type of the arithmetic.
struct NormForward {
    int64_t rows, columns;
    const void *x, *residual, *weight, *bias;
    double epsilon;
    void *y, *sum, *mean, *rstd;
};

// grad_sum may be null; mean and grad_bias are null for RMSNorm. Weight gradients have the type of the arithmetic, and so has
// scratch, which has norm_backward_scratch elements.
struct NormBackward {
    int64_t rows, columns;
    const void *grad_y, *x, *weight, *mean, *rstd, *grad_sum;
    void *grad_x, *grad_weight, *grad_bias;
    void* scratch;
};

// weight_type is type, or kFloat.
int norm_forward(Type type, Type weight_type, const NormForward& tensors, void* stream);
int64_t norm_backward_scratch(Type type, const NormBackward& tensors);
int norm_backward(Type type, Type weight_type, const NormBackward& tensors, void* stream);

}  // namespace megactl::cuda
