// What the contract suite needs to know of the machine. hardware/testing.h has the same names.
#pragma once

#include <cstdlib>

#include "cuda/emulation/machine.h"

namespace lockstep::cuda::testing {

// Orders in which the threads and copies of a kernel may run.
constexpr int kSchedules = 3;
inline void setSchedule(int schedule) {
  emulated::machine.schedule = static_cast<emulated::Schedule>(schedule);
}
// Memory that host and kernels may touch, 64-byte aligned, nothing spare at the end.
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  return posix_memalign(&memory, 64, bytes) == 0 ? memory : nullptr;
}
inline void free(void* memory) {
  std::free(memory);
}

}  // namespace lockstep::cuda::testing
