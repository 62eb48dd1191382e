// Launcher of adamw.cu.
#pragma once

#include "kernels/adamw.h"
#include "kernels/cuda/types.h"

namespace megactl::cuda {

// A tensor of an AdamW step. `low` is null where there is no low-precision copy.
struct AdamWTensor {
    int64_t n;
    const void* grad;
    void *weight, *exp_avg, *exp_avg_sq, *low;
    double weight_decay;
};

// Scalars on the device, of the type of `weight`.
struct AdamWScalars {
    const void *lr, *step, *grad_scale, *skip;
};

// All tensors have `type`, their copies `low_type` (either all have one or none).
int adamw(Type type, Type low_type, const AdamWTensor* tensors, int64_t count, const AdamWScalars& scalars, const AdamWSettings& settings,
          void* stream);

}  // namespace megactl::cuda
