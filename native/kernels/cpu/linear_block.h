// The blocked matrix product behind linear and its gradient to the input: strips of columns times blocks of rows, each
// computed from packed operands in cache, chain after chain and leaf after leaf of the tree, then handed to a finish.
#pragma once

#include "core/queue.h"
#include "kernels/cpu/linear_pack.h"
#include "kernels/kernels.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

// Neighbouring columns of a product that one tile width covers.
struct Group {
  int64_t part;    // of the weight
  int64_t column;  // first column within the part
  int64_t at;      // where they stand in the block's accumulators
  int64_t output;  // column of the output matrix
  int64_t count;   // of the 16 * vectors columns, how many exist
  int vectors;
};

// A strip's staged right operand (kDepth x 128 floats) and a block of the packed left operand share the second-level
// cache.
constexpr int64_t kStripColumns = 128;
constexpr int64_t kStripSlack = 48;                   // columns that a strip cut at odd places may cover on top
constexpr int64_t kLeftTiles = 16;                    // tiles whose left operands are in cache together
constexpr int64_t kBlockTiles = 512 / kTileRows + 2;  // tiles for which a strip's right operand is staged once
constexpr int64_t kStripStride = kStripColumns + kStripSlack;
constexpr int kMaxGroups = static_cast<int>(kStripStride / 16);

struct Strip {
  Group groups[kMaxGroups];
  int count = 0;
  int64_t columns = 0;
  // Of a strip that pairs gate with up columns: the gate columns (begin .. end - 1 of the part stand at 0) and where
  // the accumulators of the up columns begin.
  int64_t begin = 0, end = 0, second = 0;

  // Columns begin .. end - 1 of a part, cut at panels and tile widths. Begins at a multiple of 16 at or before `begin`.
  void add(int64_t part, int64_t begin, int64_t end, int64_t output) {
    for (int64_t c = begin / 16 * 16; c < end;) {
      const int64_t room = smaller((kPanel - c % kPanel) / 16, (end - c + 15) / 16);
      const int vectors = room >= kTileVectors ? kTileVectors : 1;
      groups[count++] = {part, c, columns, output + c, smaller(16 * vectors, end - c), vectors};
      columns += 16 * vectors;
      c += 16 * vectors;
    }
  }
};

// Strip `index` of the columns of `parts` parts, counted in tile widths; size(p) columns in part p, output(p) the
// first.
template <class Size, class Output>
LOCKSTEP_INLINE void cutStrip(int64_t index, int64_t parts, const Size& size, const Output& output, Strip& strip) {
  int64_t first = index * (kStripColumns / kTileColumns), left = kStripColumns / kTileColumns;
  for (int64_t p = 0; p < parts && left > 0; ++p) {
    const int64_t units = (size(p) + kTileColumns - 1) / kTileColumns, some = smaller(left, units - first);
    if (some > 0) {
      strip.add(p, first * kTileColumns, smaller((first + some) * kTileColumns, size(p)), output(p));
      left -= some;
    }
    first = first > units ? first - units : 0;
  }
}
template <class Size>
LOCKSTEP_INLINE int64_t countStrips(int64_t parts, const Size& size) {
  int64_t units = 0;
  for (int64_t p = 0; p < parts; ++p) units += (size(p) + kTileColumns - 1) / kTileColumns;
  return (units * kTileColumns + kStripColumns - 1) / kStripColumns;
}

// A tree of leaves: level l of the tree holds the sum of 2^l finished leaves.
LOCKSTEP_INLINE int treeLevels(int64_t leaves) {
  return __builtin_ctzll(static_cast<uint64_t>(leaves));
}

// Where finished tiles may go without passing by a finish: float32 with an optional bias and residual. Null: nowhere.
struct Direct {
  View<float> y;
  View<const float> residual;
  const float* bias = nullptr;

  // Only whole vectors can be stored by a tile.
  LOCKSTEP_MEMBER bool takes(const Group& group) const { return !y.empty() && group.count == 16 * group.vectors; }
  LOCKSTEP_MEMBER void aim(TileCall& call, const Tiles& tiles, int64_t i, int64_t column) const {
    const int64_t row = tiles.begin(i);
    call.bias = bias == nullptr ? nullptr : bias + column;
    call.residual = residual.empty() ? nullptr : residual.row(row) + column;
    call.residualStride = residual.stride;
    call.to = y.row(row) + column;
    call.toStride = y.stride;
  }
};

