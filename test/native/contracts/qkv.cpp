// Contracts of qkvPrepare and qkvPrepareBackward: equal bits to the reference in operands, pages and gradients; chunk
// by chunk writes the same pages as all at once; backward is the derivative of forward.
#include "attention_problem.h"

namespace lockstep::contracts {

namespace {

struct QkvProblem {
  AttentionProblem p;
  Matrix qkv;
  Buffer queryGain, keyGain, cosine, sine;
  bool hasNorm, hasRope, saves;

  static QkvProblem draw(Trial& t, bool training) {
    QkvProblem x{AttentionProblem::draw(t, training), {}, {}, {}, {}, {}, t.chance(0.5), t.chance(0.75), false};
    const int64_t width = x.p.shape().headWidth, half = width / 2, positions = 303;
    x.saves = x.hasNorm && training;
    x.qkv = t.matrix(DType::kFloat32, x.p.rows, x.p.layout.columns(), 2);
    x.queryGain = t.floats(width, 2);
    x.keyGain = t.floats(width, 2);
    x.cosine = t.floats(positions * half);
    x.sine = t.floats(positions * half);
    t.note("norm", x.hasNorm);
    t.note("rope", x.hasRope);
    return x;
  }

  kernels::HeadNorm norm() const {
    return hasNorm ? kernels::HeadNorm{queryGain.as<float>(), keyGain.as<float>(), 1e-5f} : kernels::HeadNorm{};
  }
  kernels::Rope rope() const { return hasRope ? kernels::Rope{cosine.as<float>(), sine.as<float>()} : kernels::Rope{}; }
  int64_t savedColumns() const { return (p.shape().heads + p.shape().keyValueHeads) * p.shape().headWidth; }

  // Absolute positions of all rows; -1 or 0 in padding.
  std::vector<int32_t> positions(Trial& t) const {
    std::vector<int32_t> result(static_cast<size_t>(p.rows), t.chance(0.5) ? -1 : 0);
    for (int64_t b = 0; b < p.batch.count(); ++b) {
      for (int32_t i = 0; i < p.batch.length[b]; ++i) result[p.batch.rowBegin[b] + i] = p.batch.offset[b] + i;
    }
    return result;
  }

