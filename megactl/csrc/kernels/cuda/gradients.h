// Launchers of gradients.cu.
#pragma once

#include "kernels/cuda/types.h"

namespace megactl::cuda {

struct ListTensor {
    int64_t n;
    void* data;
    Type type;
};

// Elements of double that squared_norm needs as scratch for `count` tensors.
int64_t squared_norm_scratch(int64_t count);
// out[0] = the sum of squares of all elements of all tensors.
int squared_norm(const ListTensor* tensors, int64_t count, double* scratch, double* out, void* stream);
// Multiplies all tensors by factor[0], a float or double on the device; where that is 1, nothing is written.
int scale(const ListTensor* tensors, int64_t count, Type factor_type, const void* factor, void* stream);

}  // namespace megactl::cuda
