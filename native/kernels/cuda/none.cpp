// The addon without CUDA.
#include "cuda/backend.h"
#include "kernels/ceiling.h"
#include "kernels/kernels.h"

namespace lockstep::kernels {

const Kernels& cudaKernels() {
  cuda::requireGpu(0);  // throws
  return referenceKernels();
}

const Ceiling* cudaCeiling() {
  return nullptr;
}

}  // namespace lockstep::kernels
