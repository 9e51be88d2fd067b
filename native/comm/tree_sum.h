// The order of every sum across ranks: one balanced binary tree over the addends in order. Neighbours are added, then
// their sums; an odd one out passes up. Equally: the left subtree holds the largest power of two below n.
#pragma once

#include <cstdint>

namespace lockstep::comm {

// sum[i] = tree(addends[0][i], ..., addends[n - 1][i]) for i in 0 .. count-1, n in 1 .. 64. `sum` may be one of the
// addends. Expects denormals to be flushed.
void treeSum(const float* const* addends, int n, float* sum, int64_t count);

}  // namespace lockstep::comm
