// Between the qkv projection and attention: per-head norm, rotation, rounding, and the keys and values into their
// pages; and the way back. Forward goes by blocks of 16 positions, so that two threads never write into the same pair
// of positions.
#include "kernels/cpu/attention_tasks.h"
#include "kernels/cpu/cpu.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

constexpr int64_t kPreparePositions = 16;

// Where each head begins in a row of qkv: query heads, key heads, value heads.
int64_t columnsBytes(const AttentionShape& shape) {
  return roundUp((shape.heads + 2 * shape.keyValueHeads) * static_cast<int64_t>(sizeof(int32_t)), 64);
}
void fillColumns(const QkvLayout& layout, int32_t* columns) {
  const int64_t heads = layout.attention.heads, groups = layout.attention.keyValueHeads;
  for (int64_t h = 0; h < heads; ++h) columns[h] = static_cast<int32_t>(layout.queryColumn(h));
  for (int64_t g = 0; g < groups; ++g) {
    columns[heads + g] = static_cast<int32_t>(layout.keyColumn(g));
    columns[heads + groups + g] = static_cast<int32_t>(layout.valueColumn(g));
  }
}

template <class Element>
LOCKSTEP_INLINE float inverseRmsOf(const Element* x, int64_t width, float eps) {
  const float squares = lanesSum(width, [&](Vec acc, int64_t i, auto lanes) {
    const Vec v = load(x + i, lanes);
    return fma(v, v, acc);
  });
  return inverseRoot(squares / static_cast<float>(width), eps);
}

// Cosines and sines of one position, [K / 2] each; null: no rotation.
struct Angles {
  const float *cosine, *sine;

  static Angles at(const Rope& rope, int64_t position, int64_t width) {
    if (rope.cosine == nullptr) return {nullptr, nullptr};
    return {rope.cosine + position * (width / 2), rope.sine + position * (width / 2)};
  }
};

// y [K] = the rotated norm of x [K].
LOCKSTEP_INLINE void prepareHead(const float* x, int64_t width, const float* gain, float eps, const Angles& angles,
                                 float* y) {
  const float* normed = x;
  if (gain != nullptr) {
    const Vec r = Vec::broadcast(inverseRmsOf(x, width, eps));
    eachVector(width,
               [&](int64_t i, auto lanes) { store(y + i, load(x + i, lanes) * r * load(gain + i, lanes), lanes); });
    normed = y;
  }
  if (angles.cosine == nullptr) {
    if (gain == nullptr) memcpy(y, x, width * sizeof(float));
    return;
  }
  const int64_t half = width / 2;
  eachVector(half, [&](int64_t i, auto lanes) {
    const Vec c = load(angles.cosine + i, lanes), s = load(angles.sine + i, lanes);
    const Vec a = load(normed + i, lanes), b = load(normed + half + i, lanes);
    store(y + i, fma(a, c, Vec::broadcast(-0.0f) - b * s), lanes);
    store(y + half + i, fma(b, c, a * s), lanes);
  });
  if (width % 2 == 1) y[width - 1] = normed[width - 1];
}

// The transpose of the rotation.
LOCKSTEP_INLINE void unrotate(const float* dy, int64_t width, const Angles& angles, float* dx) {
  if (angles.cosine == nullptr) {
    memcpy(dx, dy, width * sizeof(float));
    return;
  }
  const int64_t half = width / 2;
  eachVector(half, [&](int64_t i, auto lanes) {
    const Vec c = load(angles.cosine + i, lanes), s = load(angles.sine + i, lanes);
    const Vec a = load(dy + i, lanes), b = load(dy + half + i, lanes);
    store(dx + i, fma(a, c, b * s), lanes);
    store(dx + half + i, fma(b, c, Vec::broadcast(-0.0f) - a * s), lanes);
  });
  if (width % 2 == 1) dx[width - 1] = dy[width - 1];
}

template <class Element>
LOCKSTEP_INLINE void roundRow(const float* x, int64_t width, Element* y) {
  eachVector(width, [&](int64_t i, auto lanes) { store(y + i, load(x + i, lanes), lanes); });
}

