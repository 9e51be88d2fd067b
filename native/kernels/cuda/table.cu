#include "cuda/backend.h"
#include "kernels/cuda/cuda.h"

namespace lockstep::kernels {

const Kernels& cudaKernels() {
  lockstep::cuda::requireGpu(0);
  static const Kernels table = {
      .name = "cuda",
      .rowGrain = 16,
      .publish = cuda::publish,
      .round = cuda::round,
      .linear = cuda::linear,
      .finishSum = cuda::finishSum,
      .activatedLinear = cuda::activatedLinear,
      .linearBackwardInput = cuda::linearBackwardInput,
      .linearBackwardWeight = cuda::linearBackwardWeight,
      .activationBackward = cuda::activationBackward,
      .embed = cuda::embed,
      .embedBackward = cuda::embedBackward,
      .rmsNorm = cuda::rmsNorm,
      .rmsNormBackward = cuda::rmsNormBackward,
      .layerNorm = cuda::layerNorm,
      .layerNormBackward = cuda::layerNormBackward,
      .qkvPrepare = cuda::qkvPrepare,
      .attention = cuda::attention,
      .attentionBackward = cuda::attentionBackward,
      .qkvPrepareBackward = cuda::qkvPrepareBackward,
      .softmaxStatistics = cuda::softmaxStatistics,
      .mergeStatistics = cuda::mergeStatistics,
      .logprobsBackward = cuda::logprobsBackward,
      .sample = cuda::sample,
      .accumulate = cuda::accumulate,
      .sumOfSquares = cuda::sumOfSquares,
      .adamw = cuda::adamw,
  };
  return table;
}

}  // namespace lockstep::kernels
