// Backward attention in one pass per (sequence, key/value head): page by page of keys, and for each page head by head
// and tile by tile of queries, scores are recomputed in a 64 x 64 block. dk and dv of the page stay in scratch and see
// queries in order; dq is continued in memory and sees keys in order. Nothing is ever length x length.
#include "kernels/cpu/attention_tasks.h"
#include "kernels/cpu/cpu.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

constexpr int64_t kBlock = kPagePositions;  // queries and keys of a block

struct BackwardCall {
  const QkvLayout& layout;
  const Operand &q, &out, &dOut;
  const KvPages& kv;
  const Sequences& sequences;
  View<const float> logSumExp;
  View<float> dqkv;

  int64_t group() const { return layout.attention.heads / layout.attention.keyValueHeads; }
  // Parts that share a key/value head; their sums are joined by the tree.
  int64_t sharers() const {
    const int64_t parts = layout.attention.parts, heads = layout.attention.keyValueHeads;
    return parts > heads ? parts / heads : 1;
  }
};

// A matrix [positions, K] as the left operand of chains over K and as the right operand of chains over positions.
struct TwoWay {
  float *rows, *panel;
  int64_t rowUnits;
};

struct BackwardScratch {
  float *panels, *keysT, *valuesT, *scores, *dScores, *dq;
  float *p, *dS, *dSRows;  // as operands; kPairs only, else they are written over scores and dScores
  TwoWay q, dOut;
  float* sums;                  // dk and dv of the sharer at work, then of each level of the tree
  int64_t units, padded, size;  // K rounded up to 2 and to 16; floats of a [64, K] matrix

  float* dk(int64_t level) const { return sums + 2 * level * size; }
  float* dv(int64_t level) const { return dk(level) + size; }

  static BackwardScratch make(Carver& carver, int64_t width, int64_t sharers, bool pairs) {
    BackwardScratch s{};
    s.units = roundUp(width, 2);
    s.padded = roundUp(width, kPanelGrain);
    s.size = kBlock * s.padded;
    s.panels = carver.floats(kBlock * (s.units + s.padded));
    s.keysT = carver.floats(s.size);
    s.valuesT = carver.floats(kBlock * s.units);
    s.scores = carver.floats(kBlock * kBlock);
    s.dScores = carver.floats(kBlock * kBlock);
    s.dq = carver.floats(s.size);
    s.q = makeTwoWay(carver, s, pairs);
    s.dOut = makeTwoWay(carver, s, pairs);
    s.p = pairs ? carver.floats(kBlock / 2 * kBlock) : s.scores;
    s.dS = pairs ? carver.floats(kBlock / 2 * kBlock) : s.dScores;
    s.dSRows = pairs ? carver.floats(kBlock * kBlock / 2) : s.dScores;
    int64_t levels = 1;
    for (int64_t count = sharers; count > 1; count /= 2) ++levels;
    s.sums = carver.floats(2 * levels * s.size);
    return s;
  }

 private:
  static TwoWay makeTwoWay(Carver& carver, const BackwardScratch& s, bool pairs) {
    if (!pairs) {
      float* both = carver.floats(s.size);
      return {both, both, s.padded};
    }
    float* rows = carver.floats(kBlock * s.units / 2);
    return {rows, carver.floats(s.size / 2), s.units / 2};
  }
};

// How a left operand stored by positions of the block (p, dS: [64 queries][64 keys]) is walked, by chain kind: along a
// row (keys) or down a column (queries).
template <Chain kChain>
constexpr int64_t kRowUnits = kChain == Chain::kPairs ? kBlock / 2 : kBlock;

// to[c][r] = from[r][c] of a block of rows x 16, of which `columns` columns are wanted. Missing rows become zeros.
LOCKSTEP_INLINE void transposeBlock(const float* from, int64_t fromStride, int64_t rows, float* to, int64_t toStride,
                                    int64_t columns) {
  Vec block[16];
  for (int64_t r = 0; r < 16; ++r) block[r] = r < rows ? loadu(from + r * fromStride) : zero();
  transpose(block);
  for (int64_t c = 0; c < columns; ++c) storeu(to + c * toStride, block[c]);
}

