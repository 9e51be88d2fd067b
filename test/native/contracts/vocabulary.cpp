// Contracts of log-probabilities and entropies: blocks of any size, uneven and empty parts, rows without a target,
// parts on several ranks.
#include <limits>

#include "rows.h"

namespace lockstep::contracts {
namespace {

using kernels::LogSoftmax;
using kernels::SoftmaxStatistics;
using kernels::Staging;

struct Statistics {
  Buffer logprobs, entropies, logZ;
  explicit Statistics(int64_t rows)
      : logprobs(static_cast<size_t>(rows) * 4),
        entropies(static_cast<size_t>(rows) * 4),
        logZ(static_cast<size_t>(rows) * 4) {}
  LogSoftmax from(int64_t row) const {
    return {logprobs.as<float>() + row, entropies.as<float>() + row, logZ.as<float>() + row};
  }
};

struct Problem {
  int64_t rows, width, vocabulary;
  float inverseTemperature;
  WeightMatrix w;
  Matrix hidden;
  std::vector<int32_t> targets;
  Buffer dLogprobs, dEntropies;
  bool hasLogprobs, hasEntropies;

  static Problem draw(Trial& t, bool even) {
    const int64_t drawn = t.rows(66), rows = drawn + (even ? drawn % 2 : 0), width = t.integer(1, 40);
    const int64_t vocabulary = t.chance(0.3) ? t.integer(1, 20) : t.integer(20, 700);
    const auto split = t.chance(0.7) ? kernels::Split::kOut : kernels::Split::kNone;
    return Problem(t, rows, drawLayout(t, vocabulary, width, split));
  }

  Problem(Trial& t, int64_t rowCount, const kernels::WeightLayout& layout)
      : rows(rowCount), width(layout.in), vocabulary(layout.out) {
    t.note("rows", rows);
    t.note("width", width);
    t.note("vocabulary", vocabulary);
    inverseTemperature = t.chance(0.5) ? 1.0f : 1.0f / 0.7f;
    w = t.weight(t.dtype(), layout);
    hidden = t.matrix(t.dtype(), rows, width, static_cast<float>(t.pick({1, 3, 40})));
    for (int64_t i = 0; i < rows; ++i) {
      targets.push_back(t.chance(0.2) ? -1 : static_cast<int32_t>(t.integer(0, vocabulary - 1)));
    }
    dLogprobs = t.floats(rows);
    dEntropies = t.floats(rows, 0.1f);
    for (int64_t i = 0; i < rows; ++i) {
      if (t.chance(0.2)) dLogprobs.as<float>()[i] = dEntropies.as<float>()[i] = 0;
    }
    hasLogprobs = t.chance(0.8);
    hasEntropies = t.chance(0.7);
  }
  // Memory for a random number of rows, never less than two.
  Buffer staging(Trial& t, bool backward) const {
    const int64_t blockRows = t.pick({2, 3, 4, 16, rows + 2});
    return Buffer(static_cast<size_t>(
        kernels::vocabularyStagingBytes(blockRows < 2 ? 2 : blockRows, vocabulary, t.dtype(), backward)));
  }
  void logprobs(const kernels::Kernels& kernels, Queue& queue, const Statistics& out, const Buffer& memory,
                int64_t first, int64_t count) const {
    std::vector<SoftmaxStatistics> statistics(static_cast<size_t>(count));
    kernels.softmaxStatistics(queue, hidden.operand().slice(first, count), w.weight(), targets.data() + first,
                              inverseTemperature, statistics.data(),
                              {memory.as<char>(), static_cast<int64_t>(memory.bytes())});
    kernels.mergeStatistics(queue, statistics.data(), 1, count, targets.data() + first, out.from(first));
  }
  void backward(const kernels::Kernels& kernels, Queue& queue, const Statistics& forward, const Matrix& dHidden,
                const WeightMatrix& dW, const Buffer& memory) const {
    kernels.logprobsBackward(queue, hidden.operand(), w.weight(), targets.data(), inverseTemperature, forward.from(0),
                             hasLogprobs ? dLogprobs.as<float>() : nullptr,
                             hasEntropies ? dEntropies.as<float>() : nullptr, dHidden.view(), dW.gradient(),
                             {memory.as<char>(), static_cast<int64_t>(memory.bytes())});
  }
  double weightAt(int64_t row, int64_t col) const {
    for (const kernels::Part& part : w.layout->parts) {
      if (row < part.outBegin || row >= part.outBegin + part.out) continue;
      const int64_t n = row - part.outBegin, panel = n / 64, width = part.panelWidth(panel),
                    at = part.panelOffset(panel);
      if (w.dtype == DType::kFloat32) return w.buffer.as<float>()[at + col * width + n % 64];
      return toFloat(w.buffer.as<BFloat16>()[at + col / 2 * 2 * width + 2 * (n % 64) + col % 2]);
    }
    return 0;
  }
};

// One row in float64.
struct Exact {
  std::vector<double> logp;
  double entropy = 0, logZ = 0;

