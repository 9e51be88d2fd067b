// publish and round: the two places where float32 becomes an operand outside of another operation.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/pairs.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

void publish(Queue& queue, const WeightLayout& layout, const float* master, void* weights) {
  BFloat16* out = static_cast<BFloat16*>(weights);
  forPairs(queue, layout, [&](int64_t offset, int64_t width) {
    for (int64_t n = 0; n < width; n += 16) {
      const Vec even = loadu(master + offset + n), odd = loadu(master + offset + width + n);
      storePairs(out + offset + 2 * n, makePairs(even, odd));
    }
  });
}

void round(Queue& queue, View<const float> src, Operand dst) {
  forRanges(queue, src.rows, src.cols, [&](int64_t begin, int64_t end) {
    withElement(dst.dtype, [&](auto element) {
      for (int64_t t = begin; t < end; ++t) {
        auto* out = dst.row<decltype(element)>(t);
        eachVector(src.cols, [&](int64_t i, auto lanes) { store(out + i, load(src.row(t) + i, lanes), lanes); });
      }
    });
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
