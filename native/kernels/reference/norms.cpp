// RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016), forward and backward.
#include "kernels/math.h"
#include "kernels/reference/reference.h"
#include "kernels/reference/rows.h"

namespace lockstep::kernels::reference {

void rmsNorm(Queue&, View<const float> x, const float* gain, float eps, Operand y, float* inverseRms) {
  const int64_t width = x.cols;
  for (int64_t t = 0; t < x.rows; ++t) {
    const float* in = x.row(t);
    const float squares = lanesSum(width, [&](float acc, int64_t i) { return fma(in[i], in[i], acc); });
    const float r = inverseRoot(squares / static_cast<float>(width), eps);
    for (int64_t i = 0; i < width; ++i) store(y, t, i, in[i] * r * gain[i]);
    if (inverseRms != nullptr) inverseRms[t] = r;
  }
}

void rmsNormBackward(Queue&, View<const float> x, const float* gain, const float* inverseRms, View<const float> dy,
                     View<float> dx, float* dGain) {
  const int64_t width = x.cols;
  for (int64_t t = 0; t < x.rows; ++t) {
    const float *in = x.row(t), *dOut = dy.row(t);
    const float r = inverseRms[t];
    const float dot = lanesSum(width, [&](float acc, int64_t i) { return fma(dOut[i] * gain[i], in[i], acc); });
    const float c = dot * (r * r) / static_cast<float>(width);
    for (int64_t i = 0; i < width; ++i) {
      const float g = dOut[i] * gain[i];
      dx.row(t)[i] = fma(r, fma(-c, in[i], g), dx.row(t)[i]);
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t t = 0; t < x.rows; ++t) dGain[i] = fma(dy.row(t)[i], x.row(t)[i] * inverseRms[t], dGain[i]);
  }
}

void layerNorm(Queue&, View<const float> x, const float* gain, const float* bias, float eps, Operand y, float* mean,
               float* inverseStd) {
  const int64_t width = x.cols;
  for (int64_t t = 0; t < x.rows; ++t) {
    const float* in = x.row(t);
    const float sum = lanesSum(width, [&](float acc, int64_t i) { return acc + in[i]; });
    const float mu = sum / static_cast<float>(width);
    const float squares = lanesSum(width, [&](float acc, int64_t i) { return fma(in[i] - mu, in[i] - mu, acc); });
    const float r = inverseRoot(squares / static_cast<float>(width), eps);
    for (int64_t i = 0; i < width; ++i) store(y, t, i, fma((in[i] - mu) * r, gain[i], bias[i]));
    if (mean != nullptr) mean[t] = mu;
    if (inverseStd != nullptr) inverseStd[t] = r;
  }
}

void layerNormBackward(Queue&, View<const float> x, const float* gain, const float* mean, const float* inverseStd,
                       View<const float> dy, View<float> dx, float* dGain, float* dBias) {
  const int64_t width = x.cols;
  for (int64_t t = 0; t < x.rows; ++t) {
    const float *in = x.row(t), *dOut = dy.row(t);
    const float mu = mean[t], r = inverseStd[t];
    const float sum = lanesSum(width, [&](float acc, int64_t i) { return acc + dOut[i] * gain[i]; });
    const float dot =
        lanesSum(width, [&](float acc, int64_t i) { return fma(dOut[i] * gain[i], (in[i] - mu) * r, acc); });
    const float a = sum / static_cast<float>(width), b = dot / static_cast<float>(width);
    for (int64_t i = 0; i < width; ++i) {
      const float g = dOut[i] * gain[i], normed = (in[i] - mu) * r;
      dx.row(t)[i] = fma(r, fma(-b, normed, g - a), dx.row(t)[i]);
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t t = 0; t < x.rows; ++t) {
      const float normed = (x.row(t)[i] - mean[t]) * inverseStd[t];
      dGain[i] = fma(dy.row(t)[i], normed, dGain[i]);
      dBias[i] = dBias[i] + dy.row(t)[i];
    }
  }
}

}  // namespace lockstep::kernels::reference
