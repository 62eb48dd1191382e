// Which keys a row of attention scores may look at, for the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "kernels/philox.h"

namespace megactl {

// Scores [batch, heads, queries, keys]. `mask` (or null) has a byte a key, 0 where a query must not look; its rows of keys are
// consecutive, and a stride is 0 in a dimension in which the mask has size 1. Query i of a causal one sees keys up to
// i + keys - queries: the last query sees them all.
struct Softmax {
    int64_t rows, heads, queries, keys;
    const uint8_t* mask;
    int64_t mask_batch, mask_head, mask_query;
    bool causal;
};

// Keys [0, visible) of which `mask` (or null) says which count.
struct Sight {
    int64_t visible;
    const uint8_t* mask;
};

// There are fewer than 2^31 rows: division of 32-bit numbers is much faster on a GPU.
MEGACTL_INLINE Sight sight(const Softmax& s, uint32_t row) {
    if (!s.causal && !s.mask) return {s.keys, nullptr};
    const uint32_t queries = static_cast<uint32_t>(s.queries), heads = static_cast<uint32_t>(s.heads);
    const uint32_t matrix = row / queries, query = row - matrix * queries;
    int64_t visible = s.keys;
    if (s.causal) {
        const int64_t end = static_cast<int64_t>(query) + s.keys - s.queries + 1;
        visible = end < 0 ? 0 : end;
    }
    const uint32_t sample = matrix / heads, head = matrix - sample * heads;
    const uint8_t* mask = s.mask ? s.mask + sample * s.mask_batch + head * s.mask_head + query * s.mask_query : nullptr;
    return {visible, mask};
}

}  // namespace megactl
