// How a weight matrix W [out, in] of y = x W^T lies in memory: prepacked, part by part, panel by panel.
//
// A weight is cut into `numerics.parts` parts along `out` (column-parallel: qkv, gate/up, vocabulary) or along `in`
// (row-parallel: attention output, MLP down), or not at all (one part). Each part is a matrix [n, k] of its own, stored
// as panels of 64 rows of W (the last panel narrower, its width rounded up to 16); a panel of width w holds
//   float32:  [kPadded][w]              element (n, k) at k * w + n
//   bfloat16: [kPadded / 2][w][2]       element (n, k) at (k / 2) * 2w + 2n + k % 2
// kPadded is k rounded up to even; padding is zero. Gradients, master weights and moments are float32 in the float32
// order whatever the compute dtype, so publishing a weight is elementwise on pairs of rows.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace lockstep::kernels {

constexpr int64_t kPanel = 64;       // columns of a full panel
constexpr int64_t kPanelGrain = 16;  // a narrow panel's width is a multiple of this

constexpr int64_t roundUp(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}

enum class Split : uint8_t { kNone, kOut, kIn };

struct Part {
  int64_t outBegin, out;  // rows of W in this part
  int64_t inBegin, in;    // columns of W in this part
  int64_t offset;         // first element, the same in every dtype

  constexpr int64_t inPadded() const { return roundUp(in, 2); }
  constexpr int64_t panels() const { return (out + kPanel - 1) / kPanel; }
  constexpr int64_t panelWidth(int64_t panel) const {
    const int64_t left = out - panel * kPanel;
    return left >= kPanel ? kPanel : roundUp(left, kPanelGrain);
  }
  constexpr int64_t panelOffset(int64_t panel) const { return offset + panel * kPanel * inPadded(); }
  constexpr int64_t elements() const {
    return out == 0 ? 0 : ((panels() - 1) * kPanel + panelWidth(panels() - 1)) * inPadded();
  }
};

struct WeightLayout {
  int64_t out = 0, in = 0;
  Split split = Split::kNone;
  std::vector<Part> parts;  // a power of two of them; a part may be empty (out == 0)
  int64_t elements = 0;

  // sizes: rows of W in each part (split out) or columns (split in); one entry equal to out for kNone.
  static WeightLayout make(int64_t out, int64_t in, Split split, const std::vector<int64_t>& sizes) {
    WeightLayout layout{out, in, split, {}, 0};
    int64_t begin = 0;
    for (const int64_t size : sizes) {
      Part part =
          split == Split::kIn ? Part{0, out, begin, size, layout.elements} : Part{begin, size, 0, in, layout.elements};
      layout.elements += part.elements();
      begin += size;
      layout.parts.push_back(part);
    }
    return layout;
  }
};

struct Weight {
  const WeightLayout* layout = nullptr;
  const void* data = nullptr;  // in the compute dtype
  DType dtype = DType::kFloat32;
};

struct WeightGradient {
  const WeightLayout* layout = nullptr;
  float* data = nullptr;  // accumulated (+=), in the float32 order
};

}  // namespace lockstep::kernels
