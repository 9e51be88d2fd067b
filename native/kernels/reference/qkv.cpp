// Between the qkv projection and attention: per-head RMSNorm, rotary embedding (Su et al., 2021), rounding, and the
// keys and values into their pages; and the way back.
#include <vector>

#include "kernels/reference/pages.h"
#include "kernels/reference/reference.h"
#include "kernels/reference/rows.h"

namespace lockstep::kernels::reference {

namespace {

float headInverseRms(const float* x, int64_t width, float eps) {
  const float squares = lanesSum(width, [&](float acc, int64_t i) { return fma(x[i], x[i], acc); });
  return inverseRoot(squares / static_cast<float>(width), eps);
}

// y = rotated norm of x, one head of a row at `position`.
void prepareHead(const float* x, int64_t width, const float* gain, float eps, const Rope& rope, int64_t position,
                 float* y) {
  const float r = gain == nullptr ? 1.0f : headInverseRms(x, width, eps);
  for (int64_t i = 0; i < width; ++i) y[i] = gain == nullptr ? x[i] : x[i] * r * gain[i];
  if (rope.cosine == nullptr) return;
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float c = rope.cosine[position * half + i], s = rope.sine[position * half + i];
    const float a = y[i], b = y[i + half];
    y[i] = fma(a, c, -(b * s));
    y[i + half] = fma(b, c, a * s);
  }
}

// The transpose of the rotation.
void unrotate(const float* dy, int64_t width, const Rope& rope, int64_t position, float* dx) {
  std::copy_n(dy, width, dx);
  if (rope.cosine == nullptr) return;
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float c = rope.cosine[position * half + i], s = rope.sine[position * half + i];
    dx[i] = fma(dy[i], c, dy[i + half] * s);
    dx[i + half] = fma(dy[i + half], c, -(dy[i] * s));
  }
}

// Through the norm of one head: dx from dy and the saved x; the gain's gradient continues its chain.
void normBackward(const float* x, const float* dy, int64_t width, const float* gain, float eps, float* dx,
                  float* dGain) {
  const float r = headInverseRms(x, width, eps);
  const float dot = lanesSum(width, [&](float acc, int64_t i) { return fma(dy[i] * gain[i], x[i], acc); });
  const float c = dot * (r * r) / static_cast<float>(width);
  for (int64_t i = 0; i < width; ++i) {
    dx[i] = r * fma(-c, x[i], dy[i] * gain[i]);
    dGain[i] = fma(dy[i], x[i] * r, dGain[i]);
  }
}

void writeKey(const KvPages& kv, int64_t page, int64_t g, int64_t s, const float* key) {
  for (int64_t i = 0; i < kv.headWidth; ++i) storePage(kv, keyIndex(kv, page, g, s, i), key[i]);
  const bool padded = kv.headWidth % 2 == 1;
  if (padded) storePage(kv, keyIndex(kv, page, g, s, kv.headWidth), 0.0f);
}

void writeValue(const KvPages& kv, int64_t page, int64_t g, int64_t s, const float* value) {
  for (int64_t i = 0; i < roundUp(kv.headWidth, kPanelGrain); ++i) {
    storePage(kv, valueIndex(kv, page, g, s, i), i < kv.headWidth ? value[i] : 0.0f);
  }
}

}  // namespace

void qkvPrepare(Queue&, const QkvLayout& layout, View<const float> qkv, const Sequences& sequences,
                const HeadNorm& norm, const Rope& rope, Operand q, const KvPages& kv, Operand savedQk) {
  const AttentionShape& shape = layout.attention;
  const int64_t width = shape.headWidth;
  std::vector<float> head(width);
  const auto save = [&](int64_t row, int64_t index, const float* x) {
    if (savedQk.empty()) return;
    for (int64_t i = 0; i < width; ++i) store(savedQk, row, index * width + i, x[i]);
  };
  forEachPaddingRow(sequences, qkv.rows, [&](int64_t row) {
    for (int64_t i = 0; i < shape.heads * width; ++i) store(q, row, i, 0.0f);
    if (savedQk.empty()) return;
    for (int64_t i = 0; i < (shape.heads + shape.keyValueHeads) * width; ++i) store(savedQk, row, i, 0.0f);
  });
  for (int64_t b = 0; b < sequences.count; ++b) {
    for (int64_t i = 0; i < sequences.length[b]; ++i) {
      const int64_t row = sequences.rowBegin[b] + i, position = sequences.offset[b] + i;
      const int64_t page = sequences.pages[b * sequences.pageStride + position / kPagePositions];
      for (int64_t h = 0; h < shape.heads; ++h) {
        const float* x = qkv.row(row) + layout.queryColumn(h);
        save(row, h, x);
        prepareHead(x, width, norm.queryGain, norm.eps, rope, position, head.data());
        for (int64_t k = 0; k < width; ++k) store(q, row, h * width + k, head[k]);
      }
      for (int64_t g = 0; g < shape.keyValueHeads; ++g) {
        const float* x = qkv.row(row) + layout.keyColumn(g);
        save(row, shape.heads + g, x);
        prepareHead(x, width, norm.keyGain, norm.eps, rope, position, head.data());
        writeKey(kv, page, g, position % kPagePositions, head.data());
        writeValue(kv, page, g, position % kPagePositions, qkv.row(row) + layout.valueColumn(g));
      }
    }
  }
}

void qkvPrepareBackward(Queue&, const QkvLayout& layout, View<const float> dqkv, const int32_t* positions,
                        const HeadNorm& norm, const Rope& rope, Operand savedQk, Operand dqkvOut, float* dQueryGain,
                        float* dKeyGain) {
  const AttentionShape& shape = layout.attention;
  const int64_t width = shape.headWidth;
  std::vector<float> x(width), dy(width), dx(width);
  for (int64_t t = 0; t < dqkv.rows; ++t) {
    if (positions[t] < 0) {
      for (int64_t i = 0; i < layout.columns(); ++i) store(dqkvOut, t, i, 0.0f);
      continue;
    }
    for (int64_t head = 0; head < shape.heads + shape.keyValueHeads; ++head) {
      const bool isQuery = head < shape.heads;
      const int64_t column = isQuery ? layout.queryColumn(head) : layout.keyColumn(head - shape.heads);
      const float* gain = isQuery ? norm.queryGain : norm.keyGain;
      unrotate(dqkv.row(t) + column, width, rope, positions[t], dy.data());
      if (gain == nullptr) {
        dx = dy;
      } else {
        for (int64_t i = 0; i < width; ++i) x[i] = load(savedQk, t, head * width + i);
        normBackward(x.data(), dy.data(), width, gain, norm.eps, dx.data(), isQuery ? dQueryGain : dKeyGain);
      }
      for (int64_t i = 0; i < width; ++i) store(dqkvOut, t, column + i, dx[i]);
    }
    for (int64_t g = 0; g < shape.keyValueHeads; ++g) {
      const int64_t column = layout.valueColumn(g);
      for (int64_t i = 0; i < width; ++i) store(dqkvOut, t, column + i, dqkv.row(t)[column + i]);
    }
  }
}

}  // namespace lockstep::kernels::reference
