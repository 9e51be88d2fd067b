// Matrix products and their gradients, element by element.
#include <vector>

#include "kernels/math.h"
#include "kernels/reference/reference.h"
#include "kernels/reference/rows.h"

namespace lockstep::kernels::reference {

namespace {

float loadWeight(const Weight& w, int64_t row, int64_t col) {
  if (w.dtype == DType::kFloat32) return static_cast<const float*>(w.data)[float32Index(*w.layout, row, col)];
  return toFloat(static_cast<const BFloat16*>(w.data)[bfloat16Index(*w.layout, row, col)]);
}

// The chain of kernels.h over i in 0..count-1: acc = fma(a(i), b(i), acc).
template <class A, class B>
float chain(DType dtype, int64_t count, float acc, const A& a, const B& b) {
  if (dtype == DType::kFloat32) {
    for (int64_t i = 0; i < count; ++i) acc = fma(a(i), b(i), acc);
    return acc;
  }
  for (int64_t i = 0; i < count; i += 2) {
    acc = i + 1 < count ? fma(a(i + 1), b(i + 1), acc) : fma(0.0f, 0.0f, acc);
    acc = fma(a(i), b(i), acc);
  }
  return acc;
}

// The balanced tree over leaf(begin) .. leaf(begin + count - 1), count a power of two.
template <class Leaf>
float tree(int64_t begin, int64_t count, const Leaf& leaf) {
  if (count == 1) return leaf(begin);
  const float left = tree(begin, count / 2, leaf);
  return left + tree(begin + count / 2, count / 2, leaf);
}

void output(const Output& y, int64_t t, int64_t n, float value) {
  switch (y.kind) {
    case Output::Kind::kStore:
      y.f32.row(t)[n] = value;
      break;
    case Output::Kind::kRound:
      store(y.operand, t, n, value);
      break;
    case Output::Kind::kAdd:
      y.f32.row(t)[n] = y.residual.row(t)[n] + value;
      break;
  }
}

// Element (t, n) of x W^T + bias, before the Output rule.
float product(const Operand& x, const Weight& w, const float* bias, int64_t t, int64_t n) {
  const WeightLayout& layout = *w.layout;
  const auto leaf = [&](int64_t p) {
    const Part& part = layout.parts[p];
    return chain(
        w.dtype, part.in, 0.0f, [&](int64_t i) { return load(x, t, part.inBegin + i); },
        [&](int64_t i) { return loadWeight(w, n, part.inBegin + i); });
  };
  float value;
  if (layout.split == Split::kIn) {
    value = tree(0, static_cast<int64_t>(layout.parts.size()), leaf);
  } else {
    int64_t p = 0;
    while (n >= layout.parts[p].outBegin + layout.parts[p].out) ++p;
    value = leaf(p);
  }
  return bias == nullptr ? value : value + bias[n];
}

}  // namespace

void linear(Queue&, Operand x, const Weight& w, const float* bias, Output y) {
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t n = 0; n < w.layout->out; ++n) output(y, t, n, product(x, w, bias, t, n));
  }
}

void finishSum(Queue&, View<const float> sum, const float* bias, View<const float> residual, View<float> y) {
  for (int64_t t = 0; t < sum.rows; ++t) {
    for (int64_t n = 0; n < sum.cols; ++n) {
      const float value = bias == nullptr ? sum.row(t)[n] : sum.row(t)[n] + bias[n];
      y.row(t)[n] = residual.row(t)[n] + value;
    }
  }
}

void activatedLinear(Queue&, Operand x, const Weight& w, const float* bias, Activation activation, Operand y,
                     Operand saved) {
  const WeightLayout& layout = *w.layout;
  std::vector<float> row(static_cast<size_t>(layout.out));
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t n = 0; n < layout.out; ++n) row[n] = product(x, w, bias, t, n);
    for (int64_t n = 0; n < layout.out && !saved.empty(); ++n) store(saved, t, n, row[n]);
    if (activation == Activation::kGeluTanh) {
      for (int64_t n = 0; n < layout.out; ++n) store(y, t, n, geluTanh(row[n]));
      continue;
    }
    for (const Part& part : layout.parts) {
      const int64_t half = part.out / 2;
      for (int64_t n = 0; n < half; ++n) {
        store(y, t, part.outBegin / 2 + n, silu(row[part.outBegin + n]) * row[part.outBegin + half + n]);
      }
    }
  }
}

void linearBackwardInput(Queue&, Operand dy, const Weight& w, Output dx) {
  const WeightLayout& layout = *w.layout;
  for (int64_t t = 0; t < dy.rows; ++t) {
    for (int64_t i = 0; i < layout.in; ++i) {
      const auto leaf = [&](int64_t p) {
        const Part& part = layout.parts[p];
        return chain(
            w.dtype, part.out, 0.0f, [&](int64_t n) { return load(dy, t, part.outBegin + n); },
            [&](int64_t n) { return loadWeight(w, part.outBegin + n, i); });
      };
      if (layout.split == Split::kIn) {
        int64_t p = 0;
        while (i >= layout.parts[p].inBegin + layout.parts[p].in) ++p;
        output(dx, t, i, leaf(p));
      } else {
        output(dx, t, i, tree(0, static_cast<int64_t>(layout.parts.size()), leaf));
      }
    }
  }
}

void linearBackwardWeight(Queue&, Operand dy, Operand x, WeightGradient dW, float* dBias) {
  const WeightLayout& layout = *dW.layout;
  for (int64_t n = 0; n < layout.out; ++n) {
    for (int64_t i = 0; i < layout.in; ++i) {
      float& element = dW.data[float32Index(layout, n, i)];
      element = chain(
          dy.dtype, dy.rows, element, [&](int64_t t) { return load(dy, t, n); },
          [&](int64_t t) { return load(x, t, i); });
    }
    for (int64_t t = 0; t < dy.rows && dBias != nullptr; ++t) dBias[n] = dBias[n] + load(dy, t, n);
  }
}

}  // namespace lockstep::kernels::reference
