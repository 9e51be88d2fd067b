// RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016), forward and backward. A block takes a row: all
// its threads bring it to shared memory, 16 of them sum it in the order of the lanes sum. Gradients of gains and biases
// are one chain per column over all rows: a block has few columns, of which a thread each adds up what the others bring
// to shared memory, some tiles of rows ahead.
#include "kernels/cuda/cuda.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int kThreads = 128;

// f(i) for every element of the row, into shared memory; then the lanes sum of next over it, to all threads.
template <class Value, class Next>
__device__ float sumOfRow(float* row, float* total, int64_t width, const Value& value, const Next& next) {
  __syncthreads();  // what the last sum read may be overwritten
  for (int64_t i = threadIdx.x; i < width; i += kThreads) row[i] = value(i);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const float sum = lanesSum16(threadIdx.x % 16, width, [&](float acc, int64_t i) { return next(acc, row[i], i); });
    if (threadIdx.x == 0) *total = sum;
  }
  __syncthreads();
  return *total;
}

__global__ void rmsNormKernel(View<const float> x, const float* gain, float eps, Operand y, float* inverseRms) {
  __shared__ Shared<float[1]> total;
  float* row = shared_memory<float>();
  const int64_t t = blockIdx.x, width = x.cols;
  const float* in = x.row(t);
  const float squares = sumOfRow(
      row, total, width, [&](int64_t i) { return in[i]; }, [](float acc, float v, int64_t) { return fma(v, v, acc); });
  const float r = inverseRoot(squares / static_cast<float>(width), eps);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) store(y, t, i, row[i] * r * gain[i]);
  if (inverseRms != nullptr && threadIdx.x == 0) inverseRms[t] = r;
}

__global__ void rmsNormBackwardKernel(View<const float> x, const float* gain, const float* inverseRms,
                                      View<const float> dy, View<float> dx) {
  __shared__ Shared<float[1]> total;
  float* row = shared_memory<float>();
  const int64_t t = blockIdx.x, width = x.cols;
  const float *in = x.row(t), *dOut = dy.row(t);
  const float r = inverseRms[t];
  const float dot = sumOfRow(
      row, total, width, [&](int64_t i) { return dOut[i] * gain[i]; },
      [&](float acc, float g, int64_t i) { return fma(g, in[i], acc); });
  const float c = dot * (r * r) / static_cast<float>(width);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) dx.row(t)[i] = fma(r, fma(-c, in[i], row[i]), dx.row(t)[i]);
}

__global__ void layerNormKernel(View<const float> x, const float* gain, const float* bias, float eps, Operand y,
                                float* mean, float* inverseStd) {
  __shared__ Shared<float[1]> total;
  float* row = shared_memory<float>();
  const int64_t t = blockIdx.x, width = x.cols;
  const float* in = x.row(t);
  const float sum = sumOfRow(
      row, total, width, [&](int64_t i) { return in[i]; }, [](float acc, float v, int64_t) { return acc + v; });
  const float mu = sum / static_cast<float>(width);
  const float squares = sumOfRow(
      row, total, width, [&](int64_t i) { return in[i] - mu; },
      [](float acc, float v, int64_t) { return fma(v, v, acc); });
  const float r = inverseRoot(squares / static_cast<float>(width), eps);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) store(y, t, i, fma(row[i] * r, gain[i], bias[i]));
  if (threadIdx.x != 0) return;
  if (mean != nullptr) mean[t] = mu;
  if (inverseStd != nullptr) inverseStd[t] = r;
}

__global__ void layerNormBackwardKernel(View<const float> x, const float* gain, const float* mean,
                                        const float* inverseStd, View<const float> dy, View<float> dx) {
  __shared__ Shared<float[1]> total;
  float* row = shared_memory<float>();
  const int64_t t = blockIdx.x, width = x.cols;
  const float *in = x.row(t), *dOut = dy.row(t);
  const float mu = mean[t], r = inverseStd[t];
  const auto scaled = [&](int64_t i) { return dOut[i] * gain[i]; };
  const float sum = sumOfRow(row, total, width, scaled, [](float acc, float g, int64_t) { return acc + g; });
  const float dot =
      sumOfRow(row, total, width, scaled, [&](float acc, float g, int64_t i) { return fma(g, (in[i] - mu) * r, acc); });
  const float a = sum / static_cast<float>(width), b = dot / static_cast<float>(width);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const float normed = (in[i] - mu) * r;
    dx.row(t)[i] = fma(r, fma(-b, normed, row[i] - a), dx.row(t)[i]);
  }
}

constexpr int kGainColumns = 16, kGainRows = 64, kGainStages = 5;
constexpr int kGainCopiers = 128, kGainThreads = kWarp + kGainCopiers;

// Begins to copy four floats, or as many as there are.
__device__ inline void copyFour(float* to, const float* from, int64_t count) {
  if (count >= 4 && reinterpret_cast<uintptr_t>(from) % 16 == 0) return cp_async_16(to, from);
  for (int i = 0; i < 4; ++i) {
    if (i < count) to[i] = from[i];
  }
}

// kGainRows rows of a block's columns in shared memory, with their statistics.
struct GainStage {
  float x[kGainRows][kGainColumns], dy[kGainRows][kGainColumns], mean[kGainRows], inverse[kGainRows];

