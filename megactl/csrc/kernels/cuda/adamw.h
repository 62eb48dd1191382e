// Launcher of adamw.cu.
#pragma once

#include "kernels/adamw.h"
#include "kernels/cuda/types.h"

namespace megactl::cuda {

// The tensors of one AdamW step. `low` may be null. The four scalars lie on the device and have the type of `weight`.
struct AdamWTensors {
    int64_t n;
    const void* grad;
    void *weight, *exp_avg, *exp_avg_sq, *low;
    const void *lr, *step, *grad_scale, *skip;
};

int adamw(Type type, Type low_type, const AdamWTensors& tensors, const AdamWSettings& settings, void* stream);

}  // namespace megactl::cuda
