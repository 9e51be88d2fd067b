#include "cuda/backend.h"
#include "kernels/cuda/cuda.h"

namespace lockstep::kernels {

const Kernels& cudaKernels() {
  lockstep::cuda::requireGpu(0);
  static const Kernels table = cuda::tableOf("cuda", 16);
  return table;
}

}  // namespace lockstep::kernels
