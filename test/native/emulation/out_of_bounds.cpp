// emulation_faults_asan NAME correct|broken : accesses out of bounds, for AddressSanitizer to find. Exit 0: the result
// is right under every order of threads; another status: it is not, or the sanitizer has reported.
#include <cstdio>

#include "faults.h"

namespace lockstep::emulation {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw Error("CUDA_FAILED", cudaGetErrorString(error));
}

namespace {

constexpr int kCount = 100, kThreads = 64;

template <bool kBroken>
__global__ void write(float* out) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i < kCount + (kBroken ? 1 : 0)) out[i] = static_cast<float>(i);
}

template <bool kBroken>
__global__ void readShared(float* out) {
  __shared__ Shared<float[kThreads]> row;
  const int t = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x) * kThreads + t;
  row[t] = static_cast<float>(i);
  __syncthreads();
  const int from = kBroken ? t + 1 : t;
  if (i < kCount) out[i] = row[from];
}

template <bool kBroken>
bool runKernel(const std::string& name) {
  const DeviceFloats out(kCount);
  launch(name == "write-out-of-bounds" ? write<kBroken> : readShared<kBroken>, 2, kThreads, 0, nullptr, out.data());
  return holds(out, kCount, [](int i) { return static_cast<float>(i); });
}

bool runCopy(bool broken) {
  const DeviceFloats from(std::vector<float>(kCount, 1.0f)), to(kCount);
  check(cudaMemcpyAsync(to.data(), from.data(), from.bytes() + (broken ? 4 : 0), cudaMemcpyDeviceToDevice, nullptr));
  return holds(to, kCount, [](int) { return 1.0f; });
}

bool run(const std::string& name, bool broken) {
  if (name == "copy-out-of-bounds") return runCopy(broken);
  return broken ? runKernel<true>(name) : runKernel<false>(name);
}

}  // namespace
}  // namespace lockstep::emulation

int main(int count, char** arguments) {
  if (count != 3) return 2;
  bool right = true;
  for (const auto schedule : {emulated::Schedule::forward, emulated::Schedule::reverse, emulated::Schedule::random}) {
    emulated::machine.schedule = schedule;
    right = lockstep::emulation::run(arguments[1], arguments[2] == std::string("broken")) && right;
  }
  return right ? 0 : 1;
}
