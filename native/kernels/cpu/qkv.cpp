// Between the qkv projection and attention: per-head norm, rotation, rounding, and the keys and values into their pages; and
// the way back. Forward goes by blocks of 16 positions, so that two threads never write into the same pair of positions.
#include "kernels/cpu/attention_tasks.h"
#include "kernels/cpu/cpu.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

constexpr int64_t kPreparePositions = 16;

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
LOCKSTEP_INLINE void prepareHead(const float* x, int64_t width, const float* gain, float eps, const Angles& angles, float* y) {
  const float* normed = x;
  if (gain != nullptr) {
    const Vec r = Vec::broadcast(inverseRmsOf(x, width, eps));
    eachVector(width, [&](int64_t i, auto lanes) { store(y + i, load(x + i, lanes) * r * load(gain + i, lanes), lanes); });
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

// `head` has room for K + 1 floats: an odd K is padded by a zero dimension.
template <class Element>
LOCKSTEP_INLINE void writeKey(const KvPages& kv, int64_t page, int64_t g, int64_t s, float* head, Element* rounded) {
  const int64_t width = kv.headWidth;
  head[width] = 0.0f;
  Element* panel = static_cast<Element*>(kv.data) + kv.keyPanel(page, g);
  if constexpr (sizeof(Element) == sizeof(float)) {
    for (int64_t i = 0; i < roundUp(width, 2); ++i) panel[i * kPagePositions + s] = head[i];
  } else {
    roundRow(head, roundUp(width, 2), rounded);
    for (int64_t i = 0; i < roundUp(width, 2); i += 2) {
      memcpy(panel + (i / 2 * kPagePositions + s) * 2, rounded + i, 2 * sizeof(Element));
    }
  }
}

template <class Element>
LOCKSTEP_INLINE void writeValue(const KvPages& kv, int64_t page, int64_t g, int64_t s, const float* x, Element* rounded) {
  const int64_t width = kv.headWidth, padded = roundUp(width, kPanelGrain);
  Element* panel = static_cast<Element*>(kv.data) + kv.valuePanel(page, g);
  roundRow(x, width, rounded);
  memset(rounded + width, 0, (padded - width) * sizeof(Element));
  for (int64_t begin = 0; begin < padded; begin += kPanel) {
    const int64_t w = padded - begin < kPanel ? padded - begin : kPanel;
    Element* to = panel + begin * kPagePositions;
    if constexpr (sizeof(Element) == sizeof(float)) {
      memcpy(to + s * w, rounded + begin, w * sizeof(float));
    } else {
      to += s / 2 * 2 * w + s % 2;
      for (int64_t n = 0; n < w; ++n) to[2 * n] = rounded[begin + n];
    }
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
};

// One row, all heads. head: K + 1 floats; rounded: K rounded up to 16 elements.
template <class Element>
void prepareRow(const PrepareCall& call, int64_t row, int64_t position, int64_t page, float* head, Element* rounded) {
  const AttentionShape& shape = call.layout.attention;
  const int64_t width = shape.headWidth, slot = position % kPagePositions;
  const Angles angles = Angles::at(call.rope, position, width);
  const auto save = [&](int64_t index, const float* x) {
    if (!call.savedQk.empty()) roundRow(x, width, call.savedQk.row<Element>(row) + index * width);
  };
  for (int64_t h = 0; h < shape.heads; ++h) {
    const float* x = call.qkv.row(row) + call.layout.queryColumn(h);
    save(h, x);
    prepareHead(x, width, call.norm.queryGain, call.norm.eps, angles, head);
    roundRow(head, width, call.q.row<Element>(row) + h * width);
  }
  for (int64_t g = 0; g < shape.keyValueHeads; ++g) {
    const float* x = call.qkv.row(row) + call.layout.keyColumn(g);
    save(shape.heads + g, x);
    prepareHead(x, width, call.norm.keyGain, call.norm.eps, angles, head);
    writeKey(call.kv, page, g, slot, head, rounded);
    writeValue(call.kv, page, g, slot, call.qkv.row(row) + call.layout.valueColumn(g), rounded);
  }
}

struct PrepareBackwardCall {
  const QkvLayout& layout;
  View<const float> dqkv;
  const int32_t* positions;
  const HeadNorm& norm;
  const Rope& rope;
  const Operand &savedQk, &dqkvOut;

  const float* gain(int64_t head) const { return head < layout.attention.heads ? norm.queryGain : norm.keyGain; }
  int64_t column(int64_t head) const {
    const int64_t heads = layout.attention.heads;
    return head < heads ? layout.queryColumn(head) : layout.keyColumn(head - heads);
  }
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
    Element* to = out + call.column(head);
    unrotate(call.dqkv.row(t) + call.column(head), width, angles, dy);
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
    const int64_t column = call.layout.valueColumn(g);
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
      unrotate(call.dqkv.row(t) + call.column(head), width, angles, dy);
      const Vec r = Vec::broadcast(inverseRmsOf(x, width, call.norm.eps));
      eachVector(width, [&](int64_t i, auto lanes) {
        store(dGain + i, fma(load(dy + i, lanes), load(x + i, lanes) * r, load(dGain + i, lanes)), lanes);
      });
    }
  }
}

}  // namespace

