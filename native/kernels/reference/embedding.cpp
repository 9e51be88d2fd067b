// Token and position embeddings, forward and backward.
#include "kernels/reference/reference.h"
#include "kernels/reference/rows.h"

namespace lockstep::kernels::reference {

void embed(Queue&, const int32_t* tokens, const int32_t* positions, const Weight& e, const float* positionTable,
           View<float> x) {
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t i = 0; i < x.cols; ++i) {
      float value = 0;
      if (tokens[t] >= 0) {
        value = e.dtype == DType::kFloat32
                    ? static_cast<const float*>(e.data)[float32Index(*e.layout, tokens[t], i)]
                    : toFloat(static_cast<const BFloat16*>(e.data)[bfloat16Index(*e.layout, tokens[t], i)]);
        if (positionTable != nullptr) value = value + positionTable[positions[t] * x.cols + i];
      }
      x.row(t)[i] = value;
    }
  }
}

void embedBackward(Queue&, const int32_t* tokens, const int32_t* positions, View<const float> dx, WeightGradient dE,
                   float* dPositionTable) {
  for (int64_t t = 0; t < dx.rows; ++t) {
    for (int64_t i = 0; i < dx.cols; ++i) {
      if (tokens[t] >= 0) {
        float& element = dE.data[float32Index(*dE.layout, tokens[t], i)];
        element = element + dx.row(t)[i];
      }
      if (dPositionTable != nullptr && positions[t] >= 0) {
        float& position = dPositionTable[positions[t] * dx.cols + i];
        position = position + dx.row(t)[i];
      }
    }
  }
}

}  // namespace lockstep::kernels::reference
