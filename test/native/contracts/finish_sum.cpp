// Contract of the end of a product that ranks share: with one rank's sum it is `linear` with Output::add.
#include "rows.h"

namespace lockstep::contracts {
namespace {

const Registration kFinishSum("finishSum", 40, [](Trial& t) {
  const int64_t rows = t.rows(), width = drawWidth(t), in = t.integer(1, 40);
  t.note("rows", rows);
  t.note("width", width);
  const WeightMatrix w = t.weight(t.dtype(), drawLayout(t, width, in, kernels::Split::kIn));
  const Matrix x = t.matrix(t.dtype(), rows, in), residual = t.matrix(DType::kFloat32, rows, width);
  const Buffer numbers = t.floats(width);
  const float* bias = t.chance(0.5) ? numbers.as<float>() : nullptr;
  const Matrix blank = t.matrix(DType::kFloat32, rows, width), sum = t.matrix(DType::kFloat32, rows, width);
  const Matrix expected = blank.clone(), byReference = blank.clone();
  t.reference().linear(t.referenceQueue(), x.operand(), w.weight(), bias,
                       kernels::Output::add(residual.view(), expected.view()));
  t.reference().linear(t.referenceQueue(), x.operand(), w.weight(), nullptr, kernels::Output::store(sum.view()));
  t.reference().finishSum(t.referenceQueue(), sum.view(), bias, residual.view(), byReference.view());
  t.compare("y of the reference", expected, byReference);
  t.eachQueue([&](Queue& queue) {
    const Matrix actual = blank.clone();
    t.implementation().finishSum(queue, sum.view(), bias, residual.view(), actual.view());
    t.compare("y", expected, actual);
    const Matrix inPlace = expected.clone();
    for (int64_t r = 0; r < rows; ++r) std::copy_n(sum.view().row(r), width, inPlace.view().row(r));
    t.implementation().finishSum(queue, inPlace.view(), bias, residual.view(), inPlace.view());
    t.compare("y in the place of the sum", expected, inPlace);
  });
});

}  // namespace
}  // namespace lockstep::contracts