void qkvPrepare(Queue& queue, const QkvLayout& layout, View<const float> qkv, const Sequences& sequences,
                const HeadNorm& norm, const Rope& rope, Operand q, const KvPages& kv, Operand savedQk) {
  const PrepareCall call{layout, qkv, sequences, norm, rope, q, savedQk, kv};
  const AttentionShape& shape = layout.attention;
  const int64_t width = shape.headWidth;
  forEachPaddingRow(sequences, qkv.rows, [&](int64_t row) {
    memset(q.rowBytes(row), 0, shape.heads * width * bytesOf(q.dtype));
    if (savedQk.empty()) return;
    memset(savedQk.rowBytes(row), 0, (shape.heads + shape.keyValueHeads) * width * bytesOf(savedQk.dtype));
  });
  const size_t first = QueryTiles::bytes(sequences);
  const int64_t headFloats = roundUp(width + 1, kPanelGrain);
  const size_t bytes = first + 2 * headFloats * sizeof(float);
  const QueryTiles tiles{sequences, kPreparePositions, static_cast<int32_t*>(queue.scratch(0, bytes))};
  tiles.fill();
  queue.pool().forEach(tiles.total(), [&](int64_t index, int thread) {
    float* head = reinterpret_cast<float*>(static_cast<char*>(queue.scratch(thread, bytes)) + first);
    const QueryTile tile = tiles.at(index);
    const int32_t* pages = sequences.pages + tile.sequence * sequences.pageStride;
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t position = tile.position + i, page = pages[position / kPagePositions];
      withElement(q.dtype, [&](auto element) {
        using Element = decltype(element);
        prepareRow(call, tile.row + i, position, page, head, reinterpret_cast<Element*>(head + headFloats));
      });
    }
  });
}

void qkvPrepareBackward(Queue& queue, const QkvLayout& layout, View<const float> dqkv, const int32_t* positions,
                        const HeadNorm& norm, const Rope& rope, Operand savedQk, Operand dqkvOut, float* dQueryGain,
                        float* dKeyGain) {
  const PrepareBackwardCall call{layout, dqkv, positions, norm, rope, savedQk, dqkvOut};
  const AttentionShape& shape = layout.attention;
  const size_t bytes = roundUp(shape.headWidth, kPanelGrain) * sizeof(float);
  queue.scratch(0, bytes);  // throws here rather than on a thread
  const int64_t blocks = (dqkv.rows + kPreparePositions - 1) / kPreparePositions;
  // The two gains' chains are long and come first.
  queue.pool().forEach(blocks + 2, [&](int64_t index, int thread) {
    float* dy = static_cast<float*>(queue.scratch(thread, bytes));
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
