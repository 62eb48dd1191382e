// What the CUDA kernels offer to host code. Plain pointers and no CUDA header, so a host compiler reads it.
// Every function enqueues on `stream` (a cudaStream_t), allocates nothing, never synchronises, and returns a cudaError_t as an int.
#pragma once

#include <cstdint>

#include "kernels/adamw.h"
#include "kernels/rectangle.h"

namespace megactl::cuda {

enum class Type { kDouble, kFloat, kBFloat16, kFloat16 };

// Dropout of batch x run elements; see kernels/cpu/random.h for the arithmetic.
struct Dropout {
    int64_t batch, outer, inner;         // local sizes; a sample's outer x inner elements are consecutive
    int64_t outer_offset, outer_size;    // where the local part lies in the whole outer dimension
    const int64_t* rng;                  // on the device: seed, step, first sample
    uint32_t site, threshold;
    double scale;
};

// The tensors of one AdamW step. `low` may be null. The four scalars lie on the device and have the type of `weight`.
struct AdamWTensors {
    int64_t n;
    const void* grad;
    void *weight, *exp_avg, *exp_avg_sq, *low;
    const void *lr, *step, *grad_scale, *skip;
};

int bits(const Stream& stream_words, uint64_t first, int64_t n, int64_t* out, void* stream);
int normal(Type type, const Stream& stream_words, const Rectangle& rectangle, double std, void* out, void* stream);
int dropout_add(Type type, const Dropout& settings, const void* x, const void* residual, void* y, void* stream);
int adamw(Type type, Type low_type, const AdamWTensors& tensors, const AdamWSettings& settings, void* stream);
const char* error_text(int error);

}  // namespace megactl::cuda
