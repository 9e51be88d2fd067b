// One token per row of logits. Plain sampling reads the row twice (maximum, exponentials) and its weights once; top-k
// and top-p find where their prefix ends by three passes of radix selection, without sorting.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/softmax.h"
#include "kernels/philox.h"
#include "kernels/scratch.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

// A row's weights: e_v, the sums of blocks of 256 columns of a part, and a_p.
struct RowWeights {
  const WeightLayout& layout;
  uint64_t* histogram;  // [kSamplingBuckets]
  uint32_t* ranks;      // [V]; with top-k or top-p only
  float* e;             // [V]
  float* blocks;        // [blocks], part after part
  float* scales;        // [parts]

  RowWeights(const WeightLayout& vocabulary, void* scratch) : layout(vocabulary) {
    histogram = static_cast<uint64_t*>(scratch);
    ranks = reinterpret_cast<uint32_t*>(histogram + kSamplingBuckets);
    e = reinterpret_cast<float*>(ranks + roundUp(layout.out, 16));
    blocks = e + roundUp(layout.out, 16);
    scales = blocks + samplingBlocks(layout);
  }
};

double sumBlocks(RowWeights& w) {
  double total = 0;
  float* block = w.blocks;
  for (size_t p = 0; p < w.layout.parts.size(); ++p) {
    const Part& part = w.layout.parts[p];
    for (int64_t i = 0; i < part.out; i += kSamplingBlock) {
      const float* e = w.e + part.outBegin + i;
      const int64_t count = part.out - i < kSamplingBlock ? part.out - i : kSamplingBlock;
      *block = lanesSum(count, [&](Vec acc, int64_t j, auto lanes) { return acc + load(e + j, lanes); });
      total += static_cast<double>(*block++) * static_cast<double>(w.scales[p]);
    }
  }
  return total;
}

// The first token whose running sum exceeds target; rounding may leave none inside the last block entered, whose last
// token with weight it is then.
int64_t findToken(const RowWeights& w, double target) {
  double sum = 0;
  int64_t blockBegin = 0, blockEnd = 0;
  const float* block = w.blocks;
  for (size_t p = 0; p < w.layout.parts.size(); ++p) {
    const Part& part = w.layout.parts[p];
    const double scale = static_cast<double>(w.scales[p]);
    for (int64_t i = 0; i < part.out; i += kSamplingBlock) {
      const double weight = static_cast<double>(*block++) * scale, after = sum + weight;
      if (weight > 0) {
        blockBegin = part.outBegin + i;
        blockEnd = part.out - i < kSamplingBlock ? part.outBegin + part.out : blockBegin + kSamplingBlock;
      }
      if (after > target) {
        for (int64_t v = blockBegin; v < blockEnd; ++v) {
          sum += static_cast<double>(w.e[v]) * scale;
          if (sum > target) return v;
        }
        p = w.layout.parts.size() - 1;
        break;
      }
      sum = after;
    }
  }
  while (blockEnd - 1 > blockBegin && !(w.e[blockEnd - 1] > 0)) --blockEnd;
  return blockEnd - 1;
}

// The lowest id among the largest x; NaN counts as -inf.
int64_t argmax(const float* logits, float inverseTemperature, int64_t count) {
  const float top = largest(logits, inverseTemperature, count);
  for (int64_t v = 0; v < count; ++v) {
    if (logits[v] * inverseTemperature == top) return v;
  }
  return 0;
}

// Floats as unsigned integers, the largest first. NaN counts as -inf, -0 as 0.
void rankRow(const float* logits, float inverseTemperature, int64_t count, uint32_t* ranks) {
  for (int64_t v = 0; v < count; ++v) {
    const float x = logits[v] * inverseTemperature;
    const int32_t bits = std::bit_cast<int32_t>(x == x ? x + 0.0f : -std::numeric_limits<float>::infinity());
    ranks[v] = static_cast<uint32_t>(bits ^ (~(bits >> 31) & 0x7fffffff));
  }
}

