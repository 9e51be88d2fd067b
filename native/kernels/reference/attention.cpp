// Softmax attention over pages of keys and values (Vaswani et al., 2017; online softmax: Milakov and Gimelshein, 2018).
#include <limits>
#include <vector>

#include "kernels/reference/pages.h"
#include "kernels/reference/reference.h"
#include "kernels/reference/rows.h"

namespace lockstep::kernels::reference {

namespace {

// One query row of one head. `result` receives o / l, [K]. Returns m + log l.
float attendRow(const AttentionShape& shape, const Operand& q, const KvPages& kv, const int32_t* pages, int64_t row,
                int64_t position, int64_t h, float* result) {
  const int64_t g = h / (shape.heads / shape.keyValueHeads), width = shape.headWidth;
  const int64_t first = firstVisible(shape, position);
  float m = -std::numeric_limits<float>::infinity(), l = 0;
  std::vector<float> o(width, 0.0f);
  for (int64_t page = first / kPagePositions; page <= position / kPagePositions; ++page) {
    const int64_t base = page * kPagePositions;
    const int64_t begin = std::max(first, base) - base, end = std::min(position + 1, base + kPagePositions) - base;
    float s[kPagePositions], e[kPagePositions] = {};
    float newMax = m;
    for (int64_t j = begin; j < end; ++j) {
      const auto query = [&](int64_t i) { return load(q, row, h * width + i); };
      const auto key = [&](int64_t i) { return loadPage(kv, keyIndex(kv, pages[page], g, j, i)); };
      s[j] = shape.scale * chain(0.0f, q.dtype, 0, width, query, key);
      newMax = maximum(newMax, s[j]);
    }
    for (int64_t j = begin; j < end; ++j) e[j] = exp(s[j] - newMax);
    const float sum = lanesSum(kPagePositions, [&](float acc, int64_t j) { return acc + e[j]; });
    const float a = exp(m - newMax);
    const bool isFirst = base <= first;
    l = isFirst ? sum : fma(l, a, sum);
    m = newMax;
    for (int64_t i = 0; i < width; ++i) {
      const auto weight = [&](int64_t j) { return roundTo(q.dtype, e[j]); };
      const auto value = [&](int64_t j) { return loadPage(kv, valueIndex(kv, pages[page], g, j, i)); };
      o[i] = chain(isFirst ? 0.0f : o[i] * a, q.dtype, begin, end, weight, value);
    }
  }
  for (int64_t i = 0; i < width; ++i) result[i] = o[i] / l;
  return m + log(l);
}

// What backward of one (sequence, head) works with: p and dS of every visible pair, rounded, [length, length].
struct Probabilities {
  int64_t length;
  std::vector<float> p, dS;
  float& pAt(int64_t i, int64_t j) { return p[i * length + j]; }
  float& dSAt(int64_t i, int64_t j) { return dS[i * length + j]; }
};

struct BackwardHead {
  const AttentionShape& shape;
  const Operand &q, &out, &dOut;
  const KvPages& kv;
  View<const float> logSumExp;
  const int32_t* pages;
  int64_t rowBegin, length, h;

