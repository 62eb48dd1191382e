// Kernels over lists of tensors: a table of pointers goes to the device as the kernel's argument, so nothing is copied, nothing waits,
// and a captured graph keeps it. As in apex's multi_tensor_apply, but a block searches the
// table for its tensor instead of finding it spelled out.
#pragma once

#include "kernels/chunks.h"
#include "kernels/cuda/common.cuh"

namespace megactl::cuda {

// Tensors of one launch. Kernel arguments may take 32 KB (CUDA 12.1, sm_70 on); 256 tensors take 18 at most.
constexpr int kListTensors = 256;

template <typename Entry, int kMost>
struct ListTable {
    int64_t count, chunks;
    int64_t first[kMost];  // chunk each tensor starts with
    Entry entry[kMost];
};

// A chunk of a tensor: elements [begin, end).
struct Chunk {
    int64_t tensor, begin, end;
};

template <int kChunk, typename Table>
__device__ __forceinline__ Chunk find_chunk(const Table& table, int64_t chunk) {
    const int64_t tensor = find_span(table.first, table.count, chunk), begin = (chunk - table.first[tensor]) * kChunk;
    const int64_t n = table.entry[tensor].n;
    return {tensor, begin, n - begin < kChunk ? n : begin + kChunk};
}

// What `aligned` is on the host.
__device__ __forceinline__ bool starts_vector(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls launch(table) for tables of at most kMost of the entries, those without elements left out.
template <int kMost, int kChunk, typename Entry, typename Launch>
void for_tables(const Entry* entries, int64_t count, const Launch& launch) {
    ListTable<Entry, kMost> table;
    table.count = table.chunks = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (entries[i].n > 0) {
            table.first[table.count] = table.chunks;
            table.entry[table.count++] = entries[i];
            table.chunks += (entries[i].n + kChunk - 1) / kChunk;
        }
        if (table.count == kMost || (i + 1 == count && table.count > 0)) {
            launch(table);
            table.count = table.chunks = 0;
        }
    }
}

}  // namespace megactl::cuda
