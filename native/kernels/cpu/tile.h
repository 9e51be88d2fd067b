// The inner product of every matrix operation: R x 16 C chains held in registers (kernels.h). Which tile computes an element,
// and where its accumulator waits between two calls, never changes its chain.
#pragma once

#include <bit>

#include "kernels/cpu/simd.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kHasDotPair = true;
#else
constexpr bool kHasDotPair = false;
#endif

// 6 x 64 on AVX-512: 24 of 32 registers accumulate, 4 hold the right operand, 1 the broadcast: 10 loads for 24 FMAs, and 24
// chains hide the latency of FMA. 6 x 16 on AVX2, where a Vec takes two of the 16 registers.
constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 1;
#endif

// How the steps of a chain lie in memory.
//   kPlain   one float32 a step; bfloat16 operands are widened before, odd element of a pair first.
//   kPairs   one 32-bit pair a step, for VDPBF16PS, or split on the way where widening before would not pay.
enum class Steps : uint8_t { kPlain, kPairs };

// Left operand: step k of row r is at data + r * row + k * step. Right: 16 C columns at data + k * step.
struct Left {
  const float* data;
  int64_t row, step;
};
struct Right {
  const float* data;
  int64_t step;
};

template <Steps kSteps, int R, int C>
LOCKSTEP_INLINE void tile(Left a, Right b, int64_t steps, float* c, int64_t ldc, bool fresh) {
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) acc[r][j] = fresh ? zero() : loadu(c + r * ldc + 16 * j);
  }
  const float* left = a.data;
  const float* right = b.data;
  for (int64_t k = 0; k < steps; ++k, left += a.step, right += b.step) {
    if constexpr (kSteps == Steps::kPlain) {
      Vec y[C];
      for (int j = 0; j < C; ++j) y[j] = loadu(right + 16 * j);
      for (int r = 0; r < R; ++r) {
        const Vec x = Vec::broadcast(left[r * a.row]);
        for (int j = 0; j < C; ++j) acc[r][j] = fma(x, y[j], acc[r][j]);
      }
    } else if constexpr (kHasDotPair) {
      Pairs y[C];
      for (int j = 0; j < C; ++j) y[j] = loadPairs(right + 16 * j);
      for (int r = 0; r < R; ++r) {
        const Pairs x = broadcastPair(std::bit_cast<uint32_t>(left[r * a.row]));
        for (int j = 0; j < C; ++j) acc[r][j] = dotPair(acc[r][j], x, y[j]);
      }
    } else {
      for (int half = 1; half >= 0; --half) {
        Vec y[C];
        for (int j = 0; j < C; ++j) y[j] = half == 1 ? odd(loadPairs(right + 16 * j)) : even(loadPairs(right + 16 * j));
        for (int r = 0; r < R; ++r) {
          const uint32_t pair = std::bit_cast<uint32_t>(left[r * a.row]);
          const Vec x = Vec::broadcast(std::bit_cast<float>(half == 1 ? pair & 0xffff0000u : pair << 16));
          for (int j = 0; j < C; ++j) acc[r][j] = fma(x, y[j], acc[r][j]);
        }
      }
    }
    if constexpr (R == 1) {
      for (int j = 0; j < C; ++j) __builtin_prefetch(right + 1024 + 16 * j);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) storeu(c + r * ldc + 16 * j, acc[r][j]);
  }
}

// `vectors` (1..4) vectors of columns, as wide tiles as the registers allow.
template <Steps kSteps, int R>
void tileColumns(Left a, Right b, int64_t steps, int vectors, float* c, int64_t ldc, bool fresh) {
  if constexpr (kTileVectors == 4) {
    switch (vectors) {
      case 4: return tile<kSteps, R, 4>(a, b, steps, c, ldc, fresh);
      case 3: return tile<kSteps, R, 3>(a, b, steps, c, ldc, fresh);
      case 2: return tile<kSteps, R, 2>(a, b, steps, c, ldc, fresh);
      default: return tile<kSteps, R, 1>(a, b, steps, c, ldc, fresh);
    }
  } else {
    for (int j = 0; j < vectors; ++j) tile<kSteps, R, 1>(a, {b.data + 16 * j, b.step}, steps, c + 16 * j, ldc, fresh);
  }
}

// rows 1..6.
template <Steps kSteps>
LOCKSTEP_INLINE void tileRows(int rows, Left a, Right b, int64_t steps, int vectors, float* c, int64_t ldc, bool fresh) {
  switch (rows) {
    case 6: return tileColumns<kSteps, 6>(a, b, steps, vectors, c, ldc, fresh);
    case 5: return tileColumns<kSteps, 5>(a, b, steps, vectors, c, ldc, fresh);
    case 4: return tileColumns<kSteps, 4>(a, b, steps, vectors, c, ldc, fresh);
    case 3: return tileColumns<kSteps, 3>(a, b, steps, vectors, c, ldc, fresh);
    case 2: return tileColumns<kSteps, 2>(a, b, steps, vectors, c, ldc, fresh);
    default: return tileColumns<kSteps, 1>(a, b, steps, vectors, c, ldc, fresh);
  }
}

}  // namespace
}  // namespace lockstep::kernels::LOCKSTEP_ISA
