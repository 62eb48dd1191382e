// Launchers of random.cu.
#pragma once

#include "kernels/cuda/types.h"
#include "kernels/philox.h"
#include "kernels/rectangle.h"

namespace megactl::cuda {

// Dropout of batch x run elements; see kernels/cpu/random.h for the arithmetic.
struct Dropout {
    int64_t batch, outer, inner;         // local sizes; a sample's outer x inner elements are consecutive
    int64_t outer_offset, outer_size;    // where the local part lies in the whole outer dimension
    const int64_t* rng;                  // on the device: seed, step, first sample
    uint32_t site, threshold;
    double scale;
};

// Dropout of rows that each have a place of their own: row r is elements ids[r] * columns and following.
struct DropoutRows {
    int64_t rows, columns;
    const int64_t *ids, *rng;            // on the device; of rng the seed and the step
    uint32_t site, threshold;
    double scale;
};

int bits(const Stream& stream_words, uint64_t first, int64_t n, int64_t* out, void* stream);
int normal(Type type, const Stream& stream_words, const Rectangle& rectangle, double std, void* out, void* stream);
int dropout_add(Type type, const Dropout& settings, const void* x, const void* residual, void* y, void* stream);
int dropout_add_rows(Type type, const DropoutRows& settings, const void* x, const void* residual, void* y, void* stream);

}  // namespace megactl::cuda
