// What both passes of attentionBackward share: a call, its tiles, and what the gradient of a score is.
#pragma once

#include "device.h"

#include "kernels/cuda/cuda.h"

namespace lockstep::kernels::cuda::attending_backward {

constexpr int kThreads = 128, kTile = kPagePositions;
constexpr int kWarpRows = 16, kStageRows = 32;  // of a tile; queries that the key pass holds at once
constexpr int kWidest = 128, kWidestUnaligned = 96;
constexpr int kPlainRows = 16;
constexpr int kNoWindow = 1 << 30;

struct Tile {
  int32_t rowBegin, length;  // of the sequence
  int32_t begin;             // first position of the tile
  int32_t pages;             // where the sequence's pages begin in the table
};

struct Call {
  AttentionShape shape;
  int window;  // kNoWindow: none
  Operand q, out, dOut;
  KvPages kv;
  View<const float> logSumExp;
  View<float> dqkv;
  const int32_t *pages, *columns;  // of dqkv: where its H query, G key and G value heads begin
  float* delta;                    // [H, T]
  // [sharers, T, 2, G, K]: dk and dv of each part that shares a key/value head; null when no two parts do.
  float* partial;

  __device__ int width() const { return static_cast<int>(shape.headWidth); }
  __device__ int heads() const { return static_cast<int>(shape.heads); }
  __device__ int keyValueHeads() const { return static_cast<int>(shape.keyValueHeads); }
  __device__ int sharers() const { return partial == nullptr ? 1 : static_cast<int>(shape.parts) / keyValueHeads(); }
  __device__ int keyValueHeadOf(int h) const { return h / (heads() / keyValueHeads()); }
  // First key that the query at position i sees; may be negative.
  __device__ int firstKey(int i) const { return i - window + 1; }
  __device__ int queryColumn(int h) const { return columns[h]; }
  __device__ int keyValueColumn(int g, bool isValue) const {
    return columns[heads() + (isValue ? keyValueHeads() : 0) + g];
  }
  // How many queries, from the one at its own position on, see key j.
  __device__ int queriesOf(int j, int length) const {
    const int left = length > j ? length - j : 0;
    return window < left ? window : left;
  }
  // Where dk, or dv, of key/value head g and one sharer is written: data + row * stride.
  __device__ View<float> keyValueGradient(int g, int sharer, bool isValue) const {
    const int64_t columns = 2 * shape.keyValueHeads * shape.headWidth;
    if (partial == nullptr) {
      return {dqkv.data + keyValueColumn(g, isValue), dqkv.rows, width(), dqkv.stride};
    }
    const int64_t column = ((isValue ? keyValueHeads() : 0) + g) * shape.headWidth;
    return {partial + sharer * dqkv.rows * columns + column, dqkv.rows, width(), columns};
  }
};

// p and dS of one pair, given its score q k and dP.
struct Gradient {
  float p, dS;
};
__device__ inline Gradient gradientOf(float scale, float score, float logSumExp, float dP, float delta, bool visible) {
  const float p = exp(scale * score - logSumExp), dS = p * (dP - delta) * scale;
  return {visible ? p : 0.0f, visible ? dS : 0.0f};
}

}  // namespace lockstep::kernels::cuda::attending_backward
