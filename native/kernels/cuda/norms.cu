// RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016), forward and backward. A block takes a row: all
// its threads bring it to shared memory, 16 of them sum it in the order of the lanes sum. Gains' gradients are one
// chain per column, a thread each.
#include "kernels/cuda/cuda.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int kThreads = 128, kColumnThreads = 64;

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

__global__ void rmsNormGainKernel(View<const float> x, const float* inverseRms, View<const float> dy, float* dGain) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
  if (i >= x.cols) return;
  float sum = dGain[i];
  for (int64_t t = 0; t < x.rows; ++t) sum = fma(dy.row(t)[i], x.row(t)[i] * inverseRms[t], sum);
  dGain[i] = sum;
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

__global__ void layerNormGainKernel(View<const float> x, const float* mean, const float* inverseStd,
                                    View<const float> dy, float* dGain, float* dBias) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
  if (i >= x.cols) return;
  float gainSum = dGain[i], biasSum = dBias[i];
  for (int64_t t = 0; t < x.rows; ++t) {
    const float normed = (x.row(t)[i] - mean[t]) * inverseStd[t];
    gainSum = fma(dy.row(t)[i], normed, gainSum);
    biasSum = biasSum + dy.row(t)[i];
  }
  dGain[i] = gainSum;
  dBias[i] = biasSum;
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
  launch(rmsNormGainKernel, blocksFor(x.cols, kColumnThreads), kColumnThreads, 0, stream, x, inverseRms, dy, dGain);
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
  launch(layerNormGainKernel, blocksFor(x.cols, kColumnThreads), kColumnThreads, 0, stream, x, mean, inverseStd, dy,
         dGain, dBias);
}

}  // namespace lockstep::kernels::cuda