// Keys of `count` consecutive slots of a page. `keys` [count] rows of `stride` 32-bit units each, `units` of them used:
// float32 values, or pairs of bfloat16. Transposed 16 x 16 at a time on the way into the panel, unless there are few
// rows (decode).
LOCKSTEP_INLINE void writeKeys(float* panel, int64_t slot, int64_t count, const float* keys, int64_t units,
                               int64_t stride) {
  if (count < 4) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t u = 0; u < units; ++u) panel[u * kPagePositions + slot + r] = keys[r * stride + u];
    }
    return;
  }
  for (int64_t u = 0; u < units; u += 16) {
    Vec block[16];
    for (int64_t r = 0; r < 16; ++r) block[r] = r < count ? loadu(keys + r * stride + u) : zero();
    transpose(block);
    for (int64_t c = 0; c < 16 && u + c < units; ++c)
      storePartial(panel + (u + c) * kPagePositions + slot, block[c], count);
  }
}

// The value of one slot, zeros in its padding.
template <class Element>
LOCKSTEP_INLINE void writeValue(const KvPages& kv, int64_t page, int64_t g, int64_t slot, const float* x) {
  const int64_t width = kv.headWidth, padded = roundUp(width, kPanelGrain);
  Element* panel = static_cast<Element*>(kv.data) + kv.valuePanel(page, g);
  for (int64_t n = 0; n < padded; n += 16) {
    const int64_t begin = n / kPanel * kPanel, w = padded - begin < kPanel ? padded - begin : kPanel;
    const Vec value = loadPartial(x + n, width - n < 16 ? width - n : 16);
    if constexpr (sizeof(Element) == sizeof(float)) {
      storeu(panel + begin * kPagePositions + slot * w + n - begin, value);
    } else {
      BFloat16 lanes[16];
      storeu(lanes, value);
      Element* to = panel + begin * kPagePositions + slot / 2 * 2 * w + 2 * (n - begin) + slot % 2;
      for (int64_t i = 0; i < 16; ++i) to[2 * i] = lanes[i];
    }
  }
}

// The bfloat16 values of the slots `slot` (even) and slot + 1.
LOCKSTEP_INLINE void writeValuePair(const KvPages& kv, int64_t page, int64_t g, int64_t slot, const float* x,
                                    const float* next) {
  const int64_t width = kv.headWidth, padded = roundUp(width, kPanelGrain);
  BFloat16* panel = static_cast<BFloat16*>(kv.data) + kv.valuePanel(page, g);
  for (int64_t n = 0; n < padded; n += 16) {
    const int64_t begin = n / kPanel * kPanel, w = padded - begin < kPanel ? padded - begin : kPanel;
    const int64_t count = width - n < 16 ? width - n : 16;
    storePairs(panel + begin * kPagePositions + slot * w + 2 * (n - begin),
               makePairs(loadPartial(x + n, count), loadPartial(next + n, count)));
  }
}

struct PrepareCall {
  const QkvLayout& layout;
  View<const float> qkv;
  const Sequences& sequences;
  const HeadNorm& norm;
  const Rope& rope;
  const Operand &q, &savedQk;
  const KvPages& kv;
  const int32_t* columns;  // fillColumns
};

// Floats of scratch that a tile needs: one head, and the keys of all its rows.
int64_t prepareFloats(int64_t width) {
  return (kPreparePositions + 1) * roundUp(width + 1, kPanelGrain);
}

