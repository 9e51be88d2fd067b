// Contracts of the backward of activations; pre-activations reach far into both saturated ends.
#include "rows.h"

namespace lockstep::contracts {
namespace {

double geluTanh(double x) {
  return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
double silu(double x) {
  return x / (1 + std::exp(-x));
}

// One element of dSaved against the slope of the activation in float64.
void expectSlope(Trial& t, kernels::Activation activation, const kernels::WeightLayout& up, const Matrix& saved,
                 const Matrix& d, const Matrix& dSaved) {
  const int64_t row = t.integer(0, saved.rows - 1), col = t.integer(0, saved.cols - 1);
  const double bound = t.dtype() == DType::kFloat32 ? 1e-4 : 1e-2;
  const auto value = [&](int64_t c) { return static_cast<double>(valueAt(saved, row, c)); };
  const auto at = [&](double (*f)(double), double x) {
    return slope([&](const std::vector<double>& v) { return f(v[0]); }, {x}, 0);
  };
  if (activation == kernels::Activation::kGeluTanh) {
    expectNear(t, "dSaved", valueAt(d, row, col) * at(geluTanh, value(col)), valueAt(dSaved, row, col), bound);
    return;
  }
  for (const kernels::Part& part : up.parts) {
    if (col < part.outBegin || col >= part.outBegin + part.out) continue;
    const int64_t half = part.out / 2, i = (col - part.outBegin) % half, gate = part.outBegin + i;
    const double dOut = valueAt(d, row, part.outBegin / 2 + i);
    const double expected =
        col < part.outBegin + half ? dOut * value(gate + half) * at(silu, value(gate)) : dOut * silu(value(gate));
    expectNear(t, "dSaved", expected, valueAt(dSaved, row, col), bound);
  }
}

const Registration kActivationBackward("activationBackward", 80, [](Trial& t) {
  const bool gated = t.chance(0.5);
  const auto activation = gated ? kernels::Activation::kSwiGlu : kernels::Activation::kGeluTanh;
  const int64_t rows = t.rows(), width = t.integer(1, 150), out = gated ? 2 * width : width;
  t.note("gated", gated);
  t.note("rows", rows);
  t.note("width", width);
  const auto layout =
      kernels::WeightLayout::make(out, 8, kernels::Split::kOut, t.partSizes(out, t.pick({1, 2, 4, 8}), 2 - !gated));
  const Matrix saved = t.matrix(t.dtype(), rows, out, static_cast<float>(t.pick({1, 8, 100})));
  const Matrix d = t.matrix(DType::kFloat32, rows, width);
  Matrix expected = t.matrix(t.dtype(), rows, out);
  const Matrix blank = expected.clone();
  t.reference().activationBackward(t.referenceQueue(), activation, layout, saved.operand(), d.view(),
                                   expected.operand());
  t.eachQueue([&](Queue& queue) {
    Matrix actual = blank.clone();
    t.implementation().activationBackward(queue, activation, layout, saved.operand(), d.view(), actual.operand());
    t.compare("dSaved", expected, actual);
  });
  expectSlope(t, activation, layout, saved, d, expected);
});

}  // namespace
}  // namespace lockstep::contracts