// keysT [64 positions][K] and valuesT [K][64 positions] from a page's panels.
template <Chain kChain>
void transposePage(const PagePanels& panels, const BackwardScratch& s, int64_t width) {
  const auto valuePanel = [&](int64_t i) { return i / kPanel * kPanel * kBlock; };
  const auto valueWidth = [&](int64_t i) {
    const int64_t left = s.padded - i / kPanel * kPanel;
    return left < kPanel ? left : kPanel;
  };
  if constexpr (kChain == Chain::kPairs) {
    const uint16_t* key = reinterpret_cast<const uint16_t*>(panels.key);
    const uint16_t* value = reinterpret_cast<const uint16_t*>(panels.value);
    uint16_t* keysT = reinterpret_cast<uint16_t*>(s.keysT);
    uint16_t* valuesT = reinterpret_cast<uint16_t*>(s.valuesT);
    for (int64_t position = 0; position < kBlock; ++position) {
      uint16_t* out = keysT + position / 2 * 2 * s.padded + position % 2;
      for (int64_t i = 0; i < width; ++i) out[2 * i] = key[i / 2 * 2 * kBlock + 2 * position + i % 2];
    }
    for (int64_t i = 0; i < s.units; ++i) {
      const int64_t w = valueWidth(i);
      const uint16_t* in = value + valuePanel(i) + 2 * (i % kPanel);
      uint16_t* out = valuesT + i / 2 * 2 * kBlock + i % 2;
      for (int64_t position = 0; position < kBlock; ++position) {
        out[2 * position] = in[position / 2 * 2 * w + position % 2];
      }
    }
  } else {
    for (int64_t i = 0; i < s.units; i += 16) {
      const int64_t dimensions = s.units - i < 16 ? s.units - i : 16, w = valueWidth(i);
      const float* values = panels.value + valuePanel(i) + i % kPanel;
      for (int64_t position = 0; position < kBlock; position += 16) {
        transposeBlock(panels.key + i * kBlock + position, kBlock, dimensions, s.keysT + position * s.padded + i,
                       s.padded, 16);
        transposeBlock(values + position * w, w, 16, s.valuesT + i * kBlock + position, kBlock, dimensions);
      }
    }
  }
}

// `count` rows of one head of an operand, both ways.
template <Chain kChain>
void packBothWays(const Operand& x, int64_t row, int64_t column, int64_t count, int64_t width, const BackwardScratch& s,
                  const TwoWay& to) {
  for (int64_t r = 0; r < count; ++r) packRow<kChain>(x, row + r, column, width, to.rows + r * to.rowUnits);
  if constexpr (kChain == Chain::kPairs) {
    for (int64_t r = 0; r < count; r += 2) {
      const BFloat16* even = x.row<BFloat16>(row + r) + column;
      const BFloat16* odd = r + 1 < count ? x.row<BFloat16>(row + r + 1) + column : even;
      float* out = to.panel + r / 2 * s.padded;
      eachVector(width, [&](int64_t i, auto lanes) {
        storePairs(out + i, makePairs(load(even + i, lanes), load(odd + i, lanes)));
      });
    }
  }
}

// Where one block stands: queries queryBegin.., keys keyBegin.. of the sequence, and what each row and column of it
// sees.
struct BlockRange {
  int64_t queryBegin, queries, keyBegin, keys;
  int32_t keyFirst[kBlock], keyEnd[kBlock];      // per query: the key slots it sees
  int32_t queryFirst[kBlock], queryEnd[kBlock];  // per key slot: the queries that see it

  void fill(const AttentionShape& shape) {
    for (int64_t r = 0; r < queries; ++r) {
      const int64_t i = queryBegin + r;
      setRange(firstVisible(shape, i) - keyBegin, i + 1 - keyBegin, keys, keyFirst + r, keyEnd + r);
    }
    for (int64_t s = 0; s < keys; ++s) {
      const int64_t j = keyBegin + s;
      const int64_t end = shape.window > 0 ? j + shape.window - queryBegin : queries;
      setRange(j - queryBegin, end, queries, queryFirst + s, queryEnd + s);
    }
  }

 private:
  static void setRange(int64_t begin, int64_t end, int64_t limit, int32_t* first, int32_t* last) {
    if (begin < 0) begin = 0;
    if (end > limit) end = limit;
    if (begin >= end) begin = end = 0;
    *first = static_cast<int32_t>(begin);
    *last = static_cast<int32_t>(end);
  }
};

struct Gradient {
  Vec p, dS;
};

// p and dS of query row r in the 16 slots from `slot` on; zero where it sees nothing.
LOCKSTEP_INLINE Gradient gradientOf(const BackwardScratch& s, const BlockRange& range, int64_t r, int64_t slot,
                                    float scale, float logSumExp, float delta) {
  const int64_t begin = range.keyFirst[r], end = range.keyEnd[r];
  if (end <= slot || begin >= slot + 16) return {zero(), zero()};
  const Vec factor = Vec::broadcast(scale);
  const Vec score = factor * loadu(s.scores + r * kBlock + slot);
  const Vec p = exp(score - Vec::broadcast(logSumExp));
  const Vec dS = p * (loadu(s.dScores + r * kBlock + slot) - Vec::broadcast(delta)) * factor;
  return {selectSlots(slot, begin, end, p, zero()), selectSlots(slot, begin, end, dS, zero())};
}