  // Begins to copy the rows from `begin` on, as many as there are, by the copiers. mean may be null.
  __device__ void copy(View<const float> from, View<const float> dyFrom, int64_t column, const float* means,
                       const float* inverses, int64_t begin) {
    constexpr int kAcross = kGainColumns / 4, kStatistics = kGainRows / 4;
    const int copier = static_cast<int>(threadIdx.x) - kWarp, i = copier % kAcross * 4;
    const int64_t left = from.cols - column - i;
    for (int r = copier / kAcross; r < kGainRows && begin + r < from.rows; r += kGainCopiers / kAcross) {
      copyFour(&x[r][i], from.row(begin + r) + column + i, left);
      copyFour(&dy[r][i], dyFrom.row(begin + r) + column + i, left);
    }
    const int r = copier % kStatistics * 4;
    if (copier < kStatistics) {
      copyFour(&inverse[r], inverses + begin + r, from.rows - begin - r);
    } else if (copier < 2 * kStatistics && means != nullptr) {
      copyFour(&mean[r], means + begin + r, from.rows - begin - r);
    }
  }
};

// kIsLayerNorm: with mean and dBias. The chains are the first warp's, the others copy.
template <bool kIsLayerNorm>
__global__ void __launch_bounds__(kGainThreads, 1)
    gainKernel(View<const float> x, const float* mean, const float* inverse, View<const float> dy, float* dGain,
               float* dBias) {
  GainStage* const stages = shared_memory<GainStage>();
  const bool copies = threadIdx.x >= kWarp;
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kGainColumns, own = column + lane;
  const bool sums = lane < kGainColumns && own < x.cols;
  int64_t nextRow = 0;
  int nextStage = 0;
  const auto copyNext = [&] {
    if (copies && nextRow < x.rows) stages[nextStage].copy(x, dy, column, mean, inverse, nextRow);
    nextRow += kGainRows;
    nextStage = nextStage + 1 == kGainStages ? 0 : nextStage + 1;
    cp_async_commit();
  };
  for (int i = 0; i + 1 < kGainStages; ++i) copyNext();
  float gainSum = sums ? dGain[own] : 0.0f, biasSum = kIsLayerNorm && sums ? dBias[own] : 0.0f;
  int stage = 0;
  for (int64_t begin = 0; begin < x.rows; begin += kGainRows) {
    cp_async_wait<kGainStages - 2>();
    __syncthreads();  // the stage is there for all, and the one before it, which copyNext() fills again, has been used
    copyNext();
    const GainStage& here = stages[stage];
    stage = stage + 1 == kGainStages ? 0 : stage + 1;
    if (!sums) continue;
    const int count = x.rows - begin < kGainRows ? static_cast<int>(x.rows - begin) : kGainRows;
#pragma unroll 16
    for (int r = 0; r < count; ++r) {
      const float in = here.x[r][lane], g = here.dy[r][lane];
      if constexpr (kIsLayerNorm) {
        gainSum = fma(g, (in - here.mean[r]) * here.inverse[r], gainSum);
        biasSum = biasSum + g;
      } else {
        gainSum = fma(g, in * here.inverse[r], gainSum);
      }
    }
  }
  if (!sums) return;
  dGain[own] = gainSum;
  if constexpr (kIsLayerNorm) dBias[own] = biasSum;
}

template <bool kIsLayerNorm>
void launchGains(cudaStream_t stream, View<const float> x, const float* mean, const float* inverse,
                 View<const float> dy, float* dGain, float* dBias) {
  launch(gainKernel<kIsLayerNorm>, blocksFor(x.cols, kGainColumns), kGainThreads, kGainStages * sizeof(GainStage),
         stream, x, mean, inverse, dy, dGain, dBias);
}

// A row in shared memory.
size_t rowBytes(int64_t width) {
  return static_cast<size_t>(width) * sizeof(float);
}

}  // namespace

void rmsNorm(Queue& queue, View<const float> x, const float* gain, float eps, Operand y, float* inverseRms) {
  if (x.rows == 0) return;
  launch(rmsNormKernel, blocksFor(x.rows, 1), kThreads, rowBytes(x.cols), onGpu(queue).stream(), x, gain, eps, y,
         inverseRms);
}

void rmsNormBackward(Queue& queue, View<const float> x, const float* gain, const float* inverseRms,
                     View<const float> dy, View<float> dx, float* dGain) {
  if (x.rows == 0) return;
  cudaStream_t const stream = onGpu(queue).stream();
  launch(rmsNormBackwardKernel, blocksFor(x.rows, 1), kThreads, rowBytes(x.cols), stream, x, gain, inverseRms, dy, dx);
  launchGains<false>(stream, x, nullptr, inverseRms, dy, dGain, nullptr);
}

void layerNorm(Queue& queue, View<const float> x, const float* gain, const float* bias, float eps, Operand y,
               float* mean, float* inverseStd) {
  if (x.rows == 0) return;
  launch(layerNormKernel, blocksFor(x.rows, 1), kThreads, rowBytes(x.cols), onGpu(queue).stream(), x, gain, bias, eps,
         y, mean, inverseStd);
}

void layerNormBackward(Queue& queue, View<const float> x, const float* gain, const float* mean, const float* inverseStd,
                       View<const float> dy, View<float> dx, float* dGain, float* dBias) {
  if (x.rows == 0) return;
  cudaStream_t const stream = onGpu(queue).stream();
  launch(layerNormBackwardKernel, blocksFor(x.rows, 1), kThreads, rowBytes(x.cols), stream, x, gain, mean, inverseStd,
         dy, dx);
  launchGains<true>(stream, x, mean, inverseStd, dy, dGain, dBias);
}

}  // namespace lockstep::kernels::cuda
