// Memory that is not what, or where, the program takes it for.
#include "faults.h"
#include "pages.h"

namespace lockstep::emulation {

namespace {

constexpr int kCount = 64;

template <bool kBroken>
__global__ void addTo(float* out) {
  const unsigned i = threadIdx.x;
  out[i] = (kBroken ? out[i] : 0) + static_cast<float>(i);
}

__global__ void dynamicShared(float* out) {
  float* row = shared_memory<float>();
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = row[threadIdx.x];
}

template <bool kBroken>
__global__ void copyTile(const float* in, float* out) {
  __shared__ Shared<float[4 * kCount + 4]> tile;
  const unsigned t = threadIdx.x;
  cp_async_16(&tile[4 * t + (kBroken ? 1 : 0)], in + 4 * t);
  cp_async_commit();
  cp_async_wait<0>();
  for (unsigned i = 0; i < 4; ++i) out[4 * t + i] = tile[4 * t + i];
}

float same(int i) {
  return static_cast<float>(i);
}

bool uninitialised(bool broken) {
  const DeviceFloats out(kCount);
  launch(broken ? addTo<true> : addTo<false>, 1, kCount, 0, nullptr, out.data());
  return holds(out, kCount, same);
}

bool misaligned(bool broken) {
  std::vector<float> values(4 * kCount);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const DeviceFloats in(values), out(values.size());
  launch(broken ? copyTile<true> : copyTile<false>, 1, kCount, 0, nullptr, in.data(), out.data());
  return holds(out, values.size(), same);
}

bool tooMuchShared(bool broken) {
  const DeviceFloats out(kCount);
  launch(dynamicShared, 1, kCount, (broken ? 164 : 163) * size_t{1024}, nullptr, out.data());
  return holds(out, kCount, same);
}

bool tooManyThreads(bool broken) {
  const DeviceFloats out(2048);
  launch(addTo<false>, 1, broken ? 1025 : 1024, 0, nullptr, out.data());
  return holds(out, 1024, same);
}

bool hostReads(bool broken) {
  const DeviceFloats out(std::vector<float>(kCount, 3.0f));
  const volatile float* const direct = out.data();
  return (broken ? direct[5] : out.fetch()[5]) == 3.0f;
}

bool hostWrites(bool broken) {
  const DeviceFloats out(std::vector<float>(kCount, 3.0f));
  if (broken) *const_cast<volatile float*>(out.data()) = 3.0f;
  return out.fetch()[0] == 3.0f;
}

// Neither addresses nor what lies behind them are given back in part.
bool partOfPages(bool broken) {
  size_t grain = 0;
  char* at = nullptr;
  check(cuda::pages::grain(0, &grain));
  check(cuda::pages::reserve(&at, 2 * grain));
  check(cuda::pages::map(0, at, 2 * grain));
  check(cuda::pages::unmap(at, (broken ? 1 : 2) * grain));
  check(cuda::pages::release(at, 2 * grain));
  return true;
}

bool partOfAddresses(bool broken) {
  size_t grain = 0;
  char* at = nullptr;
  check(cuda::pages::grain(0, &grain));
  check(cuda::pages::reserve(&at, 2 * grain));
  check(cuda::pages::release(at, (broken ? 1 : 2) * grain));
  return true;
}

}  // namespace

std::vector<Fault> memoryFaults() {
  return {
      {"device-memory-not-initialised", Found::kWrongResult, "", uninitialised},
      {"misaligned-copy", Found::kError, "misaligned address", misaligned},
      {"too-much-shared-memory", Found::kError, "invalid configuration", tooMuchShared},
      {"too-many-threads", Found::kError, "invalid configuration", tooManyThreads},
      {"pages-given-back-in-part", Found::kError, "invalid argument", partOfPages},
      {"addresses-given-back-in-part", Found::kError, "invalid argument", partOfAddresses},
      {"host-reads-device-memory", Found::kSignal, "", hostReads},
      {"host-writes-device-memory", Found::kSignal, "", hostWrites},
      // In a program of its own, out_of_bounds.cpp, which AddressSanitizer watches.
      {"write-out-of-bounds", Found::kReport, "heap-buffer-overflow", {}},
      {"shared-memory-out-of-bounds", Found::kReport, "heap-buffer-overflow", {}},
      {"copy-out-of-bounds", Found::kReport, "heap-buffer-overflow", {}},
  };
}

}  // namespace lockstep::emulation
