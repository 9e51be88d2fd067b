// What the machine can do at most, measured by the benches in the same call as a kernel: multiply-adds from registers,
// and reading memory.
#include "kernels/cpu/ceiling.h"

#include "kernels/cpu/simd.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

namespace {

// 12 (AVX2) or 24 independent chains: enough to hide the latency of FMA and of VDPBF16PS.
float multiplyAdds(int64_t rounds, bool pairs) {
#if defined(__AVX512F__)
  constexpr int kChains = 24;
#else
  constexpr int kChains = 6;
#endif
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

int64_t multiplyAddsOf(int64_t rounds, bool pairs) {
#if defined(__AVX512F__)
  constexpr int64_t kChains = 24;
#else
  constexpr int64_t kChains = 6;
#endif
#if defined(__AVX512BF16__)
  return rounds * kChains * 16 * (pairs ? 2 : 1);
#else
  (void)pairs;
  return rounds * kChains * 16;
#endif
}

// Four streams at once: one alone does not keep the hardware's fetching busy everywhere.
float readAll(const float* data, int64_t count) {
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

}  // namespace

const Ceiling& ceiling() {
  static const Ceiling functions = {multiplyAdds, multiplyAddsOf, readAll};
  return functions;
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
