#include "model/batch.h"

#include <algorithm>

namespace lockstep::model {

Batch Batch::whole(const int32_t* tokens, const int32_t* lengths, int64_t count, int64_t grain) {
  Batch batch;
  int64_t longest = 1;
  for (int64_t b = 0; b < count; ++b) longest = std::max<int64_t>(longest, lengths[b]);
  batch.pageStride = (longest + kernels::kPagePositions - 1) / kernels::kPagePositions;
  batch.pages.assign(static_cast<size_t>(count * batch.pageStride), 0);
  for (int64_t b = 0; b < count; ++b) {
    const int32_t length = lengths[b];
    batch.rowBegin.push_back(static_cast<int32_t>(batch.rows()));
    batch.length.push_back(length);
    batch.offset.push_back(0);
    for (int32_t i = 0; i < length; ++i) {
      batch.tokens.push_back(tokens[i]);
      batch.positions.push_back(i);
      batch.targets.push_back(i + 1 < length ? tokens[i + 1] : -1);
    }
    while (batch.rows() % grain != 0) {
      batch.tokens.push_back(-1);
      batch.positions.push_back(-1);
      batch.targets.push_back(-1);
    }
    for (int64_t i = 0; i * kernels::kPagePositions < length; ++i) {
      batch.pages[static_cast<size_t>(b * batch.pageStride + i)] = static_cast<int32_t>(batch.pageCount++);
    }
    tokens += length;
  }
  return batch;
}

}  // namespace lockstep::model