// Scores and dP of a block become p and dS, rounded, laid out for the products that follow.
template <Chain kChain>
void blockGradients(const BackwardScratch& s, const BlockRange& range, float scale, const float* logSumExp,
                    const float* delta) {
  for (int64_t slot = 0; slot < range.keys; slot += 16) {
    if constexpr (kChain == Chain::kPairs) {
      for (int64_t r = 0; r < range.queries; r += 2) {
        const Gradient even = gradientOf(s, range, r, slot, scale, logSumExp[r], delta[r]);
        Gradient odd{zero(), zero()};
        if (r + 1 < range.queries) odd = gradientOf(s, range, r + 1, slot, scale, logSumExp[r + 1], delta[r + 1]);
        storePairs(s.p + r / 2 * kBlock + slot, makePairs(even.p, odd.p));
        storePairs(s.dS + r / 2 * kBlock + slot, makePairs(even.dS, odd.dS));
        storeu(reinterpret_cast<BFloat16*>(s.dSRows + r * kBlock / 2) + slot, even.dS);
        if (r + 1 < range.queries) storeu(reinterpret_cast<BFloat16*>(s.dSRows + (r + 1) * kBlock / 2) + slot, odd.dS);
      }
    } else {
      for (int64_t r = 0; r < range.queries; ++r) {
        Gradient row = gradientOf(s, range, r, slot, scale, logSumExp[r], delta[r]);
        if constexpr (kChain == Chain::kSwapped) row = {rounded(row.p), rounded(row.dS)};
        storeu(s.p + r * kBlock + slot, row.p);
        storeu(s.dS + r * kBlock + slot, row.dS);
      }
    }
  }
}

template <class Element>
float deltaOf(const BackwardCall& call, int64_t row, int64_t column, int64_t width) {
  const Element *out = call.out.row<Element>(row) + column, *dOut = call.dOut.row<Element>(row) + column;
  return lanesSum(
      width, [&](Vec acc, int64_t i, auto lanes) { return fma(load(dOut + i, lanes), load(out + i, lanes), acc); });
}

// One block of one head: adds to dk(0), dv(0) and to dq in memory. rowBegin is the first row of the sequence.
template <Chain kChain>
void backwardBlock(const BackwardCall& call, const BackwardScratch& s, const PagePanels& panels,
                   const BlockRange& range, int64_t rowBegin, int64_t h) {
  using Element = std::conditional_t<kChain == Chain::kPlain, float, BFloat16>;
  const AttentionShape& shape = call.layout.attention;
  const int64_t width = shape.headWidth, row = rowBegin + range.queryBegin, column = h * width;
  const int64_t vectors = s.padded / 16;
  packBothWays<kChain>(call.q, row, column, range.queries, width, s, s.q);
  packBothWays<kChain>(call.dOut, row, column, range.queries, width, s, s.dOut);
  float delta[kBlock];
  for (int64_t r = 0; r < range.queries; ++r) delta[r] = deltaOf<Element>(call, row + r, column, width);

  multiply<kChain>({s.q.rows, s.q.rowUnits, 1}, range.queries, {panels.key, kBlock}, kBlock / 16,
                   groupsOf<kChain>(width), range.keyEnd, s.scores, kBlock);
  multiply<kChain>({s.dOut.rows, s.dOut.rowUnits, 1}, range.queries, {s.valuesT, kBlock}, kBlock / 16,
                   groupsOf<kChain>(width), range.keyEnd, s.dScores, kBlock);
  blockGradients<kChain>(s, range, shape.scale, call.logSumExp.row(h) + row, delta);

  const int64_t queryColumn = call.layout.queryColumn(h);
  for (int64_t r = 0; r < range.queries; ++r) {
    const float* from = call.dqkv.row(row + r) + queryColumn;
    eachVector(width, [&](int64_t i, auto lanes) { storeu(s.dq + r * s.padded + i, load(from + i, lanes)); });
  }
  accumulate<kChain>({s.dSRows, kRowUnits<kChain>, 1}, range.queries, {s.keysT, s.padded}, vectors, range.keyFirst,
                     range.keyEnd, s.dq, s.padded);
  for (int64_t r = 0; r < range.queries; ++r) {
    float* to = call.dqkv.row(row + r) + queryColumn;
    eachVector(width, [&](int64_t i, auto lanes) { store(to + i, loadu(s.dq + r * s.padded + i), lanes); });
  }
  accumulate<kChain>({s.p, 1, kBlock}, range.keys, {s.dOut.panel, s.padded}, vectors, range.queryFirst, range.queryEnd,
                     s.dv(0), s.padded);
  accumulate<kChain>({s.dS, 1, kBlock}, range.keys, {s.q.panel, s.padded}, vectors, range.queryFirst, range.queryEnd,
                     s.dk(0), s.padded);
}

