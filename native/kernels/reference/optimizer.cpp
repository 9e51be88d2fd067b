// AdamW (Loshchilov and Hutter, 2019), the sum of squares behind gradient clipping, and joining two accumulators.
#include <vector>

#include "kernels/math.h"
#include "kernels/reference/reference.h"
#include "kernels/reference/rows.h"

namespace lockstep::kernels::reference {

void accumulate(Queue&, int64_t count, float* src, float* dst) {
  for (int64_t i = 0; i < count; ++i) {
    dst[i] = dst[i] + src[i];
    src[i] = 0;
  }
}

double sumOfSquares(Queue&, const float* gradient, int64_t count) {
  std::vector<double> sums;
  for (int64_t begin = 0; begin < count; begin += 4096) {
    const float* leaf = gradient + begin;
    const int64_t size = count - begin < 4096 ? count - begin : 4096;
    sums.push_back(lanesSum(size, [&](float acc, int64_t i) { return fma(leaf[i], leaf[i], acc); }));
  }
  while (sums.size() > 1) {
    std::vector<double> next;
    for (size_t i = 0; i < sums.size(); i += 2) next.push_back(i + 1 < sums.size() ? sums[i] + sums[i + 1] : sums[i]);
    sums = next;
  }
  return sums.empty() ? 0 : sums[0];
}

void adamw(Queue& queue, const AdamW& a, int64_t count, float* parameter, float* m, float* v, float* gradient,
           const WeightLayout* layout, void* weights) {
  const float scale = static_cast<float>(a.gradientScale);
  const float beta1 = static_cast<float>(a.beta1), rest1 = static_cast<float>(1 - a.beta1);
  const float beta2 = static_cast<float>(a.beta2), rest2 = static_cast<float>(1 - a.beta2);
  const float decay = static_cast<float>(1 - a.learningRate * a.weightDecay);
  const float step = static_cast<float>(a.learningRate / a.correction1);
  const float root = static_cast<float>(1 / std::sqrt(a.correction2)), epsilon = static_cast<float>(a.epsilon);
  for (int64_t i = 0; i < count; ++i) {
    const float g = gradient[i] * scale;
    m[i] = fma(beta1, m[i], rest1 * g);
    v[i] = fma(beta2, v[i], rest2 * (g * g));
    const float update = m[i] / fma(std::sqrt(v[i]), root, epsilon);
    parameter[i] = fma(-step, update, parameter[i] * decay);
    gradient[i] = 0;
  }
  if (layout != nullptr) publish(queue, *layout, parameter, weights);
}

}  // namespace lockstep::kernels::reference
