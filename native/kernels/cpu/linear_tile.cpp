#include "kernels/cpu/linear_tile.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

namespace {

// acc[r][v] += left[r] * b[v] for a step of one element.
template <int64_t kLeftRow, int R, int V>
LOCKSTEP_INLINE void multiplyAdd(Vec (&acc)[R][V], const float* left, const Vec (&b)[V]) {
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
    if constexpr (kTileVectors == 2 && V == 2) {
      // Loads and instructions are both scarce: some rows broadcast within the FMA, the others once before it.
      if (r % 2 == 1 && r < 10) {
        acc[r][0] = fmaBroadcast(left + r, b[0], acc[r][0]);
        acc[r][1] = fmaBroadcast(left + r, b[1], acc[r][1]);
        continue;
      }
    }
    const Vec a = Vec::broadcast(left[r * kLeftRow]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = fma(a, b[v], acc[r][v]);
  }
}

// Adds one step (one element, or one pair) to every chain of the tile.
template <Form kForm, int64_t kLeftRow, int R, int V>
LOCKSTEP_INLINE void step(Vec (&acc)[R][V], const float* left, int64_t leftStep, const float* right) {
  if constexpr (kForm == Form::kPairs && kPairArithmetic) {
    Pairs b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = loadPairs(right + 16 * v);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const Pairs a = broadcastPair(__builtin_bit_cast(uint32_t, left[r]));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = dotPair(acc[r][v], a, b[v]);
    }
  } else if constexpr (kForm == Form::kPairs) {
    Vec b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = odd(loadPairs(right + 16 * v));
    multiplyAdd<kLeftRow>(acc, left, b);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = even(loadPairs(right + 16 * v));
    multiplyAdd<kLeftRow>(acc, left + leftStep, b);
  } else {
    Vec b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = loadu(right + 16 * v);
    multiplyAdd<kLeftRow>(acc, left, b);
  }
}

template <Form kForm, int64_t kLeftRow, int R, int V>
void tile(const TileCall& call) {
  Vec acc[R][V];
  if (call.from == nullptr) {
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = zero();
    }
  } else {
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = loadu(call.from + r * call.stride + 16 * v);
    }
  }
  // What the end needs comes nearer while the chains run.
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) __builtin_prefetch(call.to + r * call.toStride + 16 * v, 1);
  }
  for (int level = 0; level < call.levelCount; ++level) {
    const float* from = call.levels + level * call.levelStride;
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) __builtin_prefetch(from + r * call.stride + 16 * v);
    }
  }
  const float* left = call.left;
  const float* right = call.right;
  const int64_t leftStep = call.leftStep, rightStep = call.rightStep;
  const int64_t leftAdvance = kForm == Form::kPairs && !kPairArithmetic ? 2 * leftStep : leftStep;
  const float* ahead = call.ahead;
  for (int64_t k = call.steps; k > 0;) {
    const int64_t some = k < kStepsPerFetch ? k : kStepsPerFetch;
    if constexpr (V < 4) {
      for (int line = 0; line < call.aheadLines; ++line) __builtin_prefetch(ahead + 16 * line, 0, 2);
      ahead += call.aheadStride;
    }
    if constexpr (kLeftRow != 1 && R == kTileRows) {
#pragma GCC unroll 14
      for (int r = 0; r < R; ++r) __builtin_prefetch(left + (R + r) * kLeftRow);
    }
    for (int64_t i = 0; i < some; ++i) {
      step<kForm, kLeftRow, R, V>(acc, left, leftStep, right);
      if constexpr (V == 4 && kPanelAhead < kForm >> 0) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) __builtin_prefetch(right + kPanelAhead<kForm> + 16 * v);
      }
      if constexpr (V == 2) __builtin_prefetch(left + kLeftAhead, 0, 2);
      left += leftAdvance;
      right += rightStep;
    }
    k -= some;
  }
  for (int level = 0; level < call.levelCount; ++level) {
    const float* from = call.levels + level * call.levelStride;
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = loadu(from + r * call.stride + 16 * v) + acc[r][v];
    }
  }
  if (call.bias != nullptr) {
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] + loadu(call.bias + 16 * v);
    }
  }
  if (call.residual != nullptr) {
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = loadu(call.residual + r * call.residualStride + 16 * v) + acc[r][v];
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) storeu(call.to + r * call.toStride + 16 * v, acc[r][v]);
  }
}

using TileFunction = void (*)(const TileCall&);

// Above eight rows only even numbers have a tile of their own: half the code, and only the last tile of a block is odd.
template <Form kForm, int64_t kLeftRow, int V, int R>
constexpr TileFunction tileOrNull() {
  if constexpr (R <= kRowsOfWidth[V] && (R <= 8 || R % 2 == 0)) {
    return tile<kForm, kLeftRow, R, V>;
  } else {
    return nullptr;
  }
}

template <Form kForm, int64_t kLeftRow, int V>
constexpr TileFunction kTiles[15] = {
    nullptr,
    tileOrNull<kForm, kLeftRow, V, 1>(),
    tileOrNull<kForm, kLeftRow, V, 2>(),
    tileOrNull<kForm, kLeftRow, V, 3>(),
    tileOrNull<kForm, kLeftRow, V, 4>(),
    tileOrNull<kForm, kLeftRow, V, 5>(),
    tileOrNull<kForm, kLeftRow, V, 6>(),
    tileOrNull<kForm, kLeftRow, V, 7>(),
    tileOrNull<kForm, kLeftRow, V, 8>(),
    tileOrNull<kForm, kLeftRow, V, 9>(),
    tileOrNull<kForm, kLeftRow, V, 10>(),
    tileOrNull<kForm, kLeftRow, V, 11>(),
    tileOrNull<kForm, kLeftRow, V, 12>(),
    tileOrNull<kForm, kLeftRow, V, 13>(),
    tileOrNull<kForm, kLeftRow, V, 14>(),
};

template <Form kForm, int64_t kLeftRow>
TileFunction tileOfWidth(int rows, int vectors) {
  if (vectors == 4) return kTiles<kForm, kLeftRow, 4>[rows];
  if (vectors == 2) return kTiles<kForm, kLeftRow, 2>[rows];
  return kTiles<kForm, kLeftRow, 1>[rows];
}

template <Form kForm>
TileFunction tileFor(int rows, int vectors, bool leftByRows) {
  if constexpr (kLeftByRows) {
    if (leftByRows) return tileOfWidth<kForm, kLeftFloats>(rows, vectors);
  }
  return tileOfWidth<kForm, 1>(rows, vectors);
}

}  // namespace

void runTile(Form form, int rows, int vectors, const TileCall& call) {
  const TileFunction function = form == Form::kPlain ? tileFor<Form::kPlain>(rows, vectors, call.leftByRows)
                                                     : tileFor<Form::kPairs>(rows, vectors, call.leftByRows);
  if (function != nullptr) return function(call);
  const int half = (rows + 1) / 2;
  TileCall rest = call;
  runTile(form, half, vectors, call);
  rest.left += half * (call.leftByRows ? kLeftFloats : 1);
  if (rest.from != nullptr) rest.from += half * call.stride;
  if (rest.levels != nullptr) rest.levels += half * call.stride;
  rest.aheadLines = 0;
  if (rest.residual != nullptr) rest.residual += half * call.residualStride;
  rest.to += half * call.toStride;
  runTile(form, rows - half, vectors, rest);
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
