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
// The left operand of a tile of R rows is packed step by step, R numbers each: the tile reads it front to back, and
// every row is a short offset from one pointer.
enum class Form : uint8_t {
  kStaged,  // right operand float32, staged in chain order: a step is one element
  kPanel,   // right operand a float32 panel as it lies, prefetched
  kPairs,   // right operand bfloat16 pairs, staged or a panel as it lies, prefetched: a step is a pair
};

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
  int64_t leftStep;  // floats between steps: the rows that are packed together
  const float* right;
  int64_t rightStep;  // dwords between steps
  int64_t steps;
  int64_t prefetch;  // dwords from the data read to the data wanted next
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
