// GPUs as the rest of the addon sees them: no CUDA header beyond this one. Three makers of it: device.cpp with nvcc's
// headers or with those of the emulation, and none.cpp where the addon was built without CUDA.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/memory.h"
#include "core/queue.h"

namespace lockstep::cuda {

struct Gpu {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t memoryBytes;
};

struct Status {
  std::string build;    // "none", "hardware" or "emulated"
  std::string problem;  // why no GPU can be used, and what to do; empty when one can
  int driver, runtime;  // CUDA versions, 1000 major + 10 minor; 0: none
  std::vector<Gpu> gpus;
};

// What there is; never throws.
Status status();

// Throws Error("CUDA_UNAVAILABLE") with status().problem, Error("CUDA_DEVICE") for a GPU that is not there, and
// Error("CUDA_ARCHITECTURE") for one that the kernels were not compiled for.
void requireGpu(int gpu);
// Bytes of a GPU that nobody uses, and all that it has. Throws as requireGpu.
struct MemoryInfo {
  int64_t free, total;
};
MemoryInfo memoryInfo(int gpu);
// Of a GPU; as long as the process lives. Throws as requireGpu.
Memory& memoryOf(int gpu);
// A stream of a GPU, with `threads` threads for what the host does meanwhile. Throws as requireGpu.
std::unique_ptr<Queue> makeQueue(int gpu, int threads, size_t hostScratchBytes);

}  // namespace lockstep::cuda
