// mma_layout: whether mma_m16n8k16_bf16 takes and gives its elements where cuda/emulation/device.h says, on this
// machine: a product of small whole numbers, which no order of summation rounds, against a plain loop. Compiled for
// GPUs and for their emulation. Exit 0: every element is equal.
#include "device.h"

#include <cstdio>
#include <random>
#include <vector>

#include "testing.h"

namespace lockstep::emulation {

namespace {

constexpr int kTrials = 200, kM = 16, kN = 8, kK = 16;

struct Problem {
  float a[kM][kK], b[kK][kN], d[kM][kN];
};

__device__ unsigned pairOf(float first, float second) {
  return toBFloat16(first).bits | static_cast<unsigned>(toBFloat16(second).bits) << 16;
}

__global__ void multiply(Problem* problems) {
  Problem& p = problems[blockIdx.x];
  const int lane = static_cast<int>(threadIdx.x), row = lane / 4, column = lane % 4 * 2;
  float d[4];
  unsigned a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const float* from = &p.a[row + i % 2 * 8][column + i / 2 * 8];
    a[i] = pairOf(from[0], from[1]);
    d[i] = p.d[row + i / 2 * 8][column + i % 2];
  }
  for (int i = 0; i < 2; ++i) b[i] = pairOf(p.b[column + i * 8][row], p.b[column + i * 8 + 1][row]);
  mma_m16n8k16_bf16(d, a, b);
  for (int i = 0; i < 4; ++i) p.d[row + i / 2 * 8][column + i % 2] = d[i];
}

int run() {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> whole(-100, 100);
  auto* const problems = static_cast<Problem*>(cuda::testing::allocate(kTrials * sizeof(Problem)));
  if (problems == nullptr) {
    std::printf("mma_layout: no GPU that can be used: %s\n", cudaGetErrorString(cudaGetLastError()));
    return 1;
  }
  std::vector<Problem> expected(kTrials);
  for (int trial = 0; trial < kTrials; ++trial) {
    Problem& p = expected[static_cast<size_t>(trial)];
    for (auto& row : p.a)
      for (float& x : row) x = static_cast<float>(whole(random));
    for (auto& row : p.b)
      for (float& x : row) x = static_cast<float>(whole(random));
    for (auto& row : p.d)
      for (float& x : row) x = static_cast<float>(whole(random));
    problems[trial] = p;
    for (int m = 0; m < kM; ++m)
      for (int n = 0; n < kN; ++n)
        for (int k = 0; k < kK; ++k) p.d[m][n] += p.a[m][k] * p.b[k][n];
  }
  launch(multiply, kTrials, 32, 0, nullptr, problems);
  if (cudaDeviceSynchronize() != cudaSuccess) {
    std::printf("mma_layout: %s\n", cudaGetErrorString(cudaGetLastError()));
    return 1;
  }
  int wrong = 0;
  for (int trial = 0; trial < kTrials; ++trial)
    for (int m = 0; m < kM; ++m)
      for (int n = 0; n < kN; ++n) {
        const float want = expected[static_cast<size_t>(trial)].d[m][n], got = problems[trial].d[m][n];
        if (want == got) continue;
        if (++wrong <= 10)
          std::printf("mma_layout: product %d, row %d column %d: expected %g, got %g\n", trial, m, n,
                      static_cast<double>(want), static_cast<double>(got));
      }
  std::printf("mma_layout: %d of %d elements differ\n", wrong, kTrials * kM * kN);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace lockstep::emulation

int main() {
  try {
    return lockstep::emulation::run();
  } catch (const lockstep::Error& error) {
    std::printf("mma_layout: %s\n", error.what());
    return 1;
  }
}
