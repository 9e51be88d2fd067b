// Threads of a block that do not wait for each other as they should, or wait in the wrong way.
#include "faults.h"

namespace lockstep::emulation {

namespace {

constexpr int kThreads = 96, kSteps = 4;

template <bool kBroken>
__global__ void readNeighbour(float* out) {
  __shared__ Shared<float[kThreads]> row;
  const int t = static_cast<int>(threadIdx.x);
  row[t] = static_cast<float>(t);
  if (!kBroken) __syncthreads();
  out[t] = row[(t + 1) % kThreads];
}

// Each step writes the row and reads a neighbour's number, kBy to the left or to the right. One order of threads finds
// a missing barrier of one direction only, which is why there are several.
template <bool kBroken, int kBy>
__global__ void overwriteRow(float* out) {
  __shared__ Shared<float[kThreads + 2]> row;
  const int t = static_cast<int>(threadIdx.x) + 1;
  float sum = 0;
  if (t == 1) row[0] = row[kThreads + 1] = 0;
  for (int step = 0; step < kSteps; ++step) {
    row[t] = static_cast<float>(step * 1000 + t);
    __syncthreads();
    sum += row[t + kBy];
    if (!kBroken) __syncthreads();
  }
  out[t - 1] = sum;
}

// Blocks that run at the same time and use one place of global memory.
template <bool kBroken>
__global__ void shareScratch(float* scratch, float* out) {
  float* const own = scratch + (kBroken ? 0 : blockIdx.x * kThreads);
  own[threadIdx.x] = static_cast<float>(blockIdx.x);
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = own[(threadIdx.x + 1) % kThreads];
}

bool runShareScratch(bool broken) {
  constexpr size_t kBlocks = 3;
  const DeviceFloats scratch(kBlocks * kThreads), out(kBlocks * kThreads);
  launch(broken ? shareScratch<true> : shareScratch<false>, kBlocks, kThreads, 0, nullptr, scratch.data(), out.data());
  return holds(out, kBlocks * kThreads, [](int i) { return static_cast<float>(i / kThreads); });
}

// A ring of kStages tiles, filled ahead. Thread t reads what the next thread has copied.
template <int kLeft, bool kBarrier>
__global__ void pipeline(const float* in, float* out) {
  constexpr int kStages = 2, kTile = 4 * kThreads;
  __shared__ Shared<float[kStages][kTile]> tiles;
  const int t = static_cast<int>(threadIdx.x);
  const auto fill = [&](int step) {
    if (step < kSteps) cp_async_16(&tiles[step % kStages][4 * t], in + step * kTile + 4 * t);
    cp_async_commit();
  };
  fill(0);
  for (int step = 0; step < kSteps; ++step) {
    fill(step + 1);
    cp_async_wait<kLeft>();
    __syncthreads();
    for (int i = 0; i < 4; ++i) {
      out[step * kTile + 4 * t + i] = tiles[step % kStages][(4 * t + i + 4) % kTile];
    }
    if (kBarrier) __syncthreads();
  }
}

template <int kLeft, bool kBarrier>
bool runPipeline() {
  constexpr int kTile = 4 * kThreads;
  std::vector<float> values(static_cast<size_t>(kSteps * kTile));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const DeviceFloats in(values), out(values.size());
  launch(pipeline<kLeft, kBarrier>, 2, kThreads, 0, nullptr, in.data(), out.data());
  return holds(out, values.size(),
               [&](int i) { return static_cast<float>(i / kTile * kTile + (i % kTile + 4) % kTile); });
}

template <bool kBroken>
__global__ void barrierInBranches(float* out) {
  const int t = static_cast<int>(threadIdx.x);
  if (kBroken && t < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[t] = static_cast<float>(t);
}

template <bool kBroken>
__global__ void barrierOfSome(float* out) {
  const int t = static_cast<int>(threadIdx.x);
  if (!kBroken || t % 2 == 0) __syncthreads();
  out[t] = static_cast<float>(t);
}

// Thread t of the first half of each warp gets the number of its neighbour.
template <unsigned kMask>
__global__ void halfWarp(float* out) {
  const int t = static_cast<int>(threadIdx.x);
  float value = static_cast<float>(t);
  if (t % 32 < 16) value = __shfl_xor_sync(kMask, value, 1);
  out[t] = value;
}

template <unsigned kMask>
bool runHalfWarp() {
  const DeviceFloats out(kThreads);
  launch(halfWarp<kMask>, 1, kThreads, 0, nullptr, out.data());
  return holds(out, kThreads, [](int i) { return static_cast<float>(i % 32 < 16 ? i ^ 1 : i); });
}

// Half a warp reads from the other half, which takes no part.
template <bool kBroken>
__global__ void shuffleFromOutside(float* out) {
  const int t = static_cast<int>(threadIdx.x);
  float value = static_cast<float>(t);
  if (t % 32 < 16) value = __shfl_xor_sync(0xffffu, value, kBroken ? 16 : 8);
  out[t] = value;
}

template <bool kBroken>
__global__ void twoOperations(float* out) {
  const int t = static_cast<int>(threadIdx.x);
  const float value = static_cast<float>(t);
  out[t] = kBroken && t % 32 < 16 ? __shfl_xor_sync(~0u, value, 1) : __shfl_down_sync(~0u, value, 1);
}

// The first column of the product of two 16 x 16 and 16 x 8 matrices of small whole numbers.
unsigned pairOf(int first, int second) {
  const auto bits = [](int value) { return static_cast<unsigned>(toBFloat16(static_cast<float>(value)).bits); };
  return bits(first) | bits(second) << 16;
}

constexpr int aAt(int m, int k) {
  return (m * 5 + k * 3) % 7 - 3;
}
constexpr int bAt(int k, int n) {
  return (k * 2 + n * 5) % 9 - 4;
}

template <bool kBroken>
__global__ void multiply(float* out) {
  const int lane = static_cast<int>(threadIdx.x), row = lane / 4, column = lane % 4 * 2;
  float d[4] = {};
  unsigned a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    // The second register is the lower half of the rows, not the second half of the columns.
    const int rows = (kBroken ? i / 2 : i % 2) * 8, columns = (kBroken ? i % 2 : i / 2) * 8;
    a[i] = pairOf(aAt(row + rows, column + columns), aAt(row + rows, column + columns + 1));
  }
  for (int i = 0; i < 2; ++i) b[i] = pairOf(bAt(column + 8 * i, row), bAt(column + 8 * i + 1, row));
  mma_m16n8k16_bf16(d, a, b);
  for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + column + i % 2] = d[i];
}

float productAt(int i) {
  int sum = 0;
  for (int k = 0; k < 16; ++k) sum += aAt(i / 8, k) * bAt(k, i % 8);
  return static_cast<float>(sum);
}

// kernel<false> or kernel<true> with `threads` threads, and whether out[i] is value(i).
template <class Value>
bool runKernel(void (*kernel)(float*), int threads, size_t count, const Value& value) {
  const DeviceFloats out(count);
  launch(kernel, 3, static_cast<unsigned>(threads), 0, nullptr, out.data());
  return holds(out, count, value);
}

float same(int i) {
  return static_cast<float>(i);
}

template <int kBy>
bool runOverwrite(bool broken) {
  return runKernel(broken ? overwriteRow<true, kBy> : overwriteRow<false, kBy>, kThreads, kThreads, [](int i) {
    float sum = 0;
    for (int step = 0; step < kSteps; ++step) {
      const int neighbour = i + 1 + kBy;
      sum += neighbour < 1 || neighbour > kThreads ? 0 : static_cast<float>(step * 1000 + neighbour);
    }
    return sum;
  });
}

}  // namespace

