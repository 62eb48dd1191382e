// Launchers of swiglu.cu.
#pragma once

#include "kernels/cuda/types.h"

namespace megactl::cuda {

// y [rows, f] from x [rows, 2f], gate and up.
int swiglu(Type type, int64_t rows, int64_t f, const void* x, void* y, void* stream);
// grad_x [rows, 2f] from grad [rows, f] and x.
int swiglu_backward(Type type, int64_t rows, int64_t f, const void* grad, const void* x, void* grad_x, void* stream);

}  // namespace megactl::cuda
