// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a block of four random words
// as a function of a 128-bit counter and a 64-bit key, so that a draw depends on its name and never on what was drawn
// before.
#pragma once

#include <cstdint>

#include "kernels/math.h"

namespace lockstep::kernels {

struct PhiloxBlock {
  uint32_t words[4];
};

LOCKSTEP_INLINE PhiloxBlock philox(PhiloxBlock counter, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = counter.words[0], c1 = counter.words[1], c2 = counter.words[2], c3 = counter.words[3];
  for (int i = 0; i < 10; ++i) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The uniform number in (0, 1) that decides the token of (seed, request, position): (i + 1/2) / 2^52.
LOCKSTEP_INLINE double uniform(uint64_t seed, uint64_t request, uint32_t position) {
  const PhiloxBlock block =
      philox({{static_cast<uint32_t>(request), static_cast<uint32_t>(request >> 32), position, 0}}, seed);
  const uint64_t i = (uint64_t{block.words[0]} << 20) | (block.words[1] >> 12);
  return (static_cast<double>(i) + 0.5) * 0x1p-52;
}

}  // namespace lockstep::kernels
