// The addon without CUDA.
#include "core/error.h"
#include "core/range.h"
#include "cuda/backend.h"

namespace lockstep {

void Range::begin(const char*) {}
void Range::end() {}

}  // namespace lockstep

namespace lockstep::cuda {

namespace {

constexpr const char* kNotBuilt =
    "this addon was built without CUDA; install the CUDA toolkit 13.0 (nvcc on PATH, or CUDA_PATH set to its root) and "
    "build again: npm run build:native -- --cuda";

}  // namespace

Status status() {
  return {"none", kNotBuilt, 0, 0, {}};
}

void requireGpu(int) {
  throw Error("CUDA_UNAVAILABLE", kNotBuilt);
}

MemoryInfo memoryInfo(int gpu) {
  requireGpu(gpu);
  return {0, 0};
}

Memory& memoryOf(int gpu) {
  requireGpu(gpu);
  return hostMemory();
}

std::unique_ptr<Queue> makeQueue(int gpu, int, size_t) {
  requireGpu(gpu);
  return nullptr;
}

}  // namespace lockstep::cuda
