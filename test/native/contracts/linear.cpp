// The matrix products: every split, uneven and empty parts, rows around the thresholds, strides, aliases.
#include <algorithm>

#include "harness.h"

namespace lockstep::contracts {
namespace {

using kernels::Activation;
using kernels::Output;
using kernels::Split;
using kernels::WeightLayout;

// At most so many multiplications a trial: the reference runs them one by one.
constexpr int64_t kBudget = 3'000'000;

struct Shape {
  int64_t rows, out, in;
};

Shape drawShape(Trial& t) {
  const auto size = [&](int64_t most) {
    const int64_t around =
        t.pick({15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 96, 127, 128, 129, 160, 255, 256, 257, 320, 513, 600});
    return std::min(most, t.chance(0.4) ? t.integer(1, 80) : around);
  };
  Shape s{};
  s.rows = t.chance(0.1) ? t.pick({223, 224, 225, 448, 450}) : t.rows();
  s.out = size(kBudget / s.rows);
  s.in = size(std::max<int64_t>(1, kBudget / s.rows / s.out));
  return s;
}

WeightLayout drawLayout(Trial& t, int64_t out, int64_t in, int64_t unit = 1) {
  const int64_t parts = t.pick({1, 2, 4, 8});
  const Split split = parts == 1 ? Split::kNone : t.chance(0.5) ? Split::kOut : Split::kIn;
  const int64_t total = split == Split::kIn ? in : out;
  const std::vector<int64_t> sizes = t.partSizes(total, parts, split == Split::kIn ? 1 : unit);
  t.note("out", out);
  t.note("in", in);
  t.note(split == Split::kIn ? "parts of in" : "parts of out", sizes);
  return WeightLayout::make(out, in, split, sizes);
}

// Where a product goes, its memory and how to name it.
struct Target {
  Matrix y, residual;
  Output::Kind kind;
  bool inPlace;

  static Target draw(Trial& t, int64_t rows, int64_t cols) {
    const Output::Kind kind = static_cast<Output::Kind>(t.integer(0, 2));
    t.note("output", static_cast<int64_t>(kind));
    const DType dtype = kind == Output::Kind::kRound ? t.dtype() : DType::kFloat32;
    return {t.matrix(dtype, rows, cols), t.matrix(DType::kFloat32, rows, cols), kind, t.chance(0.5)};
  }
  Target clone() const { return {y.clone(), residual, kind, inPlace}; }
  Output output() const {
    if (kind == Output::Kind::kStore) return Output::store(y.view());
    if (kind == Output::Kind::kRound) return Output::round(y.operand());
    return Output::add(inPlace ? y.view() : residual.view(), y.view());
  }
};

// So many rows that a blocked product packs its left operand in several passes: with eight leaves a packed row is long
// however few steps they have.
Shape drawManyRows(Trial& t, Split leaves) {
  Shape s{t.integer(1000, 1700), 24, 24};
  (leaves == Split::kIn ? s.out : s.in) = t.pick({130, 144, 200});
  return s;
}
WeightLayout eightParts(const Shape& s, Split split) {
  return WeightLayout::make(s.out, s.in, split, std::vector<int64_t>(8, (split == Split::kIn ? s.in : s.out) / 8));
}

// Of operands that kernels copy 16 bytes at a time, parts begin at multiples of so many columns.
constexpr int64_t kWide = 8;

// As many rows as the largest tiles of a GPU take, and the operand aligned as they want it.
struct LargeTiles {
  Shape s;
  WeightLayout layout;