LOCKSTEP_INLINE Direct directOutput(const Output& y, const float* bias) {
  if (y.kind == Output::Kind::kAdd) return {y.f32, y.residual, bias};
  if (y.kind == Output::Kind::kStore) return {y.f32, {}, bias};
  if (y.operand.dtype != DType::kFloat32) return {};
  return {{y.operand.row<float>(0), y.operand.rows, y.operand.cols, y.operand.stride}, {}, bias};
}

// Products below this many FMAs run on the caller alone: waking a thread would cost more.
constexpr int64_t kTinyProduct = 50'000;

// body(task, thread) for every task.
template <class Body>
void deal(Queue& queue, int64_t tasks, int64_t fmas, const Body& body) {
  if (fmas < kTinyProduct) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  queue.pool().forEach(tasks, body);
}

// A product cut into leaves (chains whose sums form the tree) and strips. Its methods are called per strip and per
// block of steps, never per element.
struct BlockedProduct {
  Direct direct;

  virtual int64_t leaves() const = 0;
  virtual int64_t steps(int64_t leaf) const = 0;  // of the leaf's chain
  virtual int64_t fmas(int64_t rows) const = 0;
  virtual Form form() const = 0;
  // Packs the left operand of one tile: steps first .. first + steps - 1 of rows row .. row + rows - 1.
  virtual void pack(int64_t leaf, int64_t first, int64_t steps, int64_t row, int64_t rows, float* to) const = 0;
  // Where the right operand of a group lies and how far apart its steps are; it may be staged into `stage`.
  virtual const float* right(int64_t leaf, const Group& group, int64_t first, int64_t steps, float* stage,
                             int64_t& step) const = 0;
  virtual int64_t strips() const = 0;
  virtual void strip(int64_t index, Strip& strip) const = 0;
  // Takes finished rows of a strip, `stride` apart: the groups that `direct` does not take.
  virtual void finish(const float* accumulators, int64_t stride, const Strip& strip, int64_t row,
                      int64_t rows) const = 0;

 protected:
  explicit BlockedProduct(Direct to) : direct(to) {}
  ~BlockedProduct() = default;
};

// All rows of a product.
void multiply(Queue& queue, const BlockedProduct& product, int64_t rows);

// --- where results go ------------------------------------------------------------------------------------

LOCKSTEP_INLINE void putOperand(const Operand& y, int64_t row, int64_t col, Vec x, int64_t count) {
  if (y.dtype == DType::kFloat32) {
    storeUpTo(y.row<float>(row) + col, x, count);
  } else {
    storeUpTo(y.row<BFloat16>(row) + col, x, count);
  }
}

LOCKSTEP_INLINE void put(const Output& y, int64_t row, int64_t col, Vec x, int64_t count) {
  switch (y.kind) {
    case Output::Kind::kStore:
      return storeUpTo(y.f32.row(row) + col, x, count);
    case Output::Kind::kRound:
      return putOperand(y.operand, row, col, x, count);
    case Output::Kind::kAdd:
      return storeUpTo(y.f32.row(row) + col, loadUpTo(y.residual.row(row) + col, count) + x, count);
  }
}

// put(row, column, value + bias, count) for every vector of a finished block that has not gone its way directly.
template <class Put>
LOCKSTEP_INLINE void finishBlock(const float* accumulators, int64_t stride, const Strip& strip, int64_t row,
                                 int64_t rows, const Direct& direct, const float* bias, const Put& put) {
  for (int g = 0; g < strip.count; ++g) {
    const Group& group = strip.groups[g];
    if (direct.takes(group)) continue;
    for (int64_t c = 0; c < group.count; c += 16) {
      const int64_t count = smaller(16, group.count - c), column = group.output + c;
      const Vec offset = bias == nullptr ? zero() : loadUpTo(bias + column, count);
      const float* from = accumulators + group.at + c;
      for (int64_t r = 0; r < rows; ++r, from += stride) {
        put(row + r, column, bias == nullptr ? loadu(from) : loadu(from) + offset, count);
      }
    }
  }
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