// The rows of one tile, all heads.
template <class Element>
void prepareTile(const PrepareCall& call, const QueryTile& tile, float* scratch) {
  constexpr int64_t kPerUnit = sizeof(float) / sizeof(Element);
  const AttentionShape& shape = call.layout.attention;
  const int64_t width = shape.headWidth, stride = roundUp(width + 1, kPanelGrain);
  float *head = scratch, *keys = scratch + stride;
  const auto save = [&](int64_t row, int64_t index, const float* x) {
    if (!call.savedQk.empty()) roundRow(x, width, call.savedQk.row<Element>(row) + index * width);
  };
  for (int64_t i = 0; i < tile.count; ++i) {
    const Angles angles = Angles::at(call.rope, tile.position + i, width);
    const int64_t row = tile.row + i;
    for (int64_t h = 0; h < shape.heads; ++h) {
      const float* x = call.qkv.row(row) + call.columns[h];
      save(row, h, x);
      prepareHead(x, width, call.norm.queryGain, call.norm.eps, angles, head);
      roundRow(head, width, call.q.row<Element>(row) + h * width);
    }
  }
  const int32_t* pages = call.sequences.pages + tile.sequence * call.sequences.pageStride;
  const int64_t page = pages[tile.position / kPagePositions], slot = tile.position % kPagePositions;
  for (int64_t g = 0; g < shape.keyValueHeads; ++g) {
    const auto value = [&](int64_t i) {
      return call.qkv.row(tile.row + i) + call.columns[shape.heads + shape.keyValueHeads + g];
    };
    for (int64_t i = 0; i < tile.count; ++i) {
      const float* x = call.qkv.row(tile.row + i) + call.columns[shape.heads + g];
      save(tile.row + i, shape.heads + g, x);
      prepareHead(x, width, call.norm.keyGain, call.norm.eps, Angles::at(call.rope, tile.position + i, width), head);
      head[width] = 0.0f;  // the padding of an odd K
      roundRow(head, roundUp(width, 2), reinterpret_cast<Element*>(keys + i * stride));
    }
    Element* panel = static_cast<Element*>(call.kv.data) + call.kv.keyPanel(page, g);
    writeKeys(reinterpret_cast<float*>(panel), slot, tile.count, keys, roundUp(width, 2) / kPerUnit, stride);
    for (int64_t i = 0; i < tile.count; ++i) {
      const bool pair = sizeof(Element) == 2 && (slot + i) % 2 == 0 && i + 1 < tile.count;
      if (pair) {
        writeValuePair(call.kv, page, g, slot + i, value(i), value(i + 1));
        ++i;
      } else {
        writeValue<Element>(call.kv, page, g, slot + i, value(i));
      }
    }
  }
}

struct PrepareBackwardCall {
  const QkvLayout& layout;
  View<const float> dqkv;
  const int32_t* positions;
  const HeadNorm& norm;
  const Rope& rope;
  const Operand &savedQk, &dqkvOut;
  const int32_t* columns;  // fillColumns

  const float* gain(int64_t head) const { return head < layout.attention.heads ? norm.queryGain : norm.keyGain; }
};

// dqkvOut of one row. dy: K floats.
template <class Element>
void prepareBackwardRow(const PrepareBackwardCall& call, int64_t t, float* dy) {
  const AttentionShape& shape = call.layout.attention;
  const int64_t width = shape.headWidth;
  Element* out = call.dqkvOut.row<Element>(t);
  if (call.positions[t] < 0) {
    memset(out, 0, call.layout.columns() * sizeof(Element));
    return;
  }
  const Angles angles = Angles::at(call.rope, call.positions[t], width);
  for (int64_t head = 0; head < shape.heads + shape.keyValueHeads; ++head) {
    const float* gain = call.gain(head);
    Element* to = out + call.columns[head];
    unrotate(call.dqkv.row(t) + call.columns[head], width, angles, dy);
    if (gain == nullptr) {
      roundRow(dy, width, to);
      continue;
    }
    const Element* x = call.savedQk.row<Element>(t) + head * width;
    const float r = inverseRmsOf(x, width, call.norm.eps);
    const float dot = lanesSum(width, [&](Vec acc, int64_t i, auto lanes) {
      return fma(load(dy + i, lanes) * load(gain + i, lanes), load(x + i, lanes), acc);
    });
    const Vec scale = Vec::broadcast(r), c = Vec::broadcast(-(dot * (r * r) / static_cast<float>(width)));
    eachVector(width, [&](int64_t i, auto lanes) {
      store(to + i, scale * fma(c, load(x + i, lanes), load(dy + i, lanes) * load(gain + i, lanes)), lanes);
    });
  }
  for (int64_t g = 0; g < shape.keyValueHeads; ++g) {
    const int64_t column = call.columns[shape.heads + shape.keyValueHeads + g];
    roundRow(call.dqkv.row(t) + column, width, out + column);
  }
}