  void prepare(const kernels::Kernels& kernels, Queue& queue, const Matrix& input, const kernels::Sequences& sequences,
               const Matrix& q, const Matrix& saved) const {
    kernels.qkvPrepare(queue, p.layout, input.view(), sequences, norm(), rope(), q.operand(), p.kv,
                       saves ? saved.operand() : Operand{});
  }
};

void checkPrepare(Trial& t) {
  QkvProblem x = QkvProblem::draw(t, t.chance(0.5));
  const Matrix q = t.matrix(x.p.dtype, x.p.rows, x.p.queryColumns()), expected = q.clone();
  const Matrix saved = t.matrix(x.p.dtype, x.p.rows, x.savedColumns()), expectedSaved = saved.clone();
  x.prepare(t.reference(), t.referenceQueue(), x.qkv, x.p.batch.sequences(), expected, expectedSaved);
  const Buffer expectedPages = x.p.pageMemory.clone();
  t.eachQueue([&](Queue& queue) {
    x.p.clearPages();
    const Matrix actual = q.clone(), actualSaved = saved.clone();
    x.prepare(t.implementation(), queue, x.qkv, x.p.batch.sequences(), actual, actualSaved);
    t.compare("q", expected, actual);
    t.compare("savedQk", expectedSaved, actualSaved);
    t.compare("pages", expectedPages, x.p.pageMemory, x.p.dtype);
  });
  x.p.clearPages();
  const SubBatch sub = x.p.drawSubBatch(t, false);
  const Matrix input = gather(x.qkv, sub.sourceRow), whole = gather(expected, sub.sourceRow),
               actual = gather(q, sub.sourceRow);
  const Matrix actualSaved = gather(saved, sub.sourceRow);
  t.eachQueue([&](Queue& queue) {
    x.prepare(t.implementation(), queue, input, sub.sequences(), actual, actualSaved);
    t.compareRows("q of chunks", whole, 0, actual);
    t.compare("pages of chunks", expectedPages, x.p.pageMemory, x.p.dtype);
  });
}

struct GainGradients {
  Buffer query, key;
  GainGradients clone() const { return {query.clone(), key.clone()}; }
};

void backward(const kernels::Kernels& kernels, Queue& queue, const QkvProblem& x, const Matrix& dqkv,
              const Matrix& saved, const std::vector<int32_t>& positions, const Matrix& out,
              const GainGradients& gains) {
  kernels.qkvPrepareBackward(
      queue, x.p.layout, dqkv.view(), positions.data(), x.norm(), x.rope(), x.hasNorm ? saved.operand() : Operand{},
      out.operand(), x.hasNorm ? gains.query.as<float>() : nullptr, x.hasNorm ? gains.key.as<float>() : nullptr);
}

void checkPrepareBackward(Trial& t) {
  const QkvProblem x = QkvProblem::draw(t, true);
  const int64_t width = x.p.shape().headWidth;
  const bool aligned = t.chance(0.5);
  t.note("aligned", aligned);
  const auto matrix = [&](DType dtype, int64_t cols, float scale) {
    return aligned ? t.alignedMatrix(dtype, x.p.rows, cols, scale) : t.matrix(dtype, x.p.rows, cols, scale);
  };
  const Matrix saved = matrix(x.p.dtype, x.savedColumns(), 2);
  const Matrix dqkv = matrix(DType::kFloat32, x.p.layout.columns(), 1);
  const Matrix out = t.matrix(x.p.dtype, x.p.rows, x.p.layout.columns()), expected = out.clone();
  const GainGradients gains{t.floats(width), t.floats(width)}, expectedGains = gains.clone();
  std::vector<int32_t> positions = x.positions(t);
  if (t.chance(0.1)) positions.assign(positions.size(), -1);  // nothing but padding
  backward(t.reference(), t.referenceQueue(), x, dqkv, saved, positions, expected, expectedGains);
  t.eachQueue([&](Queue& queue) {
    const Matrix actual = out.clone();
    const GainGradients actualGains = gains.clone();
    backward(t.implementation(), queue, x, dqkv, saved, positions, actual, actualGains);
    t.compare("dqkvOut", expected, actual);
    t.compare("dQueryGain", expectedGains.query, actualGains.query);
    t.compare("dKeyGain", expectedGains.key, actualGains.key);
  });
}

// The sum over q, k and v of `weights` (laid out as qkv) times what forward makes of qkv and the gains: the function
// whose derivative backward returns.
double objective(Trial& t, QkvProblem& x, const Matrix& weights) {
  const Matrix q = t.matrix(x.p.dtype, x.p.rows, x.p.queryColumns()),
               saved = t.matrix(x.p.dtype, x.p.rows, x.savedColumns());
  x.prepare(t.implementation(), t.implementationQueue(), x.qkv, x.p.batch.sequences(), q, saved);
  t.implementationQueue().synchronize();
  const kernels::QkvLayout& layout = x.p.layout;
  const int64_t width = x.p.shape().headWidth;
  double sum = 0;
  for (int64_t b = 0; b < x.p.batch.count(); ++b) {
    for (int64_t i = 0; i < x.p.batch.length[b] * width; ++i) {
      const int64_t position = i / width, k = i % width, row = x.p.batch.rowBegin[b] + position;
      for (int64_t h = 0; h < x.p.shape().heads; ++h) {
        sum += double{at(weights, row, layout.queryColumn(h) + k)} * double{at(q, row, h * width + k)};
      }
      for (int64_t g = 0; g < x.p.shape().keyValueHeads; ++g) {
        sum += double{at(weights, row, layout.keyColumn(g) + k)} * double{x.p.element(x.p.keyIndex(b, g, position, k))};
        sum += double{at(weights, row, layout.valueColumn(g) + k)} *
               double{x.p.element(x.p.valueIndex(b, g, position, k))};
      }
    }
  }
  return sum;
}

// Central differences along one random direction through all inputs and both gains at once.
void checkDerivative(Trial& t) {
  QkvProblem x = QkvProblem::draw(t, true);
  const int64_t width = x.p.shape().headWidth, columns = x.p.layout.columns();
  const Matrix weights = t.matrix(DType::kFloat32, x.p.rows, columns),
               direction = t.matrix(DType::kFloat32, x.p.rows, columns);
  const Matrix q = t.matrix(x.p.dtype, x.p.rows, x.p.queryColumns()),
               saved = t.matrix(x.p.dtype, x.p.rows, x.savedColumns());
  const Matrix gradient = t.matrix(x.p.dtype, x.p.rows, columns);
  const GainGradients gains{t.floats(width, 0), t.floats(width, 0)}, step{t.floats(width), t.floats(width)};
  std::memset(gains.query.as<char>(), 0, gains.query.bytes());
  std::memset(gains.key.as<char>(), 0, gains.key.bytes());
  x.prepare(t.implementation(), t.implementationQueue(), x.qkv, x.p.batch.sequences(), q, saved);
  t.implementationQueue().synchronize();
  backward(t.implementation(), t.implementationQueue(), x, weights, saved, x.positions(t), gradient, gains);
  t.implementationQueue().synchronize();

  double expected = 0, size = 0;
  const auto add = [&](float d, float g) {
    expected += double{d} * double{g};
    size += double{d} * double{d} * double{g} * double{g};
  };
  for (int64_t i = 0; i < width && x.hasNorm; ++i) {
    add(step.query.as<float>()[i], gains.query.as<float>()[i]);
    add(step.key.as<float>()[i], gains.key.as<float>()[i]);
  }
  for (int64_t b = 0; b < x.p.batch.count(); ++b) {
    for (int64_t row = x.p.batch.rowBegin[b]; row < x.p.batch.rowBegin[b] + x.p.batch.length[b]; ++row) {
      for (int64_t c = 0; c < columns; ++c) add(at(direction, row, c), at(gradient, row, c));
    }
  }
  const float h = 1.0f / 1024;
  const auto move = [&](float by) {
    for (int64_t row = 0; row < x.p.rows; ++row) {
      for (int64_t c = 0; c < columns; ++c) put(x.qkv, row, c, at(x.qkv, row, c) + by * at(direction, row, c));
    }
    for (int64_t i = 0; i < width; ++i) {
      x.queryGain.as<float>()[i] += by * step.query.as<float>()[i];
      x.keyGain.as<float>()[i] += by * step.key.as<float>()[i];
    }
  };
  move(h);
  const double up = objective(t, x, weights);
  move(-2 * h);
  const double differences = (up - objective(t, x, weights)) / (2.0 * double{h});
  // `size` is the square of what the terms add up to when their signs are random.
  if (std::abs(expected - differences) <= 0.01 * std::sqrt(size) + 1e-3) return;
  t.fail("derivative: backward " + std::to_string(expected) + ", differences " + std::to_string(differences) +
         ", size " + std::to_string(std::sqrt(size)));
}

const Registration kPrepare("qkvPrepare", 60, checkPrepare);
const Registration kPrepareBackward("qkvPrepareBackward", 60, checkPrepareBackward);
const Registration kDerivative("qkvPrepareDerivative", DType::kFloat32, 20, checkDerivative);

}  // namespace

}  // namespace lockstep::contracts
