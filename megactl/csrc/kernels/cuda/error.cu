// Messages of the CUDA runtime.
#include "kernels/cuda/common.cuh"

namespace megactl::cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace megactl::cuda
