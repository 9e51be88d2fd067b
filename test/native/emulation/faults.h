// Planted bugs: what the emulation of GPUs is there to find. Every fault is written once, correct and broken; the
// correct form must give the right result under every order of threads, copies and streams, the broken one must be
// found under one of them, in the way that it names.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <string>
#include <vector>

#include "device.h"

namespace lockstep::emulation {

// How the broken form shows.
enum class Found {
  kWrongResult,
  kError,   // the text of the error holds `text`
  kSignal,  // the process dies of SIGSEGV
  kReport,  // emulation_faults_asan dies with a report that holds `text`
};

struct Fault {
  std::string name;
  Found found;
  std::string text;
  std::function<bool(bool broken)> run;  // whether the result is right
};

std::vector<Fault> threadFaults();
std::vector<Fault> memoryFaults();
std::vector<Fault> streamFaults();

// Throws lockstep::Error with the text of what went wrong.
void check(cudaError_t error);

// `count` numbers in device memory, NaN at first.
class DeviceFloats {
 public:
  explicit DeviceFloats(size_t count) : count_(count) { check(cudaMalloc(reinterpret_cast<void**>(&data_), bytes())); }
  explicit DeviceFloats(const std::vector<float>& values) : DeviceFloats(values.size()) {
    check(cudaMemcpyAsync(data_, values.data(), bytes(), cudaMemcpyHostToDevice, nullptr));
    check(cudaStreamSynchronize(nullptr));
  }
  ~DeviceFloats() { cudaFree(data_); }
  DeviceFloats(const DeviceFloats&) = delete;
  DeviceFloats& operator=(const DeviceFloats&) = delete;

  float* data() const { return data_; }
  size_t bytes() const { return count_ * sizeof(float); }
  // After what the default stream has been given.
  std::vector<float> fetch() const {
    std::vector<float> values(count_);
    check(cudaMemcpyAsync(values.data(), data_, bytes(), cudaMemcpyDeviceToHost, nullptr));
    check(cudaStreamSynchronize(nullptr));
    return values;
  }

 private:
  size_t count_;
  float* data_ = nullptr;
};

// Whether value(i) is what the device has, for all `count`.
template <class Value>
bool holds(const DeviceFloats& device, size_t count, const Value& value) {
  const std::vector<float> actual = device.fetch();
  for (size_t i = 0; i < count; ++i) {
    if (!(actual[i] == value(static_cast<int>(i)))) return false;
  }
  return true;
}

}  // namespace lockstep::emulation
