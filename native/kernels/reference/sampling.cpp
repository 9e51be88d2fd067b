// One token per row of logits: greedy, or by inverse transform with top-k and top-p (Holtzman et al., 2020).
#include <algorithm>
#include <vector>

#include "kernels/philox.h"
#include "kernels/reference/reference.h"
#include "kernels/reference/softmax.h"

namespace lockstep::kernels::reference {
namespace {

constexpr int64_t kBlock = 256;

// A row's weights e_v a_p in the making; dropped tokens have e_v = 0.
struct Weights {
  std::vector<float> e;      // [V]
  std::vector<float> scale;  // [V]: a_p of the part of v
};

// The running sum over blocks; stops before the block that passes `target` and returns the token found in it. With a
// target that is never passed: the last token of the last block that has any weight; -1 when none has.
int64_t walk(const Weights& w, const WeightLayout& layout, double target, double* total) {
  double sum = 0;
  int64_t last = -1;
  for (const Part& part : layout.parts) {
    for (int64_t begin = part.outBegin; begin < part.outBegin + part.out; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, part.outBegin + part.out);
      const float block = lanesSum(end - begin, [&](float acc, int64_t i) { return acc + w.e[begin + i]; });
      const double after = sum + static_cast<double>(block) * w.scale[begin];
      for (int64_t v = begin; v < end; ++v) {
        if (w.e[v] > 0) last = v;
      }
      if (after > target) {
        for (int64_t v = begin; v < end; ++v) {
          sum += static_cast<double>(w.e[v]) * w.scale[v];
          if (sum > target) return v;
        }
        return last;
      }
      sum = after;
    }
  }
  *total = sum;
  return last;
}

// Ids in decreasing order of x, ties by id.
std::vector<int64_t> ranking(const float* logits, float inverseTemperature, int64_t count) {
  std::vector<int64_t> ids(count);
  for (int64_t v = 0; v < count; ++v) ids[v] = v;
  const auto x = [&](int64_t v) {
    const float value = logits[v] * inverseTemperature;
    return value == value ? value : -std::numeric_limits<float>::infinity();
  };
  std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return x(a) > x(b); });
  return ids;
}

void keep(Weights& w, const std::vector<int64_t>& ids, int64_t count) {
  for (int64_t rank = count; rank < static_cast<int64_t>(ids.size()); ++rank) w.e[ids[rank]] = 0;
}

int64_t sampleToken(const float* logits, const WeightLayout& layout, const std::vector<SoftmaxPart>& parts, float m,
                    float inverseTemperature, const Sampling& settings) {
  const int64_t vocabulary = layout.out;
  Weights w{std::vector<float>(vocabulary), std::vector<float>(vocabulary)};
  for (size_t p = 0; p < parts.size(); ++p) {
    const int64_t begin = layout.parts[p].outBegin;
    for (int64_t v = begin; v < begin + layout.parts[p].out; ++v) {
      w.e[v] = exp(below(logits[v] * inverseTemperature, parts[p].m));
      w.scale[v] = exp(below(parts[p].m, m));
    }
  }
  const std::vector<int64_t> ids = ranking(logits, inverseTemperature, vocabulary);
  const double never = std::numeric_limits<double>::infinity();
  double total = 0;
  walk(w, layout, never, &total);
  if (!(total > 0)) return ids[0];
  if (settings.topK > 0 && settings.topK < vocabulary) {
    keep(w, ids, settings.topK);
    walk(w, layout, never, &total);
  }
  if (settings.topP < 1) {
    const auto share = [&](int64_t v) {
      return static_cast<int64_t>(static_cast<double>(w.e[v]) * w.scale[v] * 0x1p40);
    };
    int64_t all = 0, sum = 0, count = 0;
    for (int64_t v = 0; v < vocabulary; ++v) all += share(v);
    const int64_t enough = static_cast<int64_t>(static_cast<double>(settings.topP) * static_cast<double>(all));
    while (count < vocabulary && (count == 0 || sum < enough)) sum += share(ids[count++]);
    keep(w, ids, count);
    walk(w, layout, never, &total);
  }
  const double u = uniform(settings.seed, settings.request, settings.position);
  return walk(w, layout, u * total, &total);
}

}  // namespace

void sample(Queue&, View<const float> logits, const WeightLayout& vocabulary, const Sampling* settings, int32_t* tokens,
            float* logprobs) {
  for (int64_t n = 0; n < logits.rows; ++n) {
    const float* row = logits.row(n);
    const bool greedy = settings[n].temperature == 0;
    const float inverseTemperature = greedy ? 1.0f : 1.0f / settings[n].temperature;
    const std::vector<SoftmaxPart> parts = softmaxParts(row, inverseTemperature, vocabulary);
    const SoftmaxPart all = mergeTree(parts);
    const int64_t token = greedy ? ranking(row, 1.0f, vocabulary.out)[0]
                                 : sampleToken(row, vocabulary, parts, all.m, inverseTemperature, settings[n]);
    tokens[n] = static_cast<int32_t>(token);
    logprobs[n] = row[token] * inverseTemperature - (all.m + log(all.s));
  }
}

}  // namespace lockstep::kernels::reference
