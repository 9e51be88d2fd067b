// Walking a bfloat16 weight in row pairs of its panels: the unit in which the float32 order and the bfloat16 order hold
// the same elements.
#pragma once

#include "kernels/cpu/rows.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

// body(offset, width) for every row pair of a range of pairs: rows k and k + 1 of a panel are the float32 elements at
// offset and offset + width, `width` of each; the bfloat16 pairs start at the same offset. Threads take ranges of
// pairs.
template <class Body>
LOCKSTEP_INLINE void forPairs(Queue& queue, const WeightLayout& layout, const Body& body) {
  for (const Part& part : layout.parts) {
    if (part.out == 0 || part.in == 0) continue;
    const int64_t pairs = part.inPadded() / 2, fullPanels = part.out / kPanel;
    forRanges(queue, fullPanels * pairs, 2 * kPanel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(part.offset + i * 2 * kPanel, kPanel);
    });
    if (part.out % kPanel == 0) continue;
    const int64_t width = part.panelWidth(fullPanels), offset = part.panelOffset(fullPanels);
    forRanges(queue, pairs, 2 * width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(offset + i * 2 * width, width);
    });
  }
}

}  // namespace
}  // namespace lockstep::kernels::LOCKSTEP_ISA