  int64_t g() const { return h / (shape.heads / shape.keyValueHeads); }
  float query(int64_t i, int64_t k) const { return load(q, rowBegin + i, h * shape.headWidth + k); }
  float dOutput(int64_t i, int64_t k) const { return load(dOut, rowBegin + i, h * shape.headWidth + k); }
  float key(int64_t j, int64_t k) const {
    return loadPage(kv, keyIndex(kv, pages[j / kPagePositions], g(), j % kPagePositions, k));
  }
  float value(int64_t j, int64_t k) const {
    return loadPage(kv, valueIndex(kv, pages[j / kPagePositions], g(), j % kPagePositions, k));
  }
};

Probabilities probabilities(const BackwardHead& head) {
  const int64_t width = head.shape.headWidth, length = head.length;
  const DType dtype = head.q.dtype;
  Probabilities result{length, std::vector<float>(length * length), std::vector<float>(length * length)};
  for (int64_t i = 0; i < length; ++i) {
    const float delta = lanesSum(width, [&](float acc, int64_t k) {
      return fma(head.dOutput(i, k), load(head.out, head.rowBegin + i, head.h * width + k), acc);
    });
    const float logSumExp = head.logSumExp.row(head.h)[head.rowBegin + i];
    for (int64_t j = firstVisible(head.shape, i); j <= i; ++j) {
      const auto key = [&](int64_t k) { return head.key(j, k); };
      const auto value = [&](int64_t k) { return head.value(j, k); };
      const auto query = [&](int64_t k) { return head.query(i, k); };
      const auto dOutput = [&](int64_t k) { return head.dOutput(i, k); };
      const float p = exp(head.shape.scale * chain(0.0f, dtype, 0, width, query, key) - logSumExp);
      const float dP = chain(0.0f, dtype, 0, width, dOutput, value);
      result.pAt(i, j) = roundTo(dtype, p);
      result.dSAt(i, j) = roundTo(dtype, p * (dP - delta) * head.shape.scale);
    }
  }
  return result;
}

void queryGradient(const BackwardHead& head, Probabilities& probability, View<float> dqkv, int64_t column) {
  for (int64_t i = 0; i < head.length; ++i) {
    for (int64_t k = 0; k < head.shape.headWidth; ++k) {
      const auto dS = [&](int64_t j) { return probability.dSAt(i, j); };
      const auto key = [&](int64_t j) { return head.key(j, k); };
      dqkv.row(head.rowBegin + i)[column + k] = chain(0.0f, head.q.dtype, firstVisible(head.shape, i), i + 1, dS, key);
    }
  }
}

// Continues the chains of dk and dv, both [length, K], over the queries of one head.
void keyValueGradient(const BackwardHead& head, Probabilities& probability, float* dk, float* dv) {
  const int64_t width = head.shape.headWidth;
  for (int64_t j = 0; j < head.length; ++j) {
    const int64_t end = head.shape.window > 0 ? std::min(head.length, j + head.shape.window) : head.length;
    for (int64_t k = 0; k < width; ++k) {
      const auto p = [&](int64_t i) { return probability.pAt(i, j); };
      const auto dS = [&](int64_t i) { return probability.dSAt(i, j); };
      const auto query = [&](int64_t i) { return head.query(i, k); };
      const auto dOutput = [&](int64_t i) { return head.dOutput(i, k); };
      dk[j * width + k] = chain(dk[j * width + k], head.q.dtype, j, end, dS, query);
      dv[j * width + k] = chain(dv[j * width + k], head.q.dtype, j, end, p, dOutput);
    }
  }
}

// values[0] = the balanced tree over count (a power of two) matrices of `size` floats each.
void treeSum(std::vector<std::vector<float>>& values) {
  for (size_t step = 1; step < values.size(); step *= 2) {
    for (size_t i = 0; i < values.size(); i += 2 * step) {
      for (size_t k = 0; k < values[i].size(); ++k) values[i][k] = values[i][k] + values[i + step][k];
    }
  }
}

}  // namespace

void attention(Queue&, const AttentionShape& shape, Operand q, const KvPages& kv, const Sequences& sequences,
               Operand out, View<float> logSumExp) {
  std::vector<float> result(shape.headWidth);
  forEachPaddingRow(sequences, q.rows, [&](int64_t row) {
    for (int64_t i = 0; i < shape.heads * shape.headWidth; ++i) store(out, row, i, 0.0f);
  });
  for (int64_t b = 0; b < sequences.count; ++b) {
    const int32_t* pages = sequences.pages + b * sequences.pageStride;
    for (int64_t i = 0; i < sequences.length[b]; ++i) {
      const int64_t row = sequences.rowBegin[b] + i, position = sequences.offset[b] + i;
      for (int64_t h = 0; h < shape.heads; ++h) {
        const float z = attendRow(shape, q, kv, pages, row, position, h, result.data());
        for (int64_t k = 0; k < shape.headWidth; ++k) store(out, row, h * shape.headWidth + k, result[k]);
        if (!logSumExp.empty()) logSumExp.row(h)[row] = z;
      }
    }
  }
}

void attentionBackward(Queue&, const QkvLayout& layout, Operand q, const KvPages& kv, const Sequences& sequences,
                       Operand out, View<const float> logSumExp, Operand dOut, View<float> dqkv) {
  const AttentionShape& shape = layout.attention;
  const int64_t width = shape.headWidth, group = shape.heads / shape.keyValueHeads;
  const int64_t sharers = std::max<int64_t>(1, shape.parts / shape.keyValueHeads);
  forEachPaddingRow(sequences, q.rows, [&](int64_t row) { std::fill_n(dqkv.row(row), layout.columns(), 0.0f); });
  for (int64_t b = 0; b < sequences.count; ++b) {
    const int64_t rowBegin = sequences.rowBegin[b], length = sequences.length[b];
    const int32_t* pages = sequences.pages + b * sequences.pageStride;
    for (int64_t g = 0; g < shape.keyValueHeads; ++g) {
      std::vector<std::vector<float>> dk(sharers, std::vector<float>(length * width)), dv = dk;
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        const int64_t sharer = (h - g * group) / (group / sharers);
        const BackwardHead head{shape, q, out, dOut, kv, logSumExp, pages, rowBegin, length, h};
        Probabilities probability = probabilities(head);
        queryGradient(head, probability, dqkv, layout.queryColumn(h));
        keyValueGradient(head, probability, dk[sharer].data(), dv[sharer].data());
      }
      treeSum(dk);
      treeSum(dv);
      for (int64_t j = 0; j < length; ++j) {
        std::copy_n(dk[0].data() + j * width, width, dqkv.row(rowBegin + j) + layout.keyColumn(g));
        std::copy_n(dv[0].data() + j * width, width, dqkv.row(rowBegin + j) + layout.valueColumn(g));
      }
    }
  }
}

}  // namespace lockstep::kernels::reference
