// Compute dtypes and the one rounding rule: float32 to bfloat16 is round-to-nearest-even, denormals flushed to zero.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace lockstep {

enum class DType : uint8_t { kFloat32, kBFloat16 };

constexpr size_t bytesOf(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

struct BFloat16 {
  uint16_t bits;
};

constexpr float toFloat(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
constexpr float toFloat(float x) {
  return x;
}

// NaN stays NaN (quiet); denormal inputs give a zero of the same sign, as VCVTNEPS2BF16 does.
constexpr BFloat16 toBFloat16(float x) {
  uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7f800000u) == 0) return {static_cast<uint16_t>((u >> 16) & 0x8000u)};
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

}  // namespace lockstep
