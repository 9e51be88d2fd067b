// Ceilings that the benches measure in the same call as a kernel: what a number is a fraction of.
#pragma once

#include <cstdint>

#include "core/queue.h"
#include "kernels/kernels.h"

namespace lockstep::kernels {

struct Ceiling {
  // Register-only multiply-adds by everything that computes for a queue; returns how many. Those of bfloat16 by the
  // instruction that products use: VDPBF16PS where the CPU has it, `mma` of a GPU's tensor cores.
  double (*multiplyAdds)(Queue&, DType);
  // Reads count floats (a multiple of 4096 per thread) of the device's memory.
  void (*readAll)(Queue&, const float* data, int64_t count);
};

// Of a table that cpuKernels or cudaKernels returned; the reference has none: throws Error("BENCH_REFERENCE").
const Ceiling& ceilingOf(const Kernels&);

// Of a GPU; null in an addon without CUDA.
const Ceiling* cudaCeiling();

}  // namespace lockstep::kernels
