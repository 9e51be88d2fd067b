// Contracts of the norms: the reference's bits, rows that do not see each other, and gradients that are the slopes of
// the float64 formula.
#include "rows.h"

namespace lockstep::contracts {
namespace {

std::vector<double> rmsNormed(const std::vector<double>& x, const float* gain, double eps) {
  double squares = 0;
  for (const double v : x) squares += v * v;
  std::vector<double> y;
  for (size_t i = 0; i < x.size(); ++i) y.push_back(x[i] / std::sqrt(squares / x.size() + eps) * gain[i]);
  return y;
}

std::vector<double> layerNormed(const std::vector<double>& x, const float* gain, double eps) {
  double sum = 0, squares = 0;
  for (const double v : x) sum += v;
  for (const double v : x) squares += (v - sum / x.size()) * (v - sum / x.size());
  std::vector<double> y;
  for (size_t i = 0; i < x.size(); ++i) {
    y.push_back((x[i] - sum / x.size()) / std::sqrt(squares / x.size() + eps) * gain[i]);
  }
  return y;
}

// dx (minus what it was) of one row against the slopes of sum(dy y).
void expectSlopes(Trial& t, const Matrix& x, const Matrix& dy, const Matrix& before, const Matrix& after,
                  const std::function<std::vector<double>(const std::vector<double>&)>& norm) {
  const int64_t row = t.integer(0, x.rows - 1), col = t.integer(0, x.cols - 1);
  const auto loss = [&](const std::vector<double>& values) {
    const std::vector<double> y = norm(values);
    double sum = 0;
    for (int64_t i = 0; i < x.cols; ++i) sum += y[i] * valueAt(dy, row, i);
    return sum;
  };
  const double expected = slope(loss, rowOf(x, row), static_cast<size_t>(col));
  expectNear(t, "dx", expected, static_cast<double>(valueAt(after, row, col)) - valueAt(before, row, col), 1e-3);
}

struct Problem {
  float eps;
  Matrix x, dy, dx;
  Buffer gain, bias, dGain, dBias;

