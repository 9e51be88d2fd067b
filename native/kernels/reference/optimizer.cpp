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

void sumsOfSquares(Queue&, const Run* runs, int64_t count, double* sums) {
  for (int64_t r = 0; r < count; ++r) {
    std::vector<double> leaves;
    for (int64_t begin = 0; begin < runs[r].count; begin += 4096) {
      const float* leaf = runs[r].data + begin;
      const int64_t size = runs[r].count - begin < 4096 ? runs[r].count - begin : 4096;
      leaves.push_back(lanesSum(size, [&](float acc, int64_t i) { return fma(leaf[i], leaf[i], acc); }));
    }
    while (leaves.size() > 1) {
      std::vector<double> next;
      for (size_t i = 0; i < leaves.size(); i += 2)
        next.push_back(i + 1 < leaves.size() ? leaves[i] + leaves[i + 1] : leaves[i]);
      leaves = next;
    }
    sums[r] = leaves.empty() ? 0 : leaves[0];
  }
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
