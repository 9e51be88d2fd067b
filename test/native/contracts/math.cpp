// Contracts of the elementary functions and of the random numbers: they hold for every implementation alike.
#include "kernels/math.h"

#include <bit>
#include <cmath>

#include "harness.h"
#include "kernels/philox.h"

namespace lockstep::contracts {
namespace {

// |got - exact| in units of the last place of `exact` as a float32.
double ulps(float got, double exact) {
  int exponent = 0;
  std::frexp(static_cast<float>(exact), &exponent);
  return std::fabs(got - exact) / std::ldexp(1.0, exponent - 24);
}

void expectUlps(Trial& t, const std::string& what, float x, float got, double exact) {
  if (ulps(got, exact) <= 1.1) return;
  t.fail(what + "(" + std::to_string(x) + "): " + std::to_string(ulps(got, exact)) + " units in the last place");
}

void expectBits(Trial& t, const std::string& what, uint32_t expected, uint32_t actual) {
  if (expected != actual) t.fail(what + ": expected " + std::to_string(expected) + ", got " + std::to_string(actual));
}

const Registration kElementary("math", DType::kFloat32, 4, [](Trial& t) {
  for (int i = 0; i < 200000; ++i) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(t.random()()));
    if (x > -87.33f && x < 88.7228f) expectUlps(t, "exp", x, kernels::exp(x), std::exp(static_cast<double>(x)));
    const float near = t.number(static_cast<float>(t.pick({1, 20, 80})));
    expectUlps(t, "exp", near, kernels::exp(near), std::exp(static_cast<double>(near)));
    if (x >= 1.17549435e-38f && x <= 3.4e38f)
      expectUlps(t, "log", x, kernels::log(x), std::log(static_cast<double>(x)));
    const float one = 1 + 0.4f * t.number();
    expectUlps(t, "log", one, kernels::log(one), std::log(static_cast<double>(one)));
  }
  const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
  expectBits(t, "exp(-inf)", bits(0.0f), bits(kernels::exp(-INFINITY)));
  expectBits(t, "exp(-88)", bits(0.0f), bits(kernels::exp(-88.0f)));
  expectBits(t, "exp(0)", bits(1.0f), bits(kernels::exp(0.0f)));
  expectBits(t, "exp(89)", bits(INFINITY), bits(kernels::exp(89.0f)));
  expectBits(t, "exp(inf)", bits(INFINITY), bits(kernels::exp(INFINITY)));
  expectBits(t, "log(0)", bits(-INFINITY), bits(kernels::log(0.0f)));
  expectBits(t, "log(1)", bits(0.0f), bits(kernels::log(1.0f)));
  expectBits(t, "log(inf)", bits(INFINITY), bits(kernels::log(INFINITY)));
  if (!std::isnan(kernels::exp(NAN)) || !std::isnan(kernels::log(NAN)) || !std::isnan(kernels::log(-1.0f))) {
    t.fail("NaN does not stay NaN");
  }
});

// The known answers published with the Random123 library.
const Registration kPhilox("philox", DType::kFloat32, 1, [](Trial& t) {
  struct Answer {
    kernels::PhiloxBlock counter;
    uint64_t key;
    kernels::PhiloxBlock block;
  };
  const Answer answers[] = {
      {{{0, 0, 0, 0}}, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
      {{{~0u, ~0u, ~0u, ~0u}}, ~uint64_t{0}, {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       0x299f31d0a4093822u,
       {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}},
  };
  for (const Answer& answer : answers) {
    const kernels::PhiloxBlock block = kernels::philox(answer.counter, answer.key);
    for (int i = 0; i < 4; ++i) expectBits(t, "word " + std::to_string(i), answer.block.words[i], block.words[i]);
  }
  // A name decides a number, and every part of the name counts.
  const double u = kernels::uniform(1, 2, 3);
  if (u != kernels::uniform(1, 2, 3)) t.fail("a draw does not repeat");
  for (const double other :
       {kernels::uniform(2, 2, 3), kernels::uniform(uint64_t{1} << 32 | 1, 2, 3), kernels::uniform(1, 3, 3),
        kernels::uniform(1, uint64_t{1} << 32 | 2, 3), kernels::uniform(1, 2, 4)}) {
    if (u == other || !(other > 0 && other < 1)) t.fail("draws of different names agree or leave (0, 1)");
  }
});

}  // namespace
}  // namespace lockstep::contracts
