#include "kernels/reference/reference.h"

namespace lockstep::kernels {

const Kernels& referenceKernels() {
  static const Kernels table = {
      .name = "reference",
      .rowGrain = 2,
      .publish = reference::publish,
      .round = reference::round,
      .linear = reference::linear,
      .finishSum = reference::finishSum,
      .activatedLinear = reference::activatedLinear,
      .linearBackwardInput = reference::linearBackwardInput,
      .linearBackwardWeight = reference::linearBackwardWeight,
      .activationBackward = reference::activationBackward,
      .embed = reference::embed,
      .embedBackward = reference::embedBackward,
      .rmsNorm = reference::rmsNorm,
      .rmsNormBackward = reference::rmsNormBackward,
      .layerNorm = reference::layerNorm,
      .layerNormBackward = reference::layerNormBackward,
      .qkvPrepare = reference::qkvPrepare,
      .attention = reference::attention,
      .attentionBackward = reference::attentionBackward,
      .qkvPrepareBackward = reference::qkvPrepareBackward,
      .softmaxStatistics = reference::softmaxStatistics,
      .mergeStatistics = reference::mergeStatistics,
      .logprobsBackward = reference::logprobsBackward,
      .sample = reference::sample,
      .accumulate = reference::accumulate,
      .sumOfSquares = reference::sumOfSquares,
      .adamw = reference::adamw,
  };
  return table;
}

}  // namespace lockstep::kernels
