// Launchers of cross_entropy.cu.
#pragma once

#include "kernels/cross_entropy.h"
#include "kernels/cuda/types.h"

namespace megactl::cuda {

// One element a row; the statistics are float (double for double logits).
struct CrossEntropyRows {
    const int64_t* labels;
    void *top, *total, *third;  // third: the label's logit, or the loss
};
struct CrossEntropyGradient {
    const int64_t* labels;
    const void *top, *total, *scale;
};

int cross_entropy_forward(Type type, const VocabularyShard& shard, const void* logits, const CrossEntropyRows& rows, bool loss,
                          void* stream);
// `out` may be `logits`.
int cross_entropy_backward(Type type, const VocabularyShard& shard, const void* logits, const CrossEntropyGradient& rows, void* out,
                           void* stream);

}  // namespace megactl::cuda
