// Backward of SwiGLU (Shazeer, 2020) and of the tanh form of GELU (Hendrycks and Gimpel, 2016).
#include "kernels/math.h"
#include "kernels/reference/reference.h"
#include "kernels/reference/rows.h"

namespace lockstep::kernels::reference {

void activationBackward(Queue&, Activation activation, const WeightLayout& up, Operand saved,
                        View<const float> dActivated, Operand dSaved) {
  for (int64_t t = 0; t < dActivated.rows; ++t) {
    if (activation == Activation::kGeluTanh) {
      for (int64_t i = 0; i < dActivated.cols; ++i) {
        store(dSaved, t, i, dActivated.row(t)[i] * geluTanhDerivative(load(saved, t, i)));
      }
      continue;
    }
    for (const Part& part : up.parts) {
      const int64_t half = part.out / 2;
      for (int64_t i = 0; i < half; ++i) {
        const int64_t gateColumn = part.outBegin + i, upColumn = gateColumn + half;
        const float gate = load(saved, t, gateColumn), upValue = load(saved, t, upColumn);
        const float d = dActivated.row(t)[part.outBegin / 2 + i];
        store(dSaved, t, gateColumn, d * upValue * siluDerivative(gate));
        store(dSaved, t, upColumn, d * silu(gate));
      }
    }
  }
}

}  // namespace lockstep::kernels::reference
