// The addon without CUDA.
#include "cuda/backend.h"
#include "kernels/kernels.h"

namespace lockstep::kernels {

const Kernels& cudaKernels() {
  cuda::requireGpu(0);  // throws
  return referenceKernels();
}

}  // namespace lockstep::kernels
