// The register tile of the matrix products: R rows by V vectors of 16 columns of chains (kernels.h). Which tile
// computes an element, and where its accumulator waits between two calls, never changes its chain or its tree.
#pragma once

#include "kernels/cpu/simd.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

// Registers: R V accumulators, V of the right operand, one broadcast. AVX-512 has 32 registers of one Vec: 14 x 2 needs
// 2 loads and 14 broadcasts for 28 FMAs. AVX2 has 16 registers of half a Vec: 6 x 1 needs 2 loads and 6 broadcasts for
// 12 FMAs. Few rows take wider tiles instead, so that enough chains hide the latency of FMA and a panel is read in one
// sweep.
#ifdef __AVX512F__
constexpr int kTileRows = 14, kTileVectors = 2;
constexpr int kRowsOfWidth[5] = {0, 4, 14, 0, 6};  // most rows of a tile of 1, 2, 4 vectors
#else
constexpr int kTileRows = 6, kTileVectors = 1;
constexpr int kRowsOfWidth[5] = {0, 6, 2, 0, 1};
#endif
constexpr int64_t kTileColumns = 16 * kTileVectors;

// Steps of a chain that are held in cache at once, in float32 elements or in bfloat16 pairs. The right operand of a
// tile, kDepth x 32 x 4 bytes, fills the first-level cache while the rows of the left one stream through.
constexpr int64_t kDepth = 256;
// Rows of a packed left operand are this far apart: a constant, so that every row is an offset from one pointer, and
// one cache line more than kDepth, so that rows do not share a set.
constexpr int64_t kLeftStride = kDepth + 16;
// The left operand of a weight gradient has its steps one after another, each padded to a whole number of loads.
constexpr int64_t kLeftStep = kTileRows > 8 ? 16 : 8;

enum class Form : uint8_t {
  kRows,       // left operand in rows, right float32: one element a step, staged in chain order or a panel as it lies
  kPairPanel,  // left operand in rows, right a bfloat16 panel as it lies: one pair a step
  kSteps,      // left operand in steps, right float32 staged in chain order
  kPairSteps,  // left operand in steps of pairs, right staged pairs (AVX512-BF16 only)
};

#ifdef __AVX512BF16__
constexpr bool kPairArithmetic = true;  // bfloat16 operands stay pairs up to the product
#else
constexpr bool kPairArithmetic = false;  // they are widened while they are packed, odd element of a pair first
#endif

// One call: acc = from or zero; acc = chain(acc, left, right); acc = level + acc for each finished level; to = acc.
struct TileCall {
  const float* left;
  const float* right;
  int64_t rightStep;  // dwords between steps
  int64_t steps;
  int64_t prefetch;  // dwords from the data read to the data wanted next
  const float* from;
  const float* levels;
  int64_t levelStride;
  int levelCount;
  float* to;
  int64_t stride;  // of from, levels and to
};

// rows 1..kTileRows; vectors 1, 2 or 4. Rows that the width cannot hold at once are done in several tiles.
void runTile(Form form, int rows, int vectors, const TileCall& call);

// How many vectors at once suit `rows` rows of a panel with `vectors` left: 4, 2 or 1.
LOCKSTEP_INLINE int panelVectors(int64_t rows, int64_t vectors) {
  if (vectors >= 4 && rows <= kRowsOfWidth[4]) return 4;
  return vectors >= 2 && rows <= kRowsOfWidth[2] ? 2 : 1;
}

// Rows are dealt evenly, two by two, to as few tiles as can hold them: tile i of `rows` rows begins at tileBegin(rows,
// i).
LOCKSTEP_INLINE int64_t tileCount(int64_t rows) {
  return (rows + kTileRows - 1) / kTileRows;
}
LOCKSTEP_INLINE int64_t tileBegin(int64_t rows, int64_t i) {
  const int64_t tiles = tileCount(rows);
  return i == tiles ? rows : (rows + 1) / 2 * i / tiles * 2;
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
