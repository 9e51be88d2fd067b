// y = activation(x W^T + bias): the pre-activations of a block of rows stay in the queue's shared scratch, float32.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/product.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

constexpr int64_t kRows = 512;

template <class T>
void activateRow(const WeightLayout& layout, Activation activation, const float* pre, T* y, T* saved) {
  int64_t to = 0;
  for (const Part& part : layout.parts) {
    const int64_t columns = activation == Activation::kSwiGlu ? part.out / 2 : part.out;
    const float *gate = pre + part.outBegin, *up = gate + columns;
    eachVector(columns, [&](int64_t j, auto lanes) {
      const Vec g = load(gate + j, lanes);
      const Vec value = activation == Activation::kSwiGlu ? silu(g) * load(up + j, lanes) : geluTanh(g);
      store(y + to + j, value, lanes);
    });
    to += columns;
  }
  if (saved == nullptr) return;
  eachVector(layout.out, [&](int64_t j, auto lanes) { store(saved + j, load(pre + j, lanes), lanes); });
}

}  // namespace

void activatedLinear(Queue& queue, Operand x, const Weight& w, const float* bias, Activation activation, Operand y, Operand saved) {
  const WeightLayout& layout = *w.layout;
  const int64_t block = least(kRows, x.rows), stride = roundUp(layout.out, 16);
  auto* memory = static_cast<float*>(queue.shared(static_cast<size_t>(block * stride) * 4));
  for (int64_t begin = 0; begin < x.rows; begin += kRows) {
    const int64_t rows = least(kRows, x.rows - begin);
    const View<float> pre{memory, rows, layout.out, stride};
    linear(queue, x.slice(begin, rows), w, bias, Output::store(pre));
    forRanges(queue, rows, layout.out, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        withElement(y.dtype, [&](auto element) {
          using T = decltype(element);
          activateRow(layout, activation, pre.row(r), y.row<T>(begin + r), saved.empty() ? nullptr : saved.row<T>(begin + r));
        });
      }
    });
  }
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
