// Before an instruction set is used: its products against the scalar form, bit for bit.
#include "kernels/cpu/self_check.h"

#include "core/thread_pool.h"
#include "kernels/cpu/rows.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

// 1,000 vectors of 16 random operands each through fma, dotPair, exp and both roundings. FTZ and DAZ are set for its
// time.
bool selfCheck() {
  const unsigned int control = _mm_getcsr();
  flushDenormals();
  uint32_t state = 12345;
  const auto random = [&] {
    state = state * 1664525u + 1013904223u;
    // Sign, 16 binades around 1, fraction.
    return std::bit_cast<float>((state & 0x807fffffu) | ((119u + (state >> 23 & 15u)) << 23));
  };
  bool equal = true;
  for (int round = 0; round < 1000; ++round) {
    float a[16], b[16], c[16], got[16];
    BFloat16 pa[32], pb[32], rounded[16];
    for (int i = 0; i < 16; ++i) {
      a[i] = random();
      b[i] = random();
      c[i] = random();
      pa[2 * i] = toBFloat16(random());
      pa[2 * i + 1] = toBFloat16(random());
      pb[2 * i] = toBFloat16(random());
      pb[2 * i + 1] = toBFloat16(random());
    }
    storeu(got, fma(loadu(a), loadu(b), loadu(c)));
    for (int i = 0; i < 16; ++i) equal = equal && got[i] == fma(a[i], b[i], c[i]);
    storeu(got, dotPair(loadu(c), loadPairs(pa), loadPairs(pb)));
    for (int i = 0; i < 16; ++i) {
      const float odd = fma(toFloat(pa[2 * i + 1]), toFloat(pb[2 * i + 1]), c[i]);
      equal = equal && got[i] == fma(toFloat(pa[2 * i]), toFloat(pb[2 * i]), odd);
    }
    storeu(got, exp(loadu(a)));
    for (int i = 0; i < 16; ++i) equal = equal && got[i] == exp(a[i]);
    storeu(rounded, loadu(a));
    for (int i = 0; i < 16; ++i) equal = equal && rounded[i].bits == toBFloat16(a[i]).bits;
  }
  _mm_setcsr(control);
  return equal;
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
