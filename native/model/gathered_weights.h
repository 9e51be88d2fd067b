// Compute weights with ZeRO stage 3, as in FSDP (Zhao et al. 2023 [2304.11277]): a rank keeps its pieces, and a unit
// (layout/units.ts) is gathered from the data-parallel ranks into the workspace before it is computed, the next one
// while it is computed. In other stages the weights are there, and nothing happens here.
#pragma once

#include <vector>

#include "comm/background.h"
#include "model/parallel.h"
#include "model/parameters.h"
#include "model/spec.h"
#include "model/workspace.h"

namespace lockstep::model {

class GatheredWeights {
 public:
  GatheredWeights(const Spec&, const Parallel&, Parameters&);

  // A walk through units 0, 1, ... to the last, or from the last back to unit 1: the embedding's weights are not read
  // by its backward pass. `buffers` hold any two neighbours. What forward left there serves backward.
  void walkForward(const Workspace& buffers);
  void walkBackward();
  // The unit's weights are there until the one after the next is entered.
  void enter(size_t unit);

  // All units at once, for a call that walks again and again: enter() has nothing to do then.
  void gatherAll(const Workspace& buffers);

 private:
  void gather(size_t unit);
  void put(size_t unit);
  const std::vector<int64_t>& tensorsOf(size_t unit) const;

  const Spec& spec_;
  const Parallel& parallel_;
  Parameters& parameters_;
  Workspace buffers_;
  int step_ = 0;                                   // from a unit to the next of the walk; 0: all are there
  std::vector<comm::Background::Ticket> tickets_;  // of the units that lie in the buffers, else 0
};

}  // namespace lockstep::model
