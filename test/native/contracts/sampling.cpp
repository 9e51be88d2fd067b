// Contracts of sampling: the reference's token and bits, the log-probability that training computes, and the
// distribution that was asked for.
#include <algorithm>
#include <numeric>

#include "rows.h"

namespace lockstep::contracts {
namespace {

using kernels::Sampling;
using kernels::WeightLayout;

Sampling drawSettings(Trial& t, int64_t vocabulary) {
  Sampling s{};
  s.temperature = t.chance(0.2) ? 0.0f : t.chance(0.5) ? 1.0f : 0.3f + std::fabs(t.number());
  s.topP = t.chance(0.5) ? 1.0f : t.chance(0.2) ? static_cast<float>(t.pick({0, -1, 2})) : std::fabs(t.number());
  s.topK = t.chance(0.5) ? 0 : static_cast<int32_t>(t.integer(1, vocabulary + 2));
  s.seed = t.random()();
  s.request = t.random()();
  s.position = static_cast<uint32_t>(t.random()());
  return s;
}

// Ties, dominant tokens, -inf and, rarely, NaN.
void disturb(Trial& t, const Matrix& logits) {
  for (int64_t n = 0; n < logits.rows; ++n) {
    float* row = logits.view().row(n);
    if (t.chance(0.4)) {
      for (int64_t v = 0; v < logits.cols; ++v) row[v] = std::round(row[v]);
    }
    if (t.chance(0.2)) row[t.integer(0, logits.cols - 1)] += 60;
    if (t.chance(0.2)) {
      for (int64_t v = 0; v < logits.cols; ++v) {
        if (t.chance(0.5)) row[v] = -INFINITY;
      }
      row[t.integer(0, logits.cols - 1)] = 1;
    }
    if (t.chance(0.05)) row[t.integer(0, logits.cols - 1)] = NAN;
  }
}

void checkSamples(Trial& t, const Matrix& logits, const WeightLayout& layout, const std::vector<Sampling>& settings) {
  const int64_t rows = logits.rows;
  t.note("rows", rows);
  t.note("vocabulary", logits.cols);
  std::vector<int32_t> expected(rows), actual(rows);
  Buffer expectedLogprobs = t.floats(rows);
  t.reference().sample(t.referenceQueue(), logits.view(), layout, settings.data(), expected.data(),
                       expectedLogprobs.as<float>());
  t.eachQueue([&](Queue& queue) {
    Buffer logprobs = t.floats(rows);
    t.implementation().sample(queue, logits.view(), layout, settings.data(), actual.data(), logprobs.as<float>());
    for (int64_t n = 0; n < rows; ++n) {
      if (actual[n] == expected[n]) continue;
      t.fail("row " + std::to_string(n) + " (temperature " + std::to_string(settings[n].temperature) + ", topP " +
             std::to_string(settings[n].topP) + ", topK " + std::to_string(settings[n].topK) + "): expected token " +
             std::to_string(expected[n]) + ", got " + std::to_string(actual[n]));
    }
    t.compare("logprobs", expectedLogprobs, logprobs);
    const int64_t n = t.integer(0, rows - 1);
    int32_t alone = -1;
    float logprob = 0;
    t.implementation().sample(queue, logits.view().slice(n, 1), layout, &settings[n], &alone, &logprob);
    if (alone != actual[n]) t.fail("row " + std::to_string(n) + " alone gives another token");
  });
}

const Registration kSample("sample", DType::kFloat32, 150, [](Trial& t) {
  const int64_t rows = t.integer(1, 40), vocabulary = t.chance(0.3) ? t.integer(1, 40) : t.integer(40, 1500);
  const WeightLayout layout =
      drawLayout(t, vocabulary, 2, t.chance(0.8) ? kernels::Split::kOut : kernels::Split::kNone);
  const Matrix logits = t.matrix(DType::kFloat32, rows, vocabulary, static_cast<float>(t.pick({1, 5, 30})));
  disturb(t, logits);
  std::vector<Sampling> settings;
  for (int64_t n = 0; n < rows; ++n) settings.push_back(drawSettings(t, vocabulary));
  checkSamples(t, logits, layout, settings);
});

// u is 1 - 1.1e-10, nearer to 1 than the float32 sum of a block is to what its weights add up to: in about every other
// row none of the last block passes u times the total, and the last one with a weight is it. Behind it are columns
// without a weight, of its block and of a part that weighs nothing.
const Registration kNearOne("sample.nearOne", DType::kFloat32, 4, [](Trial& t) {
  const int64_t rows = 20, first = t.integer(200, 600), second = t.integer(1, 300);
  const WeightLayout layout = WeightLayout::make(first + second, 2, kernels::Split::kOut, {first, second});
  const Matrix logits = t.matrix(DType::kFloat32, rows, first + second);
  for (int64_t n = 0; n < rows; ++n) {
    float* row = logits.view().row(n);
    for (int64_t v = first - t.integer(1, 9); v < first; ++v) row[v] = -INFINITY;
    for (int64_t v = first; v < first + second; ++v) row[v] -= 200;
  }
  checkSamples(t, logits, layout, std::vector<Sampling>(rows, {1, 1, 0, 7, 0, 366'553'561}));
});

const Registration kSameLogprob("sample.logprobs", 40, [](Trial& t) {
  const int64_t rows = t.integer(1, 30), width = t.integer(1, 30), vocabulary = t.integer(2, 700);
  t.note("rows", rows);
  t.note("vocabulary", vocabulary);
  const WeightMatrix w = t.weight(t.dtype(), drawLayout(t, vocabulary, width, kernels::Split::kOut));
  const Matrix hidden = t.matrix(t.dtype(), rows, width, 3), logits = t.matrix(DType::kFloat32, rows, vocabulary);
  Sampling s = drawSettings(t, vocabulary);
  const std::vector<Sampling> settings(rows, s);
  t.eachQueue([&](Queue& queue) {
    std::vector<int32_t> tokens(rows);
    Buffer sampled = t.floats(rows), trained = t.floats(rows), entropies = t.floats(rows), logZ = t.floats(rows);
    t.implementation().linear(queue, hidden.operand(), w.weight(), nullptr, kernels::Output::store(logits.view()));
    t.implementation().sample(queue, logits.view(), *w.layout, settings.data(), tokens.data(), sampled.as<float>());
    const Buffer staging(static_cast<size_t>(kernels::vocabularyStagingBytes(8, vocabulary, t.dtype(), false)));
    std::vector<kernels::SoftmaxStatistics> statistics(rows);
    t.implementation().softmaxStatistics(queue, hidden.operand(), w.weight(), tokens.data(),
                                         s.temperature == 0 ? 1.0f : 1.0f / s.temperature, statistics.data(),
                                         {staging.as<char>(), static_cast<int64_t>(staging.bytes())});
    t.implementation().mergeStatistics(queue, statistics.data(), 1, rows, tokens.data(),
                                       {trained.as<float>(), entropies.as<float>(), logZ.as<float>()});
    t.compare("log-probability of the sampled token", trained, sampled);
  });
});

// What a token's probability should be, in float64: temperature, then top-k, then top-p.
std::vector<double> wanted(const float* logits, int64_t vocabulary, const Sampling& s) {
  std::vector<int64_t> ids(vocabulary);
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  std::vector<double> p(vocabulary, 0);
  const int64_t kept = s.topK > 0 ? std::min<int64_t>(s.topK, vocabulary) : vocabulary;
  double total = 0, sum = 0, keptTotal = 0;
  for (int64_t rank = 0; rank < kept; ++rank) total += std::exp(logits[ids[rank]] / s.temperature);
  for (int64_t rank = 0; rank < kept && (rank == 0 || s.topP >= 1 || sum < s.topP * total); ++rank) {
    p[ids[rank]] = std::exp(logits[ids[rank]] / s.temperature);
    sum += p[ids[rank]];
  }
  for (const double x : p) keptTotal += x;
  for (double& x : p) x /= keptTotal;
  return p;
}

// Chi-square of 20,000 draws (of emulated threads 500) against the wanted distribution, at six standard deviations.
const Registration kDistribution("sample.distribution", DType::kFloat32, 8, [](Trial& t) {
  const int64_t vocabulary = t.integer(2, 40), draws = t.onGpu() ? 500 : 20000;
  const WeightLayout layout = drawLayout(t, vocabulary, 2, kernels::Split::kOut);
  const Buffer logits = t.floats(vocabulary, 2);
  Sampling s = drawSettings(t, vocabulary);
  s.temperature = 0.7f;
  std::vector<Sampling> settings(draws, s);
  for (int64_t i = 0; i < draws; ++i) settings[i].position = static_cast<uint32_t>(i);
  std::vector<int32_t> tokens(draws);
  Buffer logprobs(draws * 4);
  const View<const float> repeated{logits.as<float>(), draws, vocabulary, 0};
  t.implementation().sample(t.implementationQueue(), repeated, layout, settings.data(), tokens.data(),
                            logprobs.as<float>());
  const std::vector<double> p = wanted(logits.as<float>(), vocabulary, s);
  std::vector<double> seen(vocabulary, 0);
  for (const int32_t token : tokens) ++seen[token];
  double chi = 0, freedom = -1;
  for (int64_t v = 0; v < vocabulary; ++v) {
    if (p[v] == 0 && seen[v] > 0) t.fail("token " + std::to_string(v) + " was dropped and yet sampled");
    if (p[v] == 0) continue;
    chi += (seen[v] - draws * p[v]) * (seen[v] - draws * p[v]) / (draws * p[v]);
    ++freedom;
  }
  if (chi > freedom + 6 * std::sqrt(2 * freedom) + 6) {
    t.fail("chi-square " + std::to_string(chi) + " with " + std::to_string(freedom) + " degrees of freedom");
  }
});

}  // namespace
}  // namespace lockstep::contracts