// Drops (e_v = 0) every token behind the shortest prefix in rank order (ties: lowest id) whose measures sum to `limit`;
// a limit that is never reached drops none. measure(v, p) of token v in part p is an integer, so sums have no order.
// Each pass fixes the next digits (11, 11, 10 bits) of the rank at which the prefix ends.
template <class Measure>
void keepPrefix(RowWeights& w, uint64_t limit, const Measure& measure) {
  constexpr int kShifts[4] = {32, 21, 10, 0};
  uint64_t before = 0;  // measures of the ranks below `end`
  uint32_t end = 0;     // the digits found so far
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = kShifts[pass + 1], digits = kShifts[pass] - shift;
    for (int64_t i = 0; i < kSamplingBuckets; ++i) w.histogram[i] = 0;
    for (size_t p = 0; p < w.layout.parts.size(); ++p) {
      const Part& part = w.layout.parts[p];
      for (int64_t v = part.outBegin; v < part.outBegin + part.out; ++v) {
        const uint64_t rank = w.ranks[v];
        if (rank >> kShifts[pass] != end) continue;
        w.histogram[(rank >> shift) & ((1u << digits) - 1)] += measure(v, p);
      }
    }
    uint32_t bucket = 0;
    while (bucket < (1u << digits) && before + w.histogram[bucket] < limit) before += w.histogram[bucket++];
    if (bucket == (1u << digits)) return;
    end = (end << digits) | bucket;
  }
  for (size_t p = 0; p < w.layout.parts.size(); ++p) {
    const Part& part = w.layout.parts[p];
    for (int64_t v = part.outBegin; v < part.outBegin + part.out; ++v) {
      if (w.ranks[v] < end) continue;
      if (w.ranks[v] == end && before < limit) {
        before += measure(v, p);
      } else {
        w.e[v] = 0;
      }
    }
  }
}

// Drops what top-k and then top-p do not keep; returns the total of the rest.
double filter(RowWeights& w, const float* logits, float inverseTemperature, const Sampling& settings, double total) {
  const bool byCount = settings.topK > 0 && settings.topK < w.layout.out, byShare = settings.topP < 1;
  if (byCount || byShare) rankRow(logits, inverseTemperature, w.layout.out, w.ranks);
  if (byCount) {
    keepPrefix(w, static_cast<uint64_t>(settings.topK), [](int64_t, size_t) -> uint64_t { return 1; });
    total = sumBlocks(w);
  }
  if (byShare) {
    const auto share = [&](int64_t v, size_t p) {
      return static_cast<uint64_t>(
          static_cast<int64_t>(static_cast<double>(w.e[v]) * static_cast<double>(w.scales[p]) * 0x1p40));
    };
    uint64_t all = 0;
    for (size_t p = 0; p < w.layout.parts.size(); ++p) {
      const Part& part = w.layout.parts[p];
      for (int64_t v = part.outBegin; v < part.outBegin + part.out; ++v) all += share(v, p);
    }
    const auto enough = static_cast<int64_t>(static_cast<double>(settings.topP) * static_cast<double>(all));
    keepPrefix(w, static_cast<uint64_t>(enough > 1 ? enough : 1), share);
    total = sumBlocks(w);
  }
  return total;
}

void sampleRow(const float* logits, const WeightLayout& layout, const Sampling& settings, void* scratch, int32_t* token,
               float* logprob) {
  const bool greedy = settings.temperature == 0;
  const float inverseTemperature = greedy ? 1.0f : 1.0f / settings.temperature;
  RowWeights w(layout, scratch);
  const SoftmaxPart all = mergeTree(0, static_cast<int64_t>(layout.parts.size()), [&](int64_t p) {
    const Part& part = layout.parts[p];
    const SoftmaxPart stats =
        softmaxPart<false>(logits + part.outBegin, inverseTemperature, part.out, w.e + part.outBegin);
    w.scales[p] = stats.m;
    return stats;
  });
  int64_t id = -1;
  if (!greedy) {
    for (size_t p = 0; p < layout.parts.size(); ++p) w.scales[p] = exp(below(w.scales[p], all.m));
    double total = sumBlocks(w);
    if (total > 0) {
      total = filter(w, logits, inverseTemperature, settings, total);
      id = findToken(w, uniform(settings.seed, settings.request, settings.position) * total);
    }
  }
  if (id < 0) id = argmax(logits, inverseTemperature, layout.out);
  *token = static_cast<int32_t>(id);
  *logprob = logits[id] * inverseTemperature - (all.m + log(all.s));
}

}  // namespace

void sample(Queue& queue, View<const float> logits, const WeightLayout& vocabulary, const Sampling* settings,
            int32_t* tokens, float* logprobs) {
  const int64_t bytes = samplingScratchBytes(vocabulary);
  for (int thread = 0; thread < queue.threads(); ++thread) queue.scratch(thread, static_cast<size_t>(bytes));
  queue.pool().forEach(logits.rows, [&](int64_t n, int thread) {
    void* scratch = queue.scratch(thread, static_cast<size_t>(bytes));
    sampleRow(logits.row(n), vocabulary, settings[n], scratch, tokens + n, logprobs + n);
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
