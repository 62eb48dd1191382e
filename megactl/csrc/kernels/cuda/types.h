// What host code and CUDA kernels agree on. Plain pointers and no CUDA header, so a host compiler reads it; one header a topic beside it
// declares the launchers. Each enqueues on `stream` (a cudaStream_t), allocates nothing, never synchronises, and returns a cudaError_t
// as an int.
#pragma once

#include <cstdint>

namespace megactl::cuda {

enum class Type { kDouble, kFloat, kBFloat16, kFloat16 };

const char* error_text(int error);

}  // namespace megactl::cuda
