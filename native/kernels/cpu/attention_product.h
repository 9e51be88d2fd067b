// The small matrix products of attention: every element of o is one chain (kernels.h) over the steps that its row may
// see, begun at zero or continued from o. Tiles of R rows by C vectors hold the chains in registers; which tile
// computes an element never changes its chain.
#pragma once

#include <cstdint>

namespace lockstep::kernels::LOCKSTEP_ISA {

#ifdef __AVX512BF16__
constexpr bool kDotPairInstruction = true;
#else
constexpr bool kDotPairInstruction = false;
#endif

// How the steps of a chain lie in memory, in units of 32 bits.
//   kPlain    one float32 per step, ascending.
//   kSwapped  bfloat16 values widened to float32; a group is a pair, its odd element first.
//   kPairs    a group is one unit that holds the pair (even in the low half).
enum class Chain : uint8_t { kPlain, kSwapped, kPairs };

// Step k of row r of the left operand is data[r * row + k * step].
struct Rows {
  const float* data;
  int64_t row, step;
};

// Step k of the right operand is the vectors from data + k * step.
struct Panel {
  const float* data;
  int64_t step;
};

// o [rows, 16 * vectors] = a b over `groups` groups from zero. columnEnd [rows], or null: columns of a row at or past
// it are not needed and may be left unwritten.
template <Chain kChain>
void multiply(Rows a, int64_t rows, Panel b, int64_t vectors, int64_t groups, const int32_t* columnEnd, float* o,
              int64_t ldo);

// o [rows, 16 * vectors] += a b, the chain of row r going over the positions begin[r]..end[r]-1 only; at most 64 of
// them. A range may begin or end inside a pair: the other half counts as zero times zero, whatever the operands hold
// there.
template <Chain kChain>
void accumulate(Rows a, int64_t rows, Panel b, int64_t vectors, const int32_t* begin, const int32_t* end, float* o,
                int64_t ldo);

}  // namespace lockstep::kernels::LOCKSTEP_ISA
