// The index arrays of one call: which rows belong to which sequence, at which positions, in which pages.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace lockstep::model {

struct Batch {
  std::vector<int32_t> tokens, positions, targets;  // [T]; -1 on padding rows and where nothing is predicted
  std::vector<int32_t> rowBegin, length, offset;    // [B]
  std::vector<int32_t> pages;                       // [B, pageStride]
  int64_t pageStride = 0, pageCount = 0;

  int64_t rows() const { return static_cast<int64_t>(tokens.size()); }
  int64_t count() const { return static_cast<int64_t>(length.size()); }
  kernels::Sequences sequences() const {
    return {count(), rowBegin.data(), length.data(), offset.data(), pages.data(), pageStride};
  }

  // Whole sequences from position 0, each in pages of its own and from a multiple of `grain` rows on
  // (Kernels::rowGrain). tokens is packed without padding; targets are the next tokens.
  static Batch whole(const int32_t* tokens, const int32_t* lengths, int64_t count, int64_t grain);
};

}  // namespace lockstep::model
