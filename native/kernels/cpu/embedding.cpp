// Token and position embeddings. A token's vector runs through its panel with a stride of the panel's width; backward
// gives each thread columns, so that every element's chain goes over tokens in order without atomics.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/rows.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

// Where the row of a token starts and how far apart its elements (float32) or pairs (bfloat16) are.
struct TokenRow {
  int64_t offset;  // elements, of k = 0 in the float32 order
  int64_t width;   // of the panel
  int64_t slot;    // n within the panel
};

LOCKSTEP_INLINE TokenRow findToken(const WeightLayout& layout, int64_t token) {
  const Part* part = layout.parts.data();
  while (token >= part->outBegin + part->out) ++part;
  const int64_t n = token - part->outBegin, panel = n / kPanel;
  return {part->panelOffset(panel), part->panelWidth(panel), n % kPanel};
}

LOCKSTEP_INLINE void widen(const void* data, DType dtype, TokenRow row, int64_t count, float* out) {
  if (dtype == DType::kFloat32) {
    const float* in = static_cast<const float*>(data) + row.offset + row.slot;
    for (int64_t i = 0; i < count; ++i) out[i] = in[i * row.width];
    return;
  }
  const BFloat16* in = static_cast<const BFloat16*>(data) + row.offset + 2 * row.slot;
  for (int64_t i = 0; i < count; ++i) out[i] = toFloat(in[i / 2 * 2 * row.width + i % 2]);
}

}  // namespace

void embed(Queue& queue, const int32_t* tokens, const int32_t* positions, const Weight& e, const float* positionTable,
           View<float> x) {
  forRanges(queue, x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* out = x.row(t);
      if (tokens[t] < 0) {
        eachVector(x.cols, [&](int64_t i, auto lanes) { store(out + i, zero(), lanes); });
        continue;
      }
      widen(e.data, e.dtype, findToken(*e.layout, tokens[t]), x.cols, out);
      if (positionTable == nullptr) continue;
      const float* position = positionTable + positions[t] * x.cols;
      eachVector(x.cols, [&](int64_t i, auto lanes) {
        store(out + i, load(out + i, lanes) + load(position + i, lanes), lanes);
      });
    }
  });
}

void embedBackward(Queue& queue, const int32_t* tokens, const int32_t* positions, View<const float> dx,
                   WeightGradient dE, float* dPositionTable) {
  forColumns(queue, dx.rows, dx.cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < dx.rows; ++t) {
      const float* d = dx.row(t);
      if (tokens[t] >= 0) {
        const TokenRow row = findToken(*dE.layout, tokens[t]);
        float* element = dE.data + row.offset + row.slot;
        for (int64_t i = begin; i < end; ++i) element[i * row.width] += d[i];
      }
      if (dPositionTable == nullptr || positions[t] < 0) continue;
      float* position = dPositionTable + positions[t] * dx.cols;
      eachVector(end - begin, [&](int64_t offset, auto lanes) {
        const int64_t i = begin + offset;
        store(position + i, load(position + i, lanes) + load(d + i, lanes), lanes);
      });
    }
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
