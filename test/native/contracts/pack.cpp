// Contracts of publish and round.
#include "rows.h"

namespace lockstep::contracts {
namespace {

const Registration kPublish("publish", DType::kBFloat16, 60, [](Trial& t) {
  const int64_t out = t.integer(1, 300), in = t.integer(1, 70);
  t.note("out", out);
  t.note("in", in);
  const auto split = static_cast<kernels::Split>(t.integer(0, 2));
  WeightMatrix master = t.weight(DType::kFloat32, drawLayout(t, out, in, split));
  const int64_t elements = master.layout->elements;
  Matrix blank = t.matrix(DType::kBFloat16, 1, elements);
  blank.stride = elements;
  Matrix expected = blank.clone();
  t.reference().publish(t.referenceQueue(), *master.layout, master.buffer.as<float>(), expected.buffer.as<char>());
  t.eachQueue([&](Queue& queue) {
    Matrix actual = blank.clone();
    t.implementation().publish(queue, *master.layout, master.buffer.as<float>(), actual.buffer.as<char>());
    t.compare("weights", expected, actual);
  });
});

const Registration kRound("round", 60, [](Trial& t) {
  const int64_t rows = t.rows(), cols = drawWidth(t);
  t.note("rows", rows);
  t.note("cols", cols);
  Matrix src = t.matrix(DType::kFloat32, rows, cols);
  src.data()[t.integer(0, cols - 1)] = t.chance(0.5) ? INFINITY : -INFINITY;
  if (t.chance(0.3)) src.data()[t.integer(0, cols - 1)] = NAN;
  Matrix expected = t.matrix(t.dtype(), rows, cols);
  const Matrix blank = expected.clone();
  t.reference().round(t.referenceQueue(), src.view(), expected.operand());
  t.eachQueue([&](Queue& queue) {
    Matrix actual = blank.clone();
    t.implementation().round(queue, src.view(), actual.operand());
    t.compare("dst", expected, actual);
  });
});

}  // namespace
}  // namespace lockstep::contracts
