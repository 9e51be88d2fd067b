// The end of a product whose parts several ranks have computed.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/rows.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

void finishSum(Queue& queue, View<const float> sum, const float* bias, View<const float> residual, View<float> y) {
  forRanges(queue, sum.rows, sum.cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      eachVector(sum.cols, [&](int64_t i, auto lanes) {
        Vec value = load(sum.row(t) + i, lanes);
        if (bias != nullptr) value = value + load(bias + i, lanes);
        store(y.row(t) + i, load(residual.row(t) + i, lanes) + value, lanes);
      });
    }
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
