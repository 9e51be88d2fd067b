// publish and round: the two places where float32 becomes an operand outside of another operation.
#include "kernels/reference/reference.h"
#include "kernels/reference/rows.h"

namespace lockstep::kernels::reference {

void publish(Queue&, const WeightLayout& layout, const float* master, void* weights) {
  BFloat16* out = static_cast<BFloat16*>(weights);
  for (int64_t i = 0; i < layout.elements; ++i) out[i] = BFloat16{0};
  for (const Part& part : layout.parts) {
    for (int64_t row = part.outBegin; row < part.outBegin + part.out; ++row) {
      for (int64_t col = part.inBegin; col < part.inBegin + part.in; ++col) {
        out[bfloat16Index(layout, row, col)] = toBFloat16(master[float32Index(layout, row, col)]);
      }
    }
  }
}

void round(Queue&, View<const float> src, Operand dst) {
  for (int64_t t = 0; t < src.rows; ++t) {
    for (int64_t i = 0; i < src.cols; ++i) store(dst, t, i, src.row(t)[i]);
  }
}

}  // namespace lockstep::kernels::reference
