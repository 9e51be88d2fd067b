// Backward of the gated and plain activations: elementwise, by rows.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/rows.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

template <class T>
LOCKSTEP_INLINE void gatedRow(const T* gate, const T* up, const float* d, int64_t count, T* dGate, T* dUp) {
  eachVector(count, [&](int64_t i, auto lanes) {
    const Vec g = load(gate + i, lanes), dOut = load(d + i, lanes);
    store(dGate + i, dOut * load(up + i, lanes) * siluDerivative(g), lanes);
    store(dUp + i, dOut * silu(g), lanes);
  });
}

template <class T>
LOCKSTEP_INLINE void geluRow(const T* x, const float* d, int64_t count, T* dx) {
  eachVector(count, [&](int64_t i, auto lanes) {
    store(dx + i, load(d + i, lanes) * geluTanhDerivative(load(x + i, lanes)), lanes);
  });
}

}  // namespace

void activationBackward(Queue& queue, Activation activation, const WeightLayout& up, Operand saved,
                        View<const float> dActivated, Operand dSaved) {
  forRanges(queue, dActivated.rows, saved.cols, [&](int64_t begin, int64_t end) {
    withElement(saved.dtype, [&](auto element) {
      using T = decltype(element);
      for (int64_t t = begin; t < end; ++t) {
        const T* in = saved.row<T>(t);
        const float* d = dActivated.row(t);
        T* out = dSaved.row<T>(t);
        if (activation == Activation::kGeluTanh) {
          geluRow(in, d, dActivated.cols, out);
          continue;
        }
        for (const Part& part : up.parts) {
          const int64_t gate = part.outBegin, half = part.out / 2;
          gatedRow(in + gate, in + gate + half, d + gate / 2, half, out + gate, out + gate + half);
        }
      }
    });
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