// The gradient of one gain: its chain runs over rows, then over the heads headBegin..headEnd-1.
template <class Element>
void gainGradient(const PrepareBackwardCall& call, int64_t headBegin, int64_t headEnd, float* dGain, float* dy) {
  const int64_t width = call.layout.attention.headWidth;
  for (int64_t t = 0; t < call.dqkv.rows; ++t) {
    if (call.positions[t] < 0) continue;
    const Angles angles = Angles::at(call.rope, call.positions[t], width);
    for (int64_t head = headBegin; head < headEnd; ++head) {
      const Element* x = call.savedQk.row<Element>(t) + head * width;
      unrotate(call.dqkv.row(t) + call.columns[head], width, angles, dy);
      const Vec r = Vec::broadcast(inverseRmsOf(x, width, call.norm.eps));
      eachVector(width, [&](int64_t i, auto lanes) {
        store(dGain + i, fma(load(dy + i, lanes), load(x + i, lanes) * r, load(dGain + i, lanes)), lanes);
      });
    }
  }
}

}  // namespace

// The tables at the head of thread 0's scratch are read by every thread; each thread's own memory begins behind their
// size.
void qkvPrepare(Queue& queue, const QkvLayout& layout, View<const float> qkv, const Sequences& sequences,
                const HeadNorm& norm, const Rope& rope, Operand q, const KvPages& kv, Operand savedQk) {
  const AttentionShape& shape = layout.attention;
  const int64_t width = shape.headWidth;
  forEachPaddingRow(sequences, qkv.rows, [&](int64_t row) {
    memset(q.rowBytes(row), 0, shape.heads * width * bytesOf(q.dtype));
    if (savedQk.empty()) return;
    memset(savedQk.rowBytes(row), 0, (shape.heads + shape.keyValueHeads) * width * bytesOf(savedQk.dtype));
  });
  const size_t tilesBytes = QueryTiles::bytes(sequences), tables = tilesBytes + columnsBytes(shape);
  const size_t bytes = tables + prepareFloats(width) * sizeof(float);
  char* memory = static_cast<char*>(queue.scratch(0, bytes));
  const QueryTiles tiles{sequences, kPreparePositions, reinterpret_cast<int32_t*>(memory)};
  tiles.fill();
  int32_t* columns = reinterpret_cast<int32_t*>(memory + tilesBytes);
  fillColumns(layout, columns);
  const PrepareCall call{layout, qkv, sequences, norm, rope, q, savedQk, kv, columns};
  queue.pool().forEach(tiles.total(), [&](int64_t index, int thread) {
    float* scratch = reinterpret_cast<float*>(static_cast<char*>(queue.scratch(thread, bytes)) + tables);
    withElement(q.dtype, [&](auto element) { prepareTile<decltype(element)>(call, tiles.at(index), scratch); });
  });
}

void qkvPrepareBackward(Queue& queue, const QkvLayout& layout, View<const float> dqkv, const int32_t* positions,
                        const HeadNorm& norm, const Rope& rope, Operand savedQk, Operand dqkvOut, float* dQueryGain,
                        float* dKeyGain) {
  const AttentionShape& shape = layout.attention;
  const size_t tables = columnsBytes(shape), bytes = tables + roundUp(shape.headWidth, kPanelGrain) * sizeof(float);
  int32_t* columns = static_cast<int32_t*>(queue.scratch(0, bytes));
  fillColumns(layout, columns);
  const PrepareBackwardCall call{layout, dqkv, positions, norm, rope, savedQk, dqkvOut, columns};
  const int64_t blocks = (dqkv.rows + kPreparePositions - 1) / kPreparePositions;
  // The two gains' chains are long and come first.
  queue.pool().forEach(blocks + 2, [&](int64_t index, int thread) {
    float* dy = reinterpret_cast<float*>(static_cast<char*>(queue.scratch(thread, bytes)) + tables);
    withElement(dqkvOut.dtype, [&](auto element) {
      using Element = decltype(element);
      if (index == 0) {
        if (norm.queryGain != nullptr) gainGradient<Element>(call, 0, shape.heads, dQueryGain, dy);
      } else if (index == 1) {
        if (norm.keyGain != nullptr) {
          gainGradient<Element>(call, shape.heads, shape.heads + shape.keyValueHeads, dKeyGain, dy);
        }
      } else {
        const int64_t begin = (index - 2) * kPreparePositions;
        const int64_t end = begin + kPreparePositions < dqkv.rows ? begin + kPreparePositions : dqkv.rows;
        for (int64_t t = begin; t < end; ++t) prepareBackwardRow<Element>(call, t, dy);
      }
    });
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