std::vector<Fault> threadFaults() {
  return {
      {"read-before-written", Found::kWrongResult, "",
       [](bool broken) {
         return runKernel(broken ? readNeighbour<true> : readNeighbour<false>, kThreads, kThreads,
                          [](int i) { return static_cast<float>((i + 1) % kThreads); });
       }},
      {"overwritten-before-read-on-the-left", Found::kWrongResult, "", runOverwrite<-1>},
      {"overwritten-before-read-on-the-right", Found::kWrongResult, "", runOverwrite<1>},
      {"copy-read-too-early", Found::kWrongResult, "",
       [](bool broken) { return broken ? runPipeline<2, true>() : runPipeline<1, true>(); }},
      {"copy-overwrites-too-early", Found::kWrongResult, "",
       [](bool broken) { return broken ? runPipeline<1, false>() : runPipeline<1, true>(); }},
      {"blocks-share-scratch", Found::kWrongResult, "", runShareScratch},
      {"barriers-of-two-lines", Found::kError, "divergent __syncthreads, others at line",
       [](bool broken) {
         return runKernel(broken ? barrierInBranches<true> : barrierInBranches<false>, kThreads, kThreads, same);
       }},
      {"barrier-of-some-threads", Found::kError, "in __syncthreads at ",
       [](bool broken) {
         return runKernel(broken ? barrierOfSome<true> : barrierOfSome<false>, kThreads, kThreads, same);
       }},
      {"lane-outside-its-mask", Found::kError, "a lane is not in its own mask",
       [](bool broken) { return broken ? runHalfWarp<0xffff0000u>() : runHalfWarp<0xffffu>(); }},
      {"mask-of-absent-lanes", Found::kError, "threads wait for ever",
       [](bool broken) { return broken ? runHalfWarp<~0u>() : runHalfWarp<0xffffu>(); }},
      {"shuffle-from-outside-the-mask", Found::kWrongResult, "",
       [](bool broken) {
         return runKernel(broken ? shuffleFromOutside<true> : shuffleFromOutside<false>, kThreads, kThreads,
                          [](int i) { return static_cast<float>(i % 32 < 16 ? i ^ 8 : i); });
       }},
      {"lanes-in-two-operations", Found::kError, "others in __shfl_",
       [](bool broken) {
         return runKernel(broken ? twoOperations<true> : twoOperations<false>, kThreads, kThreads,
                          [](int i) { return static_cast<float>(i % 32 < 31 ? i + 1 : i); });
       }},
      {"fragment-in-the-wrong-order", Found::kWrongResult, "",
       [](bool broken) { return runKernel(broken ? multiply<true> : multiply<false>, 32, 128, productAt); }},
  };
}

}  // namespace lockstep::emulation
