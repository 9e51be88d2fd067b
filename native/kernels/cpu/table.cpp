// The table of one instruction set.
#include "kernels/cpu/cpu.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

const Kernels& table() {
  static const Kernels table = {
      .name = LOCKSTEP_ISA_NAME,
      .rowGrain = 2,
      .publish = LOCKSTEP_ISA::publish,
      .round = LOCKSTEP_ISA::round,
      .linear = LOCKSTEP_ISA::linear,
      .finishSum = LOCKSTEP_ISA::finishSum,
      .activatedLinear = LOCKSTEP_ISA::activatedLinear,
      .linearBackwardInput = LOCKSTEP_ISA::linearBackwardInput,
      .linearBackwardWeight = LOCKSTEP_ISA::linearBackwardWeight,
      .activationBackward = LOCKSTEP_ISA::activationBackward,
      .embed = LOCKSTEP_ISA::embed,
      .embedBackward = LOCKSTEP_ISA::embedBackward,
      .rmsNorm = LOCKSTEP_ISA::rmsNorm,
      .rmsNormBackward = LOCKSTEP_ISA::rmsNormBackward,
      .layerNorm = LOCKSTEP_ISA::layerNorm,
      .layerNormBackward = LOCKSTEP_ISA::layerNormBackward,
      .qkvPrepare = LOCKSTEP_ISA::qkvPrepare,
      .attention = LOCKSTEP_ISA::attention,
      .attentionBackward = LOCKSTEP_ISA::attentionBackward,
      .qkvPrepareBackward = LOCKSTEP_ISA::qkvPrepareBackward,
      .softmaxStatistics = LOCKSTEP_ISA::softmaxStatistics,
      .mergeStatistics = LOCKSTEP_ISA::mergeStatistics,
      .logprobsBackward = LOCKSTEP_ISA::logprobsBackward,
      .sample = LOCKSTEP_ISA::sample,
      .accumulate = LOCKSTEP_ISA::accumulate,
      .sumOfSquares = LOCKSTEP_ISA::sumOfSquares,
      .adamw = LOCKSTEP_ISA::adamw,
  };
  return table;
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