  Exact(const Problem& p, int64_t row) {
    double m = -std::numeric_limits<double>::infinity(), s = 0;
    for (int64_t v = 0; v < p.vocabulary; ++v) {
      double x = 0;
      for (int64_t i = 0; i < p.width; ++i) x += valueAt(p.hidden, row, i) * p.weightAt(v, i);
      logp.push_back(x * p.inverseTemperature);
      m = std::max(m, logp.back());
    }
    for (const double x : logp) s += std::exp(x - m);
    logZ = m + std::log(s);
    for (double& x : logp) {
      x -= logZ;
      entropy -= std::exp(x) * x;
    }
  }
};

void checkStatistics(Trial& t, const Problem& p) {
  const Statistics expected(p.rows);
  p.logprobs(t.reference(), t.referenceQueue(), expected, p.staging(t, false), 0, p.rows);
  t.eachQueue([&](Queue& queue) {
    const Statistics actual(p.rows);
    const int64_t first = t.integer(0, p.rows);
    p.logprobs(t.implementation(), queue, actual, p.staging(t, false), 0, first);
    p.logprobs(t.implementation(), queue, actual, p.staging(t, false), first, p.rows - first);
    t.compare("logprobs", expected.logprobs, actual.logprobs);
    t.compare("entropies", expected.entropies, actual.entropies);
    t.compare("logZ", expected.logZ, actual.logZ);
  });
  const int64_t row = t.integer(0, p.rows - 1);
  const Exact exact(p, row);
  expectNear(t, "logZ", exact.logZ, expected.logZ.as<float>()[row], 1e-5);
  expectNear(t, "entropy", exact.entropy, expected.entropies.as<float>()[row], 1e-4);
  const double logprob = p.targets[row] < 0 ? 0 : exact.logp[p.targets[row]];
  expectNear(t, "logprob", logprob, expected.logprobs.as<float>()[row], 1e-4);
}

// Parts longer than what a block of threads takes of a row at a time.
Problem longRows(Trial& t) {
  const int64_t rows = t.pick({2, 4}), width = t.integer(1, 40), part = t.pick({1025, 2048, 2500});
  const std::vector<int64_t> sizes(static_cast<size_t>(t.pick({1, 2})), part);
  const auto count = static_cast<int64_t>(sizes.size());
  return Problem(t, rows, kernels::WeightLayout::make(count * part, width, kernels::Split::kOut, sizes));
}

const Registration kLogprobs("softmaxStatistics", 40, [](Trial& t) { checkStatistics(t, Problem::draw(t, false)); });
const Registration kLongRows("softmaxStatistics.longRows", 8, [](Trial& t) { checkStatistics(t, longRows(t)); });

// Each of `groups` ranks has its run of the parts, with memory of its own for it: together they give the bits of one.
const Registration kGroups("mergeStatistics", 40, [](Trial& t) {
  const Problem p = Problem::draw(t, false);
  const Statistics expected(p.rows);
  p.logprobs(t.reference(), t.referenceQueue(), expected, p.staging(t, false), 0, p.rows);
  const int64_t parts = static_cast<int64_t>(p.w.layout->parts.size());
  int64_t groups = 1;
  while (groups < parts && t.chance(0.7)) groups *= 2;
  t.note("groups", groups);
  t.eachQueue([&](Queue& queue) {
    std::vector<SoftmaxStatistics> all(static_cast<size_t>(groups * p.rows));
    for (int64_t g = 0; g < groups; ++g) {
      const auto first = p.w.layout->parts.begin() + g * (parts / groups);
      std::vector<int64_t> sizes;
      int64_t rows = 0;
      for (auto part = first; part != first + parts / groups; ++part) {
        sizes.push_back(part->out);
        rows += part->out;
      }
      const auto split = parts == 1 ? p.w.layout->split : kernels::Split::kOut;
      const auto own = kernels::WeightLayout::make(rows, p.width, split, sizes);
      const char* data = p.w.buffer.as<char>() + first->offset * static_cast<int64_t>(bytesOf(p.w.dtype));
      std::vector<int32_t> targets;
      for (const int32_t target : p.targets) {
        const int64_t local = target - first->outBegin;
        targets.push_back(target < 0 || local < 0 || local >= rows ? -1 : static_cast<int32_t>(local));
      }
      const Buffer memory = p.staging(t, false);
      t.implementation().softmaxStatistics(queue, p.hidden.operand(), {&own, data, p.w.dtype}, targets.data(),
                                           p.inverseTemperature, all.data() + g * p.rows,
                                           {memory.as<char>(), static_cast<int64_t>(memory.bytes())});
    }
    const Statistics actual(p.rows);
    t.implementation().mergeStatistics(queue, all.data(), groups, p.rows, p.targets.data(), actual.from(0));
    t.compare("logprobs", expected.logprobs, actual.logprobs);
    t.compare("entropies", expected.entropies, actual.entropies);
    t.compare("logZ", expected.logZ, actual.logZ);
  });
});

// dHidden of one element from the gradients of the logits in float64.
double exactHidden(const Problem& p, int64_t row, int64_t col) {
  const Exact exact(p, row);
  const double dLogprob = p.hasLogprobs ? p.dLogprobs.as<float>()[row] : 0;
  const double dEntropy = p.hasEntropies ? p.dEntropies.as<float>()[row] : 0;
  double sum = 0;
  for (int64_t v = 0; v < p.vocabulary; ++v) {
    const double prob = std::exp(exact.logp[v]);
    const double d = dLogprob * ((v == p.targets[row]) - prob) - dEntropy * prob * (exact.logp[v] + exact.entropy);
    sum += d * p.inverseTemperature * p.weightAt(v, col);
  }
  return sum;
}

void checkBackward(Trial& t, const Problem& p) {
  const Statistics forward(p.rows);
  p.logprobs(t.reference(), t.referenceQueue(), forward, p.staging(t, false), 0, p.rows);
  Matrix expected = t.matrix(DType::kFloat32, p.rows, p.width);
  const Matrix blank = expected.clone();
  const WeightMatrix start = t.weight(DType::kFloat32, *p.w.layout), expectedW = start.clone();
  p.backward(t.reference(), t.referenceQueue(), forward, expected, expectedW, p.staging(t, true));
  t.eachQueue([&](Queue& queue) {
    Matrix dHidden = blank.clone();
    const WeightMatrix dW = start.clone();
    const Buffer memory = p.staging(t, true);  // until all is computed
    p.backward(t.implementation(), queue, forward, dHidden, dW, memory);
    t.compare("dHidden", expected, dHidden);
    t.compare("dW", expectedW, dW);
  });
  const int64_t row = t.integer(0, p.rows - 1), col = t.integer(0, p.width - 1);
  expectNear(t, "dHidden", exactHidden(p, row, col), valueAt(expected, row, col),
             t.dtype() == DType::kFloat32 ? 1e-3 : 3e-2);
}

const Registration kLogprobsBackward("logprobsBackward", 40,
                                     [](Trial& t) { checkBackward(t, Problem::draw(t, true)); });
const Registration kLongRowsBackward("logprobsBackward.longRows", 4, [](Trial& t) { checkBackward(t, longRows(t)); });

}  // namespace
}  // namespace lockstep::contracts
