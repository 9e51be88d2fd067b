// Streams and the host that do not wait for each other. The emulation finds them when streams work as late as they may.
#include <thread>

#include "faults.h"

namespace lockstep::emulation {

namespace {

constexpr int kCount = 64;

__global__ void fill(float* out, float value) {
  out[threadIdx.x] = value;
}

__global__ void add(float* out, const float* in) {
  out[threadIdx.x] += in[threadIdx.x];
}

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

std::vector<float> copyOut(const DeviceFloats& from, cudaStream_t stream) {
  std::vector<float> result(kCount, 0.0f);
  check(cudaMemcpyAsync(result.data(), from.data(), from.bytes(), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  return result;
}

// One stream computes, another sends the result.
bool eventNotAwaited(bool broken) {
  const Stream computing, sending;
  const Event computed;
  const DeviceFloats x(std::vector<float>(kCount, 1.0f));
  launch(fill, 1, kCount, 0, computing, x.data(), 7.0f);
  check(cudaEventRecord(computed, computing));
  if (!broken) check(cudaStreamWaitEvent(sending, computed));
  return copyOut(x, sending)[kCount - 1] == 7.0f;
}

// An event stands for what its stream had been given when it was recorded.
bool eventRecordedTooEarly(bool broken) {
  const Stream computing, sending;
  const Event computed;
  const DeviceFloats x(std::vector<float>(kCount, 1.0f));
  if (broken) check(cudaEventRecord(computed, computing));
  launch(fill, 1, kCount, 0, computing, x.data(), 7.0f);
  if (!broken) check(cudaEventRecord(computed, computing));
  check(cudaStreamWaitEvent(sending, computed));
  return copyOut(x, sending)[kCount - 1] == 7.0f;
}

// What a stream reads is overwritten by another one.
bool overwrittenByAnotherStream(bool broken) {
  const Stream first, second;
  const Event read;
  const DeviceFloats sum(std::vector<float>(kCount, 1.0f)), x(std::vector<float>(kCount, 2.0f));
  launch(add, 1, kCount, 0, first, sum.data(), static_cast<const float*>(x.data()));
  check(cudaEventRecord(read, first));
  if (!broken) check(cudaStreamWaitEvent(second, read));
  launch(fill, 1, kCount, 0, second, x.data(), 9.0f);
  check(cudaStreamSynchronize(second));
  return copyOut(sum, first)[0] == 3.0f;
}

bool hostDoesNotWait(bool broken) {
  const Stream stream;
  const DeviceFloats x(std::vector<float>(kCount, 1.0f));
  std::vector<float> result(kCount, 0.0f);
  launch(fill, 1, kCount, 0, stream, x.data(), 7.0f);
  check(cudaMemcpyAsync(result.data(), x.data(), x.bytes(), cudaMemcpyDeviceToHost, stream));
  if (!broken) check(cudaStreamSynchronize(stream));
  const bool right = result[0] == 7.0f;
  check(cudaStreamSynchronize(stream));
  return right;
}

// Pinned memory is read when the copy's turn comes, not when it is asked for.
bool sourceChangedTooEarly(bool broken) {
  const Stream stream;
  const DeviceFloats x(kCount);
  float* pinned = nullptr;
  check(cudaHostAlloc(reinterpret_cast<void**>(&pinned), x.bytes(), cudaHostAllocPortable));
  std::fill(pinned, pinned + kCount, 5.0f);
  check(cudaMemcpyAsync(x.data(), pinned, x.bytes(), cudaMemcpyHostToDevice, stream));
  if (!broken) check(cudaStreamSynchronize(stream));
  std::fill(pinned, pinned + kCount, 6.0f);
  const bool right = copyOut(x, stream)[0] == 5.0f;
  check(cudaFreeHost(pinned));
  return right;
}

// Whoever waits for the whole GPU while a stream of it is captured spoils the capture.
bool waitsWhileCapturing(bool broken) {
  const Stream stream;
  const DeviceFloats x(std::vector<float>(kCount, 1.0f));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t made = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  launch(fill, 1, kCount, 0, stream, x.data(), 7.0f);
  if (broken) std::thread([] { cudaDeviceSynchronize(); }).join();
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&made, graph, 0));
  check(cudaGraphLaunch(made, stream));
  const bool right = copyOut(x, stream)[0] == 7.0f;
  check(cudaGraphExecDestroy(made));
  check(cudaGraphDestroy(graph));
  return right;
}

}  // namespace

std::vector<Fault> streamFaults() {
  return {
      {"event-not-awaited", Found::kWrongResult, "", eventNotAwaited},
      {"event-recorded-too-early", Found::kWrongResult, "", eventRecordedTooEarly},
      {"overwritten-by-another-stream", Found::kWrongResult, "", overwrittenByAnotherStream},
      {"host-does-not-wait", Found::kWrongResult, "", hostDoesNotWait},
      {"source-changed-too-early", Found::kWrongResult, "", sourceChangedTooEarly},
      {"waits-for-the-gpu-while-capturing", Found::kError, "previous error during capture", waitsWhileCapturing},
  };
}

}  // namespace lockstep::emulation
