// What the machine can do at most, measured by the benches in the same call as a kernel: multiply-adds from registers,
// and reading memory.
#include "kernels/cpu/ceiling.h"

#include <atomic>

#include "kernels/cpu/simd.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

namespace {

// 12 (of AVX2, two in a Vec) or 24 independent chains: enough to hide the latency of FMA and of VDPBF16PS.
#if defined(__AVX512F__)
constexpr int kChains = 24;
#else
constexpr int kChains = 6;
#endif
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// Whatever is computed is kept here, so that the compiler does not leave it out.
std::atomic<float> sink;

float chains(int64_t rounds, bool pairs) {
  Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = Vec::broadcast(static_cast<float>(i));
  const Vec x = Vec::broadcast(0.9999f), y = Vec::broadcast(1e-5f);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) {
#if defined(__AVX512BF16__)
      acc[i] = pairs ? dotPair(acc[i], asPairs(x), asPairs(y)) : fma(acc[i], x, y);
#else
      (void)pairs;
      acc[i] = fma(acc[i], x, y);
#endif
    }
  }
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += lanesSum(acc[i]);
  return sum;
}

double multiplyAdds(Queue& queue, DType dtype) {
  constexpr int64_t kRounds = 20000;
  const bool pairs = kHasPairs && dtype == DType::kBFloat16;
  queue.pool().each([&](int) { sink = chains(kRounds, pairs); });
  return static_cast<double>(kRounds * kChains * 16 * (pairs ? 2 : 1)) * queue.threads();
}

// Four streams at once: one alone does not keep the hardware's fetching busy everywhere.
float sumOf(const float* data, int64_t count) {
  constexpr int kStreams = 4;
  const int64_t each = count / kStreams;
  Vec acc[kStreams];
  for (Vec& a : acc) a = zero();
  for (int64_t i = 0; i + 32 <= each; i += 32) {
#pragma GCC unroll 4
    for (int j = 0; j < kStreams; ++j) {
      acc[j] = acc[j] + (loadu(data + j * each + i) + loadu(data + j * each + i + 16));
    }
  }
  float sum = 0;
  for (const Vec& a : acc) sum += lanesSum(a);
  return sum;
}

void readAll(Queue& queue, const float* data, int64_t count) {
  const int64_t each = count / queue.threads() / 128 * 128;
  queue.pool().each([&](int thread) { sink = sumOf(data + thread * each, each); });
}

}  // namespace

const Ceiling& ceiling() {
  static const Ceiling functions = {multiplyAdds, readAll};
  return functions;
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
