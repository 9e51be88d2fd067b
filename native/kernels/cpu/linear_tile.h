// The register tile of the matrix products: R rows by V vectors of 16 columns of chains (kernels.h). Which tile
// computes an element, and where its accumulator waits between two calls, never changes its chain or its tree.
#pragma once

#include "kernels/cpu/simd.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

// Registers: R V accumulators, V of the right operand, one broadcast. AVX-512 has 32 registers of one Vec: 14 x 2 needs
// 2 loads and 14 broadcasts for 28 FMAs. AVX2 has 16 registers of half a Vec: 6 x 1 needs 2 loads and 6 broadcasts for
// 12 FMAs. Few rows take wider tiles instead, so that enough chains hide the latency of FMA and a panel is read in one
// sweep.
// kDepth: steps of a chain done at once, in float32 elements or in bfloat16 pairs: long enough that reading and writing
// the accumulators around them costs little, short enough that a strip of the right operand and a block of the left one
// fit the second-level cache (1 MiB or more where there is AVX-512, else 512 KiB).
#ifdef __AVX512F__
constexpr int kTileRows = 14, kTileVectors = 2;
constexpr int kRowsOfWidth[5] = {0, 4, 14, 0, 6};  // most rows of a tile of 1, 2, 4 vectors
constexpr bool kLeftByRows = false;
constexpr int64_t kDepth = 512;
constexpr int64_t sweepDepth(int64_t) {
  return kDepth;
}
#else
constexpr int kTileRows = 6, kTileVectors = 1;
constexpr int kRowsOfWidth[5] = {0, 6, 2, 0, 1};
constexpr bool kLeftByRows = true;
constexpr int64_t kDepth = 384;
// Rows of a panel that few rows of the left operand sweep at once, in tiles narrower than the panel: a stretch that is
// short enough that memory sees it read from front to back, and stays in the first cache for the next tile
// (docs/performance.md).
constexpr int64_t sweepDepth(int64_t rows) {
  return rows == 1 ? kDepth : rows <= kTileRows ? 16 : rows <= 16 ? 64 : kDepth;
}
#endif
constexpr int64_t kTileColumns = 16 * kTileVectors;

// Floats of a row of a packed left operand: rows of equal distance must not meet in the same sets of the first cache.
constexpr int64_t kLeftFloats = kDepth + (kLeftByRows ? 16 : 0);
constexpr int64_t kStepsPerFetch = 16;
// Packed tiles lie one after another: while one is used, the next comes nearer. Streams of the hardware end at each
// page.
constexpr int64_t kLeftAhead = 1024;  // floats

// The left operand of a tile lies step by step, R numbers each: the tile reads it front to back, and every row is a
// short offset from one pointer. Or, with six rows (kLeftByRows), row by row, kLeftFloats apart: then packing a row is
// copying it.
enum class Form : uint8_t {
  kPlain,  // right operand float32 in chain order: a step is one element
  kPairs,  // right operand bfloat16 pairs: a step is a pair
};

// Dwords between what a tile of four vectors uses and what it fetches. With AVX2 the hardware alone is faster where a
// step is short enough that many of them are under way together (docs/performance.md).
template <Form kForm>
constexpr int64_t kPanelAhead = !kLeftByRows            ? 1024
                                : kForm == Form::kPairs ? 128
                                                        : 0;

#ifdef __AVX512BF16__
constexpr bool kPairArithmetic = true;  // bfloat16 operands stay pairs up to the product
#else
constexpr bool kPairArithmetic =
    false;  // left operands are widened while they are packed: a pair is two steps, odd first
#endif

// One call: acc = from or zero; acc = chain(acc, left, right); acc = level + acc for each finished level; acc = acc +
// bias; acc = residual + acc; to = acc. The null ones are left out.
struct TileCall {
  const float* left;
  int64_t leftStep;  // floats between steps: the rows that are packed together; 1 by rows
  bool leftByRows;
  const float* right;
  int64_t rightStep;  // dwords between steps
  int64_t steps;
  const float* from;
  const float* levels;
  int64_t levelStride;
  int levelCount;
  int64_t stride;  // of from and levels
  const float* bias;
  const float* residual;
  int64_t residualStride;
  float* to;
  int64_t toStride;
  // What comes next: every kStepsPerFetch steps fetch a row of it, aheadLines cache lines wide. A tile of four vectors
  // is alone with its panel and fetches what it will read itself.
  const float* ahead;
  int64_t aheadStride;
  int aheadLines;
};

// rows 1..kTileRows; vectors 1, 2 or 4. Rows that the width cannot hold at once are done in several tiles.
void runTile(Form form, int rows, int vectors, const TileCall& call);

// How many vectors at once suit `rows` rows of a panel with `vectors` left: 4, 2 or 1.
LOCKSTEP_INLINE int panelVectors(int64_t rows, int64_t vectors) {
  if (vectors >= 4 && rows <= kRowsOfWidth[4]) return 4;
  return vectors >= 2 && rows <= kRowsOfWidth[2] ? 2 : 1;
}

// Rows dealt evenly, two by two, to as few tiles as can hold them, and a range of these tiles: first .. last - 1.
// Divides once, when it is made.
struct Tiles {
  int64_t rows, first, last;
  int64_t each, longer;  // pairs of rows of a tile; how many tiles, the first ones, have one pair more

  explicit LOCKSTEP_MEMBER Tiles(int64_t count) : rows(count), first(0) {
    last = (rows + kTileRows - 1) / kTileRows;
    const int64_t pairs = (rows + 1) / 2, tiles = last > 0 ? last : 1;
    each = pairs / tiles;
    longer = pairs - each * tiles;
  }
  LOCKSTEP_MEMBER Tiles range(int64_t from, int64_t to) const {
    Tiles some = *this;
    some.first = from;
    some.last = to;
    return some;
  }
  LOCKSTEP_MEMBER int64_t begin(int64_t i) const {
    const int64_t row = 2 * (i * each + (i < longer ? i : longer));
    return row < rows ? row : rows;
  }
  LOCKSTEP_MEMBER int64_t count(int64_t i) const { return begin(i + 1) - begin(i); }
  LOCKSTEP_MEMBER int64_t size() const { return last - first; }
  LOCKSTEP_MEMBER int64_t origin() const { return begin(first); }
  LOCKSTEP_MEMBER int64_t allRows() const { return begin(last) - origin(); }
};

}  // namespace lockstep::kernels::LOCKSTEP_ISA
