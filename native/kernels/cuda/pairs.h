// Walking a bfloat16 weight in row pairs of its panels, the unit in which the float32 order and the bfloat16 order hold
// the same elements. A thread takes four columns of a pair: 16 bytes of each of its two rows, and 16 bytes of bfloat16.
// Panels of one width that follow each other are one run, so a launch covers a whole weight, however it is cut.
#pragma once

#include <vector>

#include "kernels/cuda/cuda.h"

namespace lockstep::kernels::cuda {

constexpr int kPairThreads = 256, kPairColumns = 4;

struct PairRun {
  int64_t offset;       // of its first panel, in elements
  unsigned units;       // threads with work
  unsigned width;       // of its panels
  unsigned firstBlock;  // of the launch
};

inline std::vector<PairRun> pairRuns(const WeightLayout& layout) {
  std::vector<PairRun> runs;
  int64_t end = 0;  // of the last run
  const auto add = [&](int64_t offset, int64_t elements, int64_t width) {
    if (elements == 0) return;
    const auto units = static_cast<unsigned>(elements / (2 * kPairColumns));
    if (!runs.empty() && offset == end && runs.back().width == width) {
      runs.back().units += units;
    } else {
      runs.push_back({offset, units, static_cast<unsigned>(width), 0});
    }
    end = offset + elements;
  };
  for (const Part& part : layout.parts) {
    const int64_t full = part.out / kPanel;
    add(part.offset, full * kPanel * part.inPadded(), kPanel);
    if (full < part.panels())
      add(part.panelOffset(full), part.panelWidth(full) * part.inPadded(), part.panelWidth(full));
  }
  unsigned blocks = 0;
  for (PairRun& run : runs) {
    run.firstBlock = blocks;
    blocks += blocksFor(run.units, kPairThreads);
  }
  return runs;
}

// body(even, odd, pairs): the float32 elements of four columns of row k begin at `even`, those of row k + 1 at `odd`;
// the four bfloat16 pairs at element `pairs`.
template <class Body>
__global__ void forPairsKernel(const PairRun* runs, int count, Body body) {
  int r = 0;
  while (r + 1 < count && runs[r + 1].firstBlock <= blockIdx.x) ++r;
  const PairRun run = runs[r];
  const unsigned unit = (blockIdx.x - run.firstBlock) * kPairThreads + threadIdx.x, across = run.width / kPairColumns;
  if (unit >= run.units) return;
  const int64_t row = run.offset + static_cast<int64_t>(unit / across) * 2 * run.width;
  const unsigned column = unit % across * kPairColumns;
  body(row + column, row + run.width + column, row + 2 * column);
}

template <class Body>
void forPairs(Queue& queue, const WeightLayout& layout, const Body& body) {
  const std::vector<PairRun> runs = pairRuns(layout);
  if (runs.empty()) return;
  const unsigned blocks = runs.back().firstBlock + blocksFor(runs.back().units, kPairThreads);
  const auto count = static_cast<int>(runs.size());
  launch(forPairsKernel<Body>, blocks, kPairThreads, 0, onGpu(queue).stream(), onGpu(queue).stage(runs.data(), count),
         count, body);
}

__device__ inline unsigned makePair(float even, float odd) {
  return toBFloat16(even).bits | static_cast<unsigned>(toBFloat16(odd).bits) << 16;
}

__device__ inline void storePairs(BFloat16* to, const float4& even, const float4& odd) {
  *reinterpret_cast<uint4*>(to) = {makePair(even.x, odd.x), makePair(even.y, odd.y), makePair(even.z, odd.z),
                                   makePair(even.w, odd.w)};
}

}  // namespace lockstep::kernels::cuda