  explicit Problem(Trial& t) : eps(t.chance(0.5) ? 1e-5f : 1e-6f) {
    // Narrow ones have more rows than a GPU brings to shared memory at once.
    const int64_t width = drawWidth(t), rows = width <= 33 && t.chance(0.3) ? t.integer(300, 700) : t.rows();
    const bool aligned = t.chance(0.5);
    t.note("rows", rows);
    t.note("width", width);
    t.note("aligned", aligned);
    const auto matrix = [&](float scale) {
      return aligned ? t.alignedMatrix(DType::kFloat32, rows, width, scale)
                     : t.matrix(DType::kFloat32, rows, width, scale);
    };
    x = matrix(2);
    dy = matrix(1);
    dx = t.matrix(DType::kFloat32, rows, width);
    gain = t.floats(width);
    bias = t.floats(width);
    dGain = t.floats(width);
    dBias = t.floats(width);
  }
  int64_t rows() const { return x.rows; }
};

const Registration kRmsNorm("rmsNorm", 60, [](Trial& t) {
  Problem p(t);
  Matrix expected = t.matrix(t.dtype(), p.rows(), p.x.cols);
  const Matrix blank = expected.clone();
  Buffer expectedR = t.floats(p.rows());
  t.reference().rmsNorm(t.referenceQueue(), p.x.view(), p.gain.as<float>(), p.eps, expected.operand(),
                        expectedR.as<float>());
  t.eachQueue([&](Queue& queue) {
    Matrix y = blank.clone();
    Buffer r = t.floats(p.rows());
    t.implementation().rmsNorm(queue, p.x.view(), p.gain.as<float>(), p.eps, y.operand(), r.as<float>());
    t.compare("y", expected, y);
    t.compare("inverseRms", expectedR, r);
    Matrix again = blank.clone();
    t.implementation().rmsNorm(queue, p.x.view(), p.gain.as<float>(), p.eps, again.operand(), nullptr);
    t.compare("y without inverseRms", expected, again);
    const int64_t first = t.integer(0, p.rows() - 1), count = t.integer(1, p.rows() - first);
    Matrix part = t.matrix(t.dtype(), count, p.x.cols);
    t.implementation().rmsNorm(queue, p.x.view().slice(first, count), p.gain.as<float>(), p.eps, part.operand(),
                               nullptr);
    t.compareRows("y", y, first, part);
  });
  const int64_t row = t.integer(0, p.rows() - 1), col = t.integer(0, p.x.cols - 1);
  expectNear(t, "y", rmsNormed(rowOf(p.x, row), p.gain.as<float>(), p.eps)[col], valueAt(expected, row, col),
             t.dtype() == DType::kFloat32 ? 1e-5 : 1e-2);
});

const Registration kRmsNormBackward("rmsNormBackward", DType::kFloat32, 60, [](Trial& t) {
  Problem p(t);
  Matrix y = t.matrix(DType::kFloat32, p.rows(), p.x.cols);
  Buffer r = t.floats(p.rows());
  t.reference().rmsNorm(t.referenceQueue(), p.x.view(), p.gain.as<float>(), p.eps, y.operand(), r.as<float>());
  Matrix expected = p.dx.clone();
  Buffer expectedGain = p.dGain.clone();
  t.reference().rmsNormBackward(t.referenceQueue(), p.x.view(), p.gain.as<float>(), r.as<float>(), p.dy.view(),
                                expected.view(), expectedGain.as<float>());
  t.eachQueue([&](Queue& queue) {
    Matrix dx = p.dx.clone();
    Buffer dGain = p.dGain.clone();
    // Two calls over a split of the rows continue the chains of one call.
    const int64_t first = t.integer(0, p.rows());
    for (const auto& [begin, count] : {std::pair{int64_t{0}, first}, std::pair{first, p.rows() - first}}) {
      t.implementation().rmsNormBackward(queue, p.x.view().slice(begin, count), p.gain.as<float>(),
                                         r.as<float>() + begin, p.dy.view().slice(begin, count),
                                         dx.view().slice(begin, count), dGain.as<float>());
    }
    t.compare("dx", expected, dx);
    t.compare("dGain", expectedGain, dGain);
  });
  expectSlopes(t, p.x, p.dy, p.dx, expected,
               [&](const std::vector<double>& x) { return rmsNormed(x, p.gain.as<float>(), p.eps); });
});

const Registration kLayerNorm("layerNorm", 60, [](Trial& t) {
  Problem p(t);
  Matrix expected = t.matrix(t.dtype(), p.rows(), p.x.cols);
  const Matrix blank = expected.clone();
  Buffer expectedMean = t.floats(p.rows()), expectedR = t.floats(p.rows());
  t.reference().layerNorm(t.referenceQueue(), p.x.view(), p.gain.as<float>(), p.bias.as<float>(), p.eps,
                          expected.operand(), expectedMean.as<float>(), expectedR.as<float>());
  t.eachQueue([&](Queue& queue) {
    Matrix y = blank.clone();
    Buffer mean = t.floats(p.rows()), r = t.floats(p.rows());
    t.implementation().layerNorm(queue, p.x.view(), p.gain.as<float>(), p.bias.as<float>(), p.eps, y.operand(),
                                 mean.as<float>(), r.as<float>());
    t.compare("y", expected, y);
    t.compare("mean", expectedMean, mean);
    t.compare("inverseStd", expectedR, r);
    const int64_t first = t.integer(0, p.rows() - 1), count = t.integer(1, p.rows() - first);
    Matrix part = t.matrix(t.dtype(), count, p.x.cols);
    t.implementation().layerNorm(queue, p.x.view().slice(first, count), p.gain.as<float>(), p.bias.as<float>(), p.eps,
                                 part.operand(), nullptr, nullptr);
    t.compareRows("y", y, first, part);
  });
  const int64_t row = t.integer(0, p.rows() - 1), col = t.integer(0, p.x.cols - 1);
  const double y = layerNormed(rowOf(p.x, row), p.gain.as<float>(), p.eps)[col] + p.bias.as<float>()[col];
  expectNear(t, "y", y, valueAt(expected, row, col), t.dtype() == DType::kFloat32 ? 1e-4 : 1e-2);
});

const Registration kLayerNormBackward("layerNormBackward", DType::kFloat32, 60, [](Trial& t) {
  Problem p(t);
  Matrix y = t.matrix(DType::kFloat32, p.rows(), p.x.cols);
  Buffer mean = t.floats(p.rows()), r = t.floats(p.rows());
  t.reference().layerNorm(t.referenceQueue(), p.x.view(), p.gain.as<float>(), p.bias.as<float>(), p.eps, y.operand(),
                          mean.as<float>(), r.as<float>());
  Matrix expected = p.dx.clone();
  Buffer expectedGain = p.dGain.clone(), expectedBias = p.dBias.clone();
  t.reference().layerNormBackward(t.referenceQueue(), p.x.view(), p.gain.as<float>(), mean.as<float>(), r.as<float>(),
                                  p.dy.view(), expected.view(), expectedGain.as<float>(), expectedBias.as<float>());
  t.eachQueue([&](Queue& queue) {
    Matrix dx = p.dx.clone();
    Buffer dGain = p.dGain.clone(), dBias = p.dBias.clone();
    const int64_t first = t.integer(0, p.rows());
    for (const auto& [begin, count] : {std::pair{int64_t{0}, first}, std::pair{first, p.rows() - first}}) {
      t.implementation().layerNormBackward(
          queue, p.x.view().slice(begin, count), p.gain.as<float>(), mean.as<float>() + begin, r.as<float>() + begin,
          p.dy.view().slice(begin, count), dx.view().slice(begin, count), dGain.as<float>(), dBias.as<float>());
    }
    t.compare("dx", expected, dx);
    t.compare("dGain", expectedGain, dGain);
    t.compare("dBias", expectedBias, dBias);
  });
  // A row of nearly equal elements has slopes too steep for float32.
  if (p.x.cols < 7) return;
  expectSlopes(t, p.x, p.dy, p.dx, expected,
               [&](const std::vector<double>& x) { return layerNormed(x, p.gain.as<float>(), p.eps); });
});

}  // namespace
}  // namespace lockstep::contracts
