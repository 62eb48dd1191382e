// Launchers of softmax.cu.
#pragma once

#include "kernels/cuda/types.h"
#include "kernels/softmax.h"

namespace megactl::cuda {

int softmax(Type type, const Softmax& shape, double scale, const void* scores, void* y, void* stream);
int softmax_backward(Type type, const Softmax& shape, double scale, const void* grad, const void* y, void* grad_scores, void* stream);

}  // namespace megactl::cuda