// Joins the sum of sharer `index` (in dk(0), dv(0)) with the finished ones before it, as a balanced tree: level t + 1
// holds a subtree of 2^t sharers.
void joinSharer(const BackwardScratch& s, int64_t index, bool last) {
  int64_t level = 0;
  const int64_t size = 2 * s.size;
  for (; (index >> level & 1) == 1; ++level) {
    const float* left = s.dk(level + 1);
    float* right = s.dk(0);
    for (int64_t i = 0; i < size; i += 16) storeu(right + i, loadu(left + i) + loadu(right + i));
  }
  if (!last) memcpy(s.dk(level + 1), s.dk(0), size * sizeof(float));
}

// All gradients of key/value head g of one sequence.
template <Chain kChain>
void backwardHead(const BackwardCall& call, int64_t b, int64_t g, const BackwardScratch& s) {
  const AttentionShape& shape = call.layout.attention;
  const int64_t width = shape.headWidth, length = call.sequences.length[b], rowBegin = call.sequences.rowBegin[b];
  const int64_t group = call.group(), sharers = call.sharers(), perSharer = group / sharers;
  const int32_t* pages = call.sequences.pages + b * call.sequences.pageStride;
  for (int64_t i = 0; i < length; ++i) {
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      memset(call.dqkv.row(rowBegin + i) + call.layout.queryColumn(h), 0, width * sizeof(float));
    }
  }
  BlockRange range;
  for (int64_t keyBegin = 0; keyBegin < length; keyBegin += kBlock) {
    range.keyBegin = keyBegin;
    range.keys = length - keyBegin < kBlock ? length - keyBegin : kBlock;
    const PagePanels panels = pagePanels<kChain>(call.kv, pages[keyBegin / kBlock], g, s.panels);
    transposePage<kChain>(panels, s, width);
    for (int64_t sharer = 0; sharer < sharers; ++sharer) {
      memset(s.dk(0), 0, 2 * s.size * sizeof(float));
      for (int64_t h = g * group + sharer * perSharer; h < g * group + (sharer + 1) * perSharer; ++h) {
        for (int64_t begin = keyBegin; begin < length && firstVisible(shape, begin) < keyBegin + kBlock;
             begin += kBlock) {
          range.queryBegin = begin;
          range.queries = length - begin < kBlock ? length - begin : kBlock;
          range.fill(shape);
          backwardBlock<kChain>(call, s, panels, range, rowBegin, h);
        }
      }
      joinSharer(s, sharer, sharer + 1 == sharers);
    }
    for (int64_t j = 0; j < range.keys; ++j) {
      float* row = call.dqkv.row(rowBegin + keyBegin + j);
      float *dk = row + call.layout.keyColumn(g), *dv = row + call.layout.valueColumn(g);
      eachVector(width, [&](int64_t i, auto lanes) {
        store(dk + i, loadu(s.dk(0) + j * s.padded + i), lanes);
        store(dv + i, loadu(s.dv(0) + j * s.padded + i), lanes);
      });
    }
  }
}

}  // namespace

void attentionBackward(Queue& queue, const QkvLayout& layout, Operand q, const KvPages& kv, const Sequences& sequences,
                       Operand out, View<const float> logSumExp, Operand dOut, View<float> dqkv) {
  const BackwardCall call{layout, q, out, dOut, kv, sequences, logSumExp, dqkv};
  const int64_t width = layout.attention.headWidth, heads = layout.attention.keyValueHeads;
  const bool isFloat32 = q.dtype == DType::kFloat32, pairs = !isFloat32 && kWideBFloat16 == Chain::kPairs;
  forEachPaddingRow(sequences, dqkv.rows,
                    [&](int64_t row) { memset(dqkv.row(row), 0, layout.columns() * sizeof(float)); });
  Carver sizes;
  BackwardScratch::make(sizes, width, call.sharers(), pairs);
  queue.scratch(0, sizes.used);  // throws here rather than on a thread
  queue.pool().forEach(sequences.count * heads, [&](int64_t index, int thread) {
    Carver carver{static_cast<char*>(queue.scratch(thread, sizes.used))};
    const BackwardScratch scratch = BackwardScratch::make(carver, width, call.sharers(), pairs);
    if (isFloat32) {
      backwardHead<Chain::kPlain>(call, index / heads, index % heads, scratch);
    } else {
      backwardHead<kWideBFloat16>(call, index / heads, index % heads, scratch);
    }
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
