// Contracts of AdamW, of the sum of squares and of joining accumulators.
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "rows.h"

namespace lockstep::contracts {
namespace {

struct State {
  Buffer parameter, m, v, gradient, weights;
  State clone() const { return {parameter.clone(), m.clone(), v.clone(), gradient.clone(), weights.clone()}; }
};

kernels::AdamW drawSettings(Trial& t) {
  const int64_t n = t.integer(1, 50);
  const double beta1 = t.chance(0.5) ? 0.9 : 0.8, beta2 = t.chance(0.5) ? 0.95 : 0.999;
  return {t.chance(0.1) ? 0 : 1e-3,
          beta1,
          beta2,
          1e-8,
          t.chance(0.5) ? 0 : 0.1,
          1 - std::pow(beta1, n),
          1 - std::pow(beta2, n),
          t.chance(0.5) ? 1 : 0.37};
}

// One element in float64.
void expectFormula(Trial& t, const kernels::AdamW& a, const State& before, const State& after, int64_t i) {
  const double g = before.gradient.as<float>()[i] * a.gradientScale;
  const double m = a.beta1 * before.m.as<float>()[i] + (1 - a.beta1) * g;
  const double v = a.beta2 * before.v.as<float>()[i] + (1 - a.beta2) * g * g;
  const double p = before.parameter.as<float>()[i];
  const double update = m / a.correction1 / (std::sqrt(v / a.correction2) + a.epsilon);
  expectNear(t, "m", m, after.m.as<float>()[i], 1e-6);
  expectNear(t, "v", v, after.v.as<float>()[i], 1e-6);
  // A variance that float32 flushes to zero makes the step as large as 1 / epsilon.
  if (v > 1e-30) {
    expectNear(t, "parameter", p - a.learningRate * (a.weightDecay * p + update), after.parameter.as<float>()[i], 1e-5);
  }
}

const Registration kAdamW("adamw", 60, [](Trial& t) {
  const kernels::AdamW settings = drawSettings(t);
  const bool published = t.dtype() == DType::kBFloat16;
  const int64_t out = t.integer(1, 300), in = t.integer(1, 150);
  t.note("out", out);
  t.note("in", in);
  const auto layout = drawLayout(t, out, in, static_cast<kernels::Split>(t.integer(0, 2)));
  const int64_t count = published ? layout.elements : t.pick({1, 15, 16, 17, 16383, 16384, 16385, 50000});
  t.note("count", count);
  const auto elements = [&] { return published ? t.weight(DType::kFloat32, layout).buffer : t.floats(count); };
  State start{elements(), elements(), elements(), elements(), Buffer(static_cast<size_t>(published ? count * 2 : 0))};
  for (int64_t i = 0; i < count; ++i) start.v.as<float>()[i] = std::fabs(start.v.as<float>()[i]);
  const auto run = [&](const kernels::Kernels& kernels, Queue& queue, const State& s) {
    kernels.adamw(queue, settings, count, s.parameter.as<float>(), s.m.as<float>(), s.v.as<float>(),
                  s.gradient.as<float>(), published ? &layout : nullptr, published ? s.weights.as<char>() : nullptr);
  };
  const State expected = start.clone();
  run(t.reference(), t.referenceQueue(), expected);
  t.eachQueue([&](Queue& queue) {
    const State actual = start.clone();
    run(t.implementation(), queue, actual);
    t.compare("parameter", expected.parameter, actual.parameter);
    t.compare("m", expected.m, actual.m);
    t.compare("v", expected.v, actual.v);
    t.compare("gradient", Buffer(start.gradient.bytes()), actual.gradient);
    t.compare("weights", expected.weights, actual.weights, DType::kBFloat16);
  });
  expectFormula(t, settings, start, expected, t.integer(0, count - 1));
});

const Registration kSumsOfSquares("sumsOfSquares", DType::kFloat32, 24, [](Trial& t) {
  const int64_t task = 64 * 4096;
  const auto drawCount = [&] {
    return t.chance(0.7) ? t.pick({0, 1, 15, 17, 4095, 4096, 4097, 3 * 4096, 5 * 4096 + 3, 40000})
                         : t.pick({task - 1, task, task + 1, 2 * task + 4097, 3 * task});
  };
  std::vector<int64_t> counts;
  for (int64_t n = t.chance(0.1) ? 0 : t.integer(1, 3); n > 0; --n) counts.push_back(drawCount());
  const int64_t count = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  t.note("runs", static_cast<int64_t>(counts.size()));
  t.note("count", count);
  const Buffer gradient = t.floats(count);
  // Leaves of very different size: sums of like ones are exact in float64 whatever their order.
  for (int64_t leaf = 0; leaf < count; leaf += 4096) {
    const int exponent = static_cast<int>(t.integer(-20, 20));
    for (int64_t i = leaf; i < std::min(leaf + 4096, count); ++i) {
      gradient.as<float>()[i] = std::ldexp(gradient.as<float>()[i], exponent);
    }
  }
  std::vector<kernels::Run> runs;
  for (int64_t i = 0, at = 0; i < static_cast<int64_t>(counts.size()); at += counts[static_cast<size_t>(i++)]) {
    runs.push_back({gradient.as<float>() + at, counts[static_cast<size_t>(i)]});
  }
  const auto sums = [&](const kernels::Kernels& k, Queue& queue) {
    std::vector<double> out(runs.size(), std::nan(""));
    k.sumsOfSquares(queue, runs.data(), static_cast<int64_t>(runs.size()), out.data());
    return out;
  };
  const std::vector<double> expected = sums(t.reference(), t.referenceQueue());
  t.eachQueue([&](Queue& queue) {
    const std::vector<double> actual = sums(t.implementation(), queue);
    for (size_t i = 0; i < runs.size(); ++i) {
      if (std::bit_cast<uint64_t>(actual[i]) != std::bit_cast<uint64_t>(expected[i]))
        t.fail("run " + std::to_string(i) + ": expected " + std::to_string(expected[i]) + ", got " +
               std::to_string(actual[i]));
    }
  });
  for (size_t r = 0; r < runs.size(); ++r) {
    double plain = 0;
    for (int64_t i = 0; i < runs[r].count; ++i) plain += static_cast<double>(runs[r].data[i]) * runs[r].data[i];
    expectNear(t, "sum", plain, expected[r], 1e-5);
  }
});

const Registration kAccumulate("accumulate", DType::kFloat32, 24, [](Trial& t) {
  const int64_t count = t.pick({1, 15, 16, 17, 16384, 50001});
  t.note("count", count);
  const Buffer src = t.floats(count), dst = t.floats(count);
  t.eachQueue([&](Queue& queue) {
    const Buffer from = src.clone(), to = dst.clone();
    t.implementation().accumulate(queue, count, from.as<float>(), to.as<float>());
    const Buffer sum = dst.clone();
    for (int64_t i = 0; i < count; ++i) sum.as<float>()[i] += src.as<float>()[i];
    t.compare("dst", sum, to);
    t.compare("src", Buffer(src.bytes()), from);
  });
});

}  // namespace
}  // namespace lockstep::contracts
