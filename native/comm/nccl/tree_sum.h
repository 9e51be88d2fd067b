// The sum across ranks (comm/tree_sum.h) of addends that lie on a GPU, with the same bits.
#pragma once

#include <cstdint>

#include "cuda/queue.h"

namespace lockstep::comm::nccl {

// to[i] = tree(addends[0][i], ..., addends[ranks - 1][i]) for i in 0 .. count-1, ranks in 2 .. 64, on the queue's
// stream. `addends` is an array of the host of addresses on the GPU; `to` may be one of them.
void treeSum(cuda::Queue&, const float* const* addends, int ranks, int64_t count, float* to);

}  // namespace lockstep::comm::nccl