  // `split` is that of the parts, the other dimension is as given.
  static LargeTiles draw(Trial& t, int64_t rows, Split split, int64_t other, int64_t unit = kWide) {
    const int64_t cut = t.pick({2, 5, 9, 18}) * unit;
    Shape s{rows, other, cut};
    if (split == Split::kOut) std::swap(s.out, s.in);
    const std::vector<int64_t> sizes = t.partSizes(cut, t.pick({2, 4}), unit);
    t.note("out", s.out);
    t.note("in", s.in);
    t.note(split == Split::kIn ? "parts of in" : "parts of out", sizes);
    return {s, WeightLayout::make(s.out, s.in, split, sizes)};
  }
};

void linearCase(Trial& t, const Shape& s, const WeightLayout& layout, bool aligned = false) {
  t.note("rows", s.rows);
  const WeightMatrix w = t.weight(t.dtype(), layout);
  const Matrix x = aligned ? t.alignedMatrix(t.dtype(), s.rows, s.in) : t.matrix(t.dtype(), s.rows, s.in);
  const Buffer bias = t.floats(s.out);
  const float* biasOrNull = t.chance(0.5) ? bias.as<float>() : nullptr;
  const Target fresh = Target::draw(t, s.rows, s.out), expected = fresh.clone();
  t.reference().linear(t.referenceQueue(), x.operand(), w.weight(), biasOrNull, expected.output());
  t.eachQueue([&](Queue& queue) {
    const Target actual = fresh.clone();
    t.implementation().linear(queue, x.operand(), w.weight(), biasOrNull, actual.output());
    t.compare("y", expected.y, actual.y);

    const int64_t first = t.integer(0, s.rows - 1), count = t.integer(1, s.rows - first);
    const Matrix whole = t.matrix(DType::kFloat32, s.rows, s.out), part = t.matrix(DType::kFloat32, count, s.out);
    t.implementation().linear(queue, x.operand(), w.weight(), biasOrNull, Output::store(whole.view()));
    t.implementation().linear(queue, x.operand().slice(first, count), w.weight(), biasOrNull,
                              Output::store(part.view()));
    t.compareRows("y", whole, first, part);
  });
}

const Registration kLinear("linear", 60, [](Trial& t) {
  const Shape s = drawShape(t);
  linearCase(t, s, drawLayout(t, s.out, s.in));
});
const Registration kLinearManyRows("linear.manyRows", 4, [](Trial& t) {
  const Shape s = drawManyRows(t, Split::kIn);
  linearCase(t, s, eightParts(s, Split::kIn));
});

const Registration kLinearLargeTiles("linear.largeTiles", DType::kBFloat16, 6, [](Trial& t) {
  const LargeTiles large =
      LargeTiles::draw(t, t.pick({1024, 1025, 1100}), t.chance(0.5) ? Split::kIn : Split::kOut, t.pick({8, 40, 136}));
  linearCase(t, large.s, large.layout, true);
});

// Gate and up rows of a part are equally many; the parts of W hold both.
constexpr int64_t unitOf(Activation activation) {
  return activation == Activation::kSwiGlu ? 2 : 1;
}

void activatedCase(Trial& t, const Shape& s, const WeightLayout& layout, Activation activation, bool aligned = false) {
  const int64_t unit = unitOf(activation);
  t.note("rows", s.rows);
  const WeightMatrix w = t.weight(t.dtype(), layout);
  const Matrix x = aligned ? t.alignedMatrix(t.dtype(), s.rows, s.in, 2) : t.matrix(t.dtype(), s.rows, s.in, 2);
  const Buffer bias = t.floats(s.out, 3);
  const float* biasOrNull = t.chance(0.5) ? bias.as<float>() : nullptr;
  const bool saves = t.chance(0.5);
  const Matrix y = t.matrix(t.dtype(), s.rows, s.out / unit), saved = t.matrix(t.dtype(), s.rows, s.out);
  const Matrix expectedY = y.clone(), expectedSaved = saved.clone();
  t.reference().activatedLinear(t.referenceQueue(), x.operand(), w.weight(), biasOrNull, activation,
                                expectedY.operand(), saves ? expectedSaved.operand() : Operand{});
  t.eachQueue([&](Queue& queue) {
    const Matrix actualY = y.clone(), actualSaved = saved.clone();
    t.implementation().activatedLinear(queue, x.operand(), w.weight(), biasOrNull, activation, actualY.operand(),
                                       saves ? actualSaved.operand() : Operand{});
    t.compare("y", expectedY, actualY);
    t.compare("saved", expectedSaved, actualSaved);

    const int64_t first = t.integer(0, s.rows - 1), count = t.integer(1, s.rows - first);
    const Matrix part = t.matrix(t.dtype(), count, s.out / unit);
    t.implementation().activatedLinear(queue, x.operand().slice(first, count), w.weight(), biasOrNull, activation,
                                       part.operand(), {});
    t.compareRows("y", actualY, first, part);
  });
}

void anyActivated(Trial& t, Activation activation) {
  Shape s = drawShape(t);
  const int64_t unit = unitOf(activation), parts = t.pick({1, 2, 4, 8});
  s.out += s.out % unit;
  const std::vector<int64_t> sizes = t.partSizes(s.out, parts, unit);
  t.note("out", s.out);
  t.note("in", s.in);
  t.note("parts of out", sizes);
  activatedCase(t, s, WeightLayout::make(s.out, s.in, parts == 1 ? Split::kNone : Split::kOut, sizes), activation);
}
const Registration kSwiGlu("activatedLinear.swiglu", 50, [](Trial& t) { anyActivated(t, Activation::kSwiGlu); });
const Registration kGelu("activatedLinear.gelu", 30, [](Trial& t) { anyActivated(t, Activation::kGeluTanh); });
const Registration kActivatedLargeTiles("activatedLinear.largeTiles", DType::kBFloat16, 6, [](Trial& t) {
  const Activation activation = t.chance(0.5) ? Activation::kSwiGlu : Activation::kGeluTanh;
  const LargeTiles large = LargeTiles::draw(t, t.pick({1024, 1025, 1100}), Split::kOut, t.pick({8, 40}));
  activatedCase(t, large.s, large.layout, activation, true);
});

void backwardInputCase(Trial& t, const Shape& s, const WeightLayout& layout, bool aligned = false) {
  t.note("rows", s.rows);
  const WeightMatrix w = t.weight(t.dtype(), layout);
  const Matrix dy = aligned ? t.alignedMatrix(t.dtype(), s.rows, s.out) : t.matrix(t.dtype(), s.rows, s.out);
  const Target fresh = Target::draw(t, s.rows, s.in), expected = fresh.clone();
  t.reference().linearBackwardInput(t.referenceQueue(), dy.operand(), w.weight(), expected.output());
  t.eachQueue([&](Queue& queue) {
    const Target actual = fresh.clone();
    t.implementation().linearBackwardInput(queue, dy.operand(), w.weight(), actual.output());
    t.compare("dx", expected.y, actual.y);

    const int64_t first = t.integer(0, s.rows - 1), count = t.integer(1, s.rows - first);
    const Matrix whole = t.matrix(DType::kFloat32, s.rows, s.in), part = t.matrix(DType::kFloat32, count, s.in);
    t.implementation().linearBackwardInput(queue, dy.operand(), w.weight(), Output::store(whole.view()));
    t.implementation().linearBackwardInput(queue, dy.operand().slice(first, count), w.weight(),
                                           Output::store(part.view()));
    t.compareRows("dx", whole, first, part);
  });
}

const Registration kBackwardInput("linearBackwardInput", 60, [](Trial& t) {
  const Shape s = drawShape(t);
  backwardInputCase(t, s, drawLayout(t, s.out, s.in));
});
const Registration kBackwardInputManyRows("linearBackwardInput.manyRows", 4, [](Trial& t) {
  const Shape s = drawManyRows(t, Split::kOut);
  backwardInputCase(t, s, eightParts(s, Split::kOut));
});

const Registration kBackwardInputLargeTiles("linearBackwardInput.largeTiles", DType::kBFloat16, 6, [](Trial& t) {
  const LargeTiles large =
      LargeTiles::draw(t, t.pick({128, 129, 255, 300}), t.chance(0.3) ? Split::kIn : Split::kOut, t.pick({8, 40, 136}));
  backwardInputCase(t, large.s, large.layout, true);
});
// More tiles of dx than blocks, which take one after another and join parts in room that they use again.
const Registration kBackwardInputManyTiles("linearBackwardInput.manyTiles", 1, [](Trial& t) {
  const int64_t rows = 2, in = 264 * (t.dtype() == DType::kFloat32 ? 64 : 128) + 1;
  const WeightMatrix w = t.weight(t.dtype(), WeightLayout::make(4, in, Split::kOut, {3, 1}));
  const Matrix dy = t.matrix(t.dtype(), rows, 4), dx = t.matrix(DType::kFloat32, rows, in), expected = dx.clone();
  t.reference().linearBackwardInput(t.referenceQueue(), dy.operand(), w.weight(), Output::store(expected.view()));
  t.eachQueue([&](Queue& queue) {
    const Matrix actual = dx.clone();
    t.implementation().linearBackwardInput(queue, dy.operand(), w.weight(), Output::store(actual.view()));
    t.compare("dx", expected, actual);
  });
});

const Registration kBackwardWeight("linearBackwardWeight", 60, [](Trial& t) {
  Shape s = drawShape(t);
  s.rows += s.rows % 2;
  t.note("rows", s.rows);
  const WeightMatrix fresh = t.weight(DType::kFloat32, drawLayout(t, s.out, s.in));
  const Matrix dy = t.matrix(t.dtype(), s.rows, s.out), x = t.matrix(t.dtype(), s.rows, s.in);
  const Buffer bias = t.floats(s.out);
  const bool biased = t.chance(0.5);
  const WeightMatrix expected = fresh.clone();
  const Buffer expectedBias = bias.clone();
  t.reference().linearBackwardWeight(t.referenceQueue(), dy.operand(), x.operand(), expected.gradient(),
                                     biased ? expectedBias.as<float>() : nullptr);
  t.eachQueue([&](Queue& queue) {
    const WeightMatrix actual = fresh.clone();
    const Buffer actualBias = bias.clone();
    float* const dBias = biased ? actualBias.as<float>() : nullptr;
    // Two micro-batches, cut between pairs of rows, accumulate as one.
    const int64_t cut = t.integer(0, s.rows / 2) * 2;
    const auto accumulate = [&](int64_t begin, int64_t count) {
      if (count == 0) return;
      t.implementation().linearBackwardWeight(queue, dy.operand().slice(begin, count), x.operand().slice(begin, count),
                                              actual.gradient(), dBias);
    };
    accumulate(0, cut);
    accumulate(cut, s.rows - cut);
    t.compare("dW", expected, actual);
    t.compare("dBias", expectedBias, actualBias);
  });
});

}  // namespace
}  // namespace lockstep::contracts
