// How much of the Queue's scratch, per thread, the row-wise operations take; the memory plan uses the same arithmetic.
#pragma once

#include "kernels/weight.h"

namespace lockstep::kernels {

constexpr int64_t kSamplingBlock = 256;     // columns whose weights are summed before the running sum sees them
constexpr int64_t kSamplingBuckets = 2048;  // of a digit of radix selection
constexpr int64_t kSquaresLeaf = 4096;      // elements of a leaf of sumOfSquares
constexpr int64_t kSquaresTaskLeaves = 64;  // leaves of one task: a whole subtree

static inline int64_t samplingBlocks(const WeightLayout& vocabulary) {
  int64_t blocks = 0;
  for (const Part& part : vocabulary.parts) blocks += (part.out + kSamplingBlock - 1) / kSamplingBlock;
  return blocks;
}

// sample: 16 KiB, 8 bytes a column (rounded up to 16 columns), 4 a block of 256 columns of a part, 4 a part.
static inline int64_t samplingScratchBytes(const WeightLayout& vocabulary) {
  const int64_t parts = static_cast<int64_t>(vocabulary.parts.size());
  return kSamplingBuckets * 8 + (2 * roundUp(vocabulary.out, 16) + samplingBlocks(vocabulary) + parts) * 4;
}

// sumOfSquares: 8 bytes (thread 0 only) for every 262,144 elements.
static inline int64_t sumOfSquaresScratchBytes(int64_t count) {
  const int64_t task = kSquaresLeaf * kSquaresTaskLeaves;
  return (count + task - 1) / task * 8;
}

}  // namespace lockstep::kernels
