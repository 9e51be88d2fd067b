// Ceilings that the benches measure in the same call as a kernel: what a number is a fraction of.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace lockstep::kernels {

struct Ceiling {
  // Register-only multiply-adds (VDPBF16PS when `pairs` and the CPU has it), and how many a call makes.
  float (*multiplyAdds)(int64_t rounds, bool pairs);
  int64_t (*multiplyAddsOf)(int64_t rounds, bool pairs);
  // Adds up count floats (a multiple of 128), in four streams.
  float (*readAll)(const float* data, int64_t count);
};

// Of a table that cpuKernels returned; the reference has none: throws Error("BENCH_REFERENCE").
const Ceiling& ceilingOf(const Kernels&);

}  // namespace lockstep::kernels
