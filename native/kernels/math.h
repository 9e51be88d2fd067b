// Elementary functions, each one expression written for a value type V: `float` in the reference and in per-row code,
// 16 lanes (`Vec` of cpu/simd.h) in the fast kernels. Every instruction set evaluates the same roundings, so bits
// agree.
//
// V has + - * / and, found by its type: fma(a, b, c) = a b + c rounded once; broadcast<V>(float);
// selectLessEqual(a, b, x, y) = a <= b ? x : y with NaN on the right; addToExponent(p, t): the bits of p plus the
// lowest nine bits of t shifted into sign and exponent. FTZ and DAZ are set on the thread that calls.
//
// Everything here is force-inlined: a copy compiled for AVX-512 must not be shared with code that runs without it.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

// device.h of CUDA says so as well, of both halves.
#ifndef LOCKSTEP_INLINE
#define LOCKSTEP_INLINE static inline __attribute__((always_inline))
#endif

namespace lockstep::kernels {

LOCKSTEP_INLINE float fma(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
LOCKSTEP_INLINE float selectLessEqual(float a, float b, float x, float y) {
  return a <= b ? x : y;
}
LOCKSTEP_INLINE float addToExponent(float p, float t) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(t) << 23));
}
// As the vector instruction: the right operand when either is NaN.
LOCKSTEP_INLINE float maximum(float a, float b) {
  return a > b ? a : b;
}

template <class V>
LOCKSTEP_INLINE V broadcast(float x) {
  if constexpr (std::is_same_v<V, float>) {
    return x;
  } else {
    return V::broadcast(x);
  }
}

// e^x within 1.1 ulp. 0 below -87.33 (where the result would be a denormal) and at -inf; inf above 88.7228; NaN at NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; n is found by adding 1.5 * 2^23, which leaves it in the low bits of t.
template <class V>
LOCKSTEP_INLINE V exp(V x) {
  const V magic = broadcast<V>(12582912.0f);
  const V t = fma(x, broadcast<V>(1.442695041f), magic);
  const V n = t - magic;
  const V r = fma(n, broadcast<V>(1.904654299958e-9f), fma(n, broadcast<V>(-0.693147182464599609375f), x));
  V p = fma(broadcast<V>(0.001381446491f), r, broadcast<V>(0.008368780836f));
  p = fma(p, r, broadcast<V>(0.04166839272f));
  p = fma(p, r, broadcast<V>(0.1666651964f));
  p = fma(p, r, broadcast<V>(0.4999999404f));
  p = fma(p, r * r, r) + broadcast<V>(1.0f);
  const V finite = selectLessEqual(x, broadcast<V>(-87.33f), broadcast<V>(0.0f), addToExponent(p, t));
  return selectLessEqual(x, broadcast<V>(88.722839f), finite, x + broadcast<V>(std::numeric_limits<float>::infinity()));
}

// ln x within 1 ulp for positive normal x. -inf at zero and denormals, NaN below, inf at inf, NaN at NaN.
// x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)]; s = f / (2 + f); ln(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2)).
LOCKSTEP_INLINE float log(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000u) == 0) return -std::numeric_limits<float>::infinity();
  if (bits >= 0x7f800000u) return bits == 0x7f800000u ? x : std::numeric_limits<float>::quiet_NaN();
  const uint32_t shifted = bits - 0x3f3504f3u;
  const float k = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = std::bit_cast<float>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float s = f / (2.0f + f), z = s * s, half = 0.5f * f * f;
  const float tail = fma(fma(0.2996174693f, z, 0.3997358382f), z, 0.6666681767f) * z;
  const float correction = fma(s, half + tail, k * -1.904654299958e-9f);
  return fma(k, 0.693147182464599609375f, f - (half - correction));
}

// 1 / (1 + e^-x): the logistic function.
template <class V>
LOCKSTEP_INLINE V sigmoid(V x) {
  return broadcast<V>(1.0f) / (broadcast<V>(1.0f) + exp(broadcast<V>(0.0f) - x));
}

template <class V>
LOCKSTEP_INLINE V silu(V x) {
  return x / (broadcast<V>(1.0f) + exp(broadcast<V>(0.0f) - x));
}

// d silu / dx = sigma (1 + x (1 - sigma)).
template <class V>
LOCKSTEP_INLINE V siluDerivative(V x) {
  const V one = broadcast<V>(1.0f);
  const V sigma = sigmoid(x);
  return sigma * fma(x, one - sigma, one);
}

// The argument of the logistic form of GELU: 2 sqrt(2/pi) (x + 0.044715 x^3).
template <class V>
LOCKSTEP_INLINE V geluArgument(V x) {
  return x * fma(x * x, broadcast<V>(0.0713548163f), broadcast<V>(1.5957691216f));
}

// gelu_tanh(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x sigma(2 sqrt(2/pi) (x + 0.044715 x^3)).
template <class V>
LOCKSTEP_INLINE V geluTanh(V x) {
  return x / (broadcast<V>(1.0f) + exp(broadcast<V>(0.0f) - geluArgument(x)));
}

// d gelu_tanh / dx = sigma + x sigma (1 - sigma) 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2).
template <class V>
LOCKSTEP_INLINE V geluTanhDerivative(V x) {
  const V one = broadcast<V>(1.0f);
  const V sigma = sigmoid(geluArgument(x));
  const V slope = fma(x * x, broadcast<V>(0.2140644488f), broadcast<V>(1.5957691216f));
  return fma(x * slope, sigma * (one - sigma), sigma);
}

// 1 / sqrt(mean + eps), both operations IEEE.
LOCKSTEP_INLINE float inverseRoot(float meanSquare, float eps) {
  return 1.0f / ::sqrtf(meanSquare + eps);
}

}  // namespace lockstep::kernels
