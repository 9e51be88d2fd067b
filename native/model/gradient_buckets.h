// Gradients on their way from the backward pass to the step. When backward has left the units of a bucket
// (layout/units.ts) they are reduced over the data-parallel ranks behind the rest of it (Li et al. 2020 [2006.15704]):
// summed on all of them, or with ZeRO on the rank that keeps the piece. From stage 2 on the accumulators of a bucket
// lie in the workspace, its pieces go to the arena, and the next bucket but one takes its place; so all micro-batches
// of the step have to pass a layer before backward goes on to the next (breadth first, Lamy-Poirier 2023 [2211.05953]).
#pragma once

#include <vector>

#include "comm/background.h"
#include "core/queue.h"
#include "model/parallel.h"
#include "model/parameters.h"
#include "model/spec.h"
#include "model/workspace.h"

namespace lockstep::model {

class GradientBuckets {
 public:
  GradientBuckets(const Spec&, const Parallel&, Parameters&, Queue&);

  // A walk of backward from the last unit to the first. `last`: no other backward follows before the step, so units
  // that it leaves are complete.
  void begin(const Workspace& buffers, bool last);
  // The unit's accumulators are there.
  void enter(size_t unit);
  void leave(size_t unit);
  // The workspace is free for other calls.
  void end();

  // Returns when all gradients are complete and reduced; they stay so until clear().
  void finish();
  // After the step, or to drop what was accumulated, once all ranks have come as far as this one.
  void clear();

 private:
  void complete(size_t unit);
  void reduce(size_t lowest);
  bool firstOfBucket(size_t unit) const {
    return unit + 1 == spec_.units.size() || bucketOf(unit + 1) != bucketOf(unit);
  }
  bool lastOfBucket(size_t unit) const { return unit == 0 || bucketOf(unit - 1) != bucketOf(unit); }
  size_t bucketOf(size_t unit) const { return static_cast<size_t>(spec_.units[unit].bucket); }
  void put(size_t unit);

  const Spec& spec_;
  const Parallel& parallel_;
  Parameters& parameters_;
  Queue& queue_;
  Workspace buffers_;
  bool last_ = false;
  size_t open_;                                    // units before this one are not complete
  std::vector<comm::Background::Ticket> tickets_;  // by bucket
};

}  // namespace lockstep::model
