// RMSNorm and LayerNorm. Forward and dx go row by row; the gradients of gain and bias are chains over rows, so threads
// take columns there.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/rows.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

// acc[i] = next(acc[i], t, i) over rows t ascending for columns begin .. end: four rows per visit of acc.
template <class Next>
LOCKSTEP_INLINE void columnChains(int64_t rows, int64_t begin, int64_t end, float* acc, const Next& next) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) {
    eachVector(end - begin, [&](int64_t offset, auto lanes) {
      const int64_t i = begin + offset;
      Vec sum = load(acc + i, lanes);
      sum = next(sum, t, i, lanes);
      sum = next(sum, t + 1, i, lanes);
      sum = next(sum, t + 2, i, lanes);
      sum = next(sum, t + 3, i, lanes);
      store(acc + i, sum, lanes);
    });
  }
  for (; t < rows; ++t) {
    eachVector(end - begin, [&](int64_t offset, auto lanes) {
      const int64_t i = begin + offset;
      store(acc + i, next(load(acc + i, lanes), t, i, lanes), lanes);
    });
  }
}

LOCKSTEP_INLINE float rmsOf(const float* x, int64_t width, float eps) {
  const float squares = lanesSum(width, [&](Vec acc, int64_t i, auto lanes) {
    const Vec v = load(x + i, lanes);
    return fma(v, v, acc);
  });
  return inverseRoot(squares / static_cast<float>(width), eps);
}

}  // namespace

void rmsNorm(Queue& queue, View<const float> x, const float* gain, float eps, Operand y, float* inverseRms) {
  forRanges(queue, x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* in = x.row(t);
      const float r = rmsOf(in, x.cols, eps);
      const Vec scale = Vec::broadcast(r);
      withElement(y.dtype, [&](auto element) {
        auto* out = y.row<decltype(element)>(t);
        eachVector(x.cols, [&](int64_t i, auto lanes) {
          store(out + i, load(in + i, lanes) * scale * load(gain + i, lanes), lanes);
        });
      });
      if (inverseRms != nullptr) inverseRms[t] = r;
    }
  });
}

void rmsNormBackward(Queue& queue, View<const float> x, const float* gain, const float* inverseRms,
                     View<const float> dy, View<float> dx, float* dGain) {
  const int64_t width = x.cols;
  forRanges(queue, x.rows, width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float *in = x.row(t), *dOut = dy.row(t);
      float* dIn = dx.row(t);
      const float r = inverseRms[t];
      const float dot = lanesSum(width, [&](Vec acc, int64_t i, auto lanes) {
        return fma(load(dOut + i, lanes) * load(gain + i, lanes), load(in + i, lanes), acc);
      });
      const Vec scale = Vec::broadcast(r), minusC = Vec::broadcast(-(dot * (r * r) / static_cast<float>(width)));
      eachVector(width, [&](int64_t i, auto lanes) {
        const Vec g = load(dOut + i, lanes) * load(gain + i, lanes);
        store(dIn + i, fma(scale, fma(minusC, load(in + i, lanes), g), load(dIn + i, lanes)), lanes);
      });
    }
  });
  forColumns(queue, x.rows, width, [&](int64_t begin, int64_t end) {
    columnChains(x.rows, begin, end, dGain, [&](Vec acc, int64_t t, int64_t i, auto lanes) {
      return fma(load(dy.row(t) + i, lanes), load(x.row(t) + i, lanes) * Vec::broadcast(inverseRms[t]), acc);
    });
  });
}

void layerNorm(Queue& queue, View<const float> x, const float* gain, const float* bias, float eps, Operand y,
               float* mean, float* inverseStd) {
  const int64_t width = x.cols;
  forRanges(queue, x.rows, width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* in = x.row(t);
      const float sum = lanesSum(width, [&](Vec acc, int64_t i, auto lanes) { return acc + load(in + i, lanes); });
      const float mu = sum / static_cast<float>(width);
      const Vec center = Vec::broadcast(mu);
      const float squares = lanesSum(width, [&](Vec acc, int64_t i, auto lanes) {
        const Vec d = load(in + i, lanes) - center;
        return fma(d, d, acc);
      });
      const float r = inverseRoot(squares / static_cast<float>(width), eps);
      const Vec scale = Vec::broadcast(r);
      withElement(y.dtype, [&](auto element) {
        auto* out = y.row<decltype(element)>(t);
        eachVector(width, [&](int64_t i, auto lanes) {
          const Vec normed = (load(in + i, lanes) - center) * scale;
          store(out + i, fma(normed, load(gain + i, lanes), load(bias + i, lanes)), lanes);
        });
      });
      if (mean != nullptr) mean[t] = mu;
      if (inverseStd != nullptr) inverseStd[t] = r;
    }
  });
}

void layerNormBackward(Queue& queue, View<const float> x, const float* gain, const float* mean, const float* inverseStd,
                       View<const float> dy, View<float> dx, float* dGain, float* dBias) {
  const int64_t width = x.cols;
  const auto normed = [&](int64_t t, int64_t i, auto lanes) {
    return (load(x.row(t) + i, lanes) - Vec::broadcast(mean[t])) * Vec::broadcast(inverseStd[t]);
  };
  forRanges(queue, x.rows, width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* dOut = dy.row(t);
      float* dIn = dx.row(t);
      const auto g = [&](int64_t i, auto lanes) { return load(dOut + i, lanes) * load(gain + i, lanes); };
      const float sum = lanesSum(width, [&](Vec acc, int64_t i, auto lanes) { return acc + g(i, lanes); });
      const float dot =
          lanesSum(width, [&](Vec acc, int64_t i, auto lanes) { return fma(g(i, lanes), normed(t, i, lanes), acc); });
      const Vec a = Vec::broadcast(sum / static_cast<float>(width));
      const Vec minusB = Vec::broadcast(-(dot / static_cast<float>(width))), scale = Vec::broadcast(inverseStd[t]);
      eachVector(width, [&](int64_t i, auto lanes) {
        const Vec inner = fma(minusB, normed(t, i, lanes), g(i, lanes) - a);
        store(dIn + i, fma(scale, inner, load(dIn + i, lanes)), lanes);
      });
    }
  });
  forColumns(queue, x.rows, width, [&](int64_t begin, int64_t end) {
    columnChains(x.rows, begin, end, dGain, [&](Vec acc, int64_t t, int64_t i, auto lanes) {
      return fma(load(dy.row(t) + i, lanes), normed(t, i, lanes), acc);
    });
    columnChains(x.rows, begin, end, dBias,
                 [&](Vec acc, int64_t t, int64_t i, auto lanes) { return acc + load(dy.row(t) + i, lanes); });
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
