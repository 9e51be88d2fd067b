// The part of the CUDA runtime that the back end uses, on host memory; device memory starts as NaN. Streams are queues.
// `eager` runs work as it is queued; `lazy` runs it when something synchronises with it, so what a stream should wait
// for, and does not, has not happened yet. What a kernel did wrong is the text of cudaErrorLaunchFailure.
//
// The environment injects faults and sets the scene:
//   LOCKSTEP_EMULATION_DEVICES   how many GPUs there are (default 8)
//   LOCKSTEP_EMULATION_FAULT     no-driver | old-driver | old-architecture | mixed | lost |
//                                no-nccl | nccl-init | nccl-call | nccl-later (of rank 1 of a group)
//   LOCKSTEP_EMULATION_MEMORY    bytes of a GPU's memory (default 64 GiB, of which the host gives what is used)
//   LOCKSTEP_EMULATION_TIMING    eager | lazy
//   LOCKSTEP_EMULATION_RANGES    a file for the ranges of threads (nvtx.h)
#pragma once

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <string_view>

#include "cuda/emulation/machine.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidPitchValue = 12,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2;
constexpr unsigned cudaHostAllocPortable = 1, cudaHostRegisterPortable = 1;

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  std::size_t totalGlobalMem;
};
struct cudaPointerAttributes {
  cudaMemoryType type;
};

namespace emulated {

inline std::string_view setting(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string_view{} : std::string_view{value};
}
inline bool fault(std::string_view name) {
  return setting("LOCKSTEP_EMULATION_FAULT") == name;
}

enum class Timing { eager, lazy };
struct Stream {
  std::deque<std::function<bool()>> queue;  // false: not yet, ask again (what other ranks have to join, say)
  std::uint64_t queued = 0, done = 0;
  std::vector<std::function<void()>>* capturing = nullptr;  // a graph in the making
  bool spoilt = false;                                      // it
  int device = 0;
};
struct Event {  // the stream's first `at` operations
  Stream* stream;
  std::uint64_t at;
  bool timed = false;
  std::shared_ptr<std::int64_t> time = nullptr;  // nanoseconds; 0 until the stream is there
};

inline Timing timing = setting("LOCKSTEP_EMULATION_TIMING") == "lazy" ? Timing::lazy : Timing::eager;
inline std::string failure;    // sticks, as it does on a GPU
inline Stream default_stream;  // a stream like any other
inline std::vector<Stream*> streams{&default_stream};
inline thread_local int device = 0;
struct Taken {
  std::size_t bytes;
  int device;
};
inline std::map<const char*, Taken> device_memory;  // what is taken of it, by its first byte
inline std::map<int, std::size_t> used_memory;      // of each GPU

inline std::size_t total_memory() {
  const auto set = setting("LOCKSTEP_EMULATION_MEMORY");
  return set.empty() ? std::size_t{64} << 30 : std::strtoull(set.data(), nullptr, 10);
}
// What a GPU gives for so many bytes: pages of 2 MiB, of which small blocks share one.
inline std::size_t given(std::size_t bytes) {
  constexpr std::size_t kPage = std::size_t{2} << 20;
  return bytes <= kPage / 2 ? bytes : (bytes + kPage - 1) / kPage * kPage;
}
inline bool has_memory(int gpu, std::size_t bytes) {
  std::lock_guard lock(machine.mutex);
  return used_memory[gpu] + given(bytes) <= total_memory();
}
inline void take_memory(int gpu, const void* at, std::size_t bytes) {
  std::lock_guard lock(machine.mutex);
  device_memory[static_cast<const char*>(at)] = {bytes, gpu};
  used_memory[gpu] += given(bytes);
}
inline void give_memory(const void* at) {
  std::lock_guard lock(machine.mutex);
  const auto block = device_memory.find(static_cast<const char*>(at));
  used_memory[block->second.device] -= given(block->second.bytes);
  device_memory.erase(block);
}

// As far as it goes: cudaErrorNotReady when an operation can not run yet. At most what is queued now.
inline cudaError_t run_until(Stream& stream, std::uint64_t at) {
  std::lock_guard lock(machine.mutex);
  at = std::min(at, stream.queued);
  if (failure.empty() && fault("lost")) failure = "the GPU has fallen off the bus (injected)";
  while (stream.done < at) {
    try {
      if (failure.empty() && !stream.queue.front()()) return cudaErrorNotReady;
    } catch (const std::exception& error) {
      failure = error.what();
    }
    stream.queue.pop_front(), stream.done++;
  }
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
// The same, and waits for what is not ready; the caller must not hold machine.mutex.
inline cudaError_t finish(Stream& stream, std::uint64_t at) {
  {
    std::lock_guard lock(machine.mutex);
    at = std::min(at, stream.queued);
  }
  cudaError_t error;
  while ((error = run_until(stream, at)) == cudaErrorNotReady) sched_yield();
  return error;
}
inline cudaError_t enqueue_until(Stream* stream, std::function<bool()> operation) {
  std::lock_guard lock(machine.mutex);
  if (!stream) stream = &default_stream;
  if (stream->spoilt) return cudaErrorStreamCaptureInvalidated;
  if (stream->capturing) return stream->capturing->push_back(std::move(operation)), cudaSuccess;
  stream->queue.push_back(std::move(operation)), stream->queued++;
  const cudaError_t error = run_until(*stream, timing == Timing::eager ? stream->queued : 0);
  return error == cudaErrorNotReady ? cudaSuccess : error;
}
inline cudaError_t enqueue(Stream* stream, std::function<void()> operation) {
  return enqueue_until(stream, [operation = std::move(operation)] { return operation(), true; });
}

// What must not wait for a stream that is captured, and does, whichever thread it is of, spoils the capture.
inline bool spoils(Stream* stream) {
  std::lock_guard lock(machine.mutex);
  return stream && stream->capturing && (stream->spoilt = true);
}

inline void copy_rows(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                      std::size_t rows) {
  const DeviceAccess access;
  for (std::size_t r = 0; r < rows; r++)
    std::memcpy(static_cast<char*>(to) + r * to_pitch, static_cast<const char*>(from) + r * from_pitch, width);
}

}  // namespace emulated

using cudaStream_t = emulated::Stream*;
using cudaEvent_t = emulated::Event*;
using cudaGraph_t = std::vector<std::function<void()>>*;
using cudaGraphExec_t = std::vector<std::function<void()>>*;
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal };

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  std::lock_guard lock(emulated::machine.mutex);
  return stream->capturing = new std::vector<std::function<void()>>, cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  std::lock_guard lock(emulated::machine.mutex);
  *graph = std::exchange(stream->capturing, nullptr);
  if (!std::exchange(stream->spoilt, false)) return cudaSuccess;
  return delete std::exchange(*graph, nullptr), cudaErrorStreamCaptureInvalidated;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  return *exec = new std::vector<std::function<void()>>(*graph), cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return delete graph, cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return delete exec, cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return emulated::enqueue(stream, [operations = *exec] {
    for (const auto& operation : operations) operation();
  });
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  if (emulated::fault("no-driver")) return cudaErrorInsufficientDriver;  // leaves the count alone, as the real one does
  if (emulated::fault("old-driver")) return cudaErrorInsufficientDriver;
  const auto set = emulated::setting("LOCKSTEP_EMULATION_DEVICES");
  *count = set.empty() ? 8 : std::atoi(set.data());
  return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  return *version = emulated::fault("no-driver") ? 0 : emulated::fault("old-driver") ? 12080 : 13000, cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  return *version = 13000, cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {"emulated sm_80", 8, 0, 4, emulated::total_memory()};
  if (emulated::fault("old-architecture")) properties->major = 7, properties->minor = 5;
  if (emulated::fault("mixed") && device % 2 == 1) properties->major = 9;
  if (properties->major != 8)
    std::snprintf(properties->name, sizeof properties->name, "emulated sm_%d%d", properties->major, properties->minor);
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return emulated::device = device, cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  return *device = emulated::device, cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  std::lock_guard lock(emulated::machine.mutex);
  *total = emulated::total_memory();
  return *free = *total - std::min(*total, emulated::used_memory[emulated::device]), cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return emulated::failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidPitchValue:
      return "invalid pitch argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    default:
      return emulated::failure.c_str();
  }
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (emulated::spoils(stream)) return cudaErrorStreamCaptureUnsupported;
  return emulated::finish(stream ? *stream : emulated::default_stream, ~0ull);
}
inline cudaError_t cudaStreamQuery(cudaStream_t stream) {
  std::lock_guard lock(emulated::machine.mutex);
  const cudaError_t error = emulated::run_until(stream ? *stream : emulated::default_stream, ~0ull);
  if (error != cudaErrorNotReady) return error;
  // Streams of a GPU go on by themselves, whoever asks: what this one waits for may be on another.
  for (auto* other : emulated::streams) emulated::run_until(*other, ~0ull);
  return error;
}
// Waits for what all streams of the GPU were given, so for the ranks that it waits for; meanwhile other GPUs go on.
inline cudaError_t cudaDeviceSynchronize() {
  std::map<emulated::Stream*, std::uint64_t> given;
  {
    std::lock_guard lock(emulated::machine.mutex);
    for (auto* stream : emulated::streams) {
      if (stream->device != emulated::device) continue;
      if (emulated::spoils(stream)) return cudaErrorStreamCaptureUnsupported;
      given[stream] = stream->queued;
    }
  }
  for (bool done = false; !done; sched_yield()) {
    std::lock_guard lock(emulated::machine.mutex);
    done = true;
    for (auto* stream : emulated::streams) {
      const auto asked = given.find(stream);
      if (asked == given.end()) {
        emulated::run_until(*stream, ~0ull);
      } else if (emulated::run_until(*stream, asked->second) == cudaErrorNotReady) {
        done = false;
      }
    }
  }
  return cudaGetLastError();
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* data) {
  std::lock_guard lock(emulated::machine.mutex);
  const char* const at = static_cast<const char*>(data);
  auto after = emulated::device_memory.upper_bound(at);
  const bool inside = after != emulated::device_memory.begin() && (--after, at < after->first + after->second.bytes);
  return attributes->type = inside ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered, cudaSuccess;
}

// Whole pages, so that they can be protected; under a sanitizer exact blocks, so that overruns are seen.
inline cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  if (!emulated::has_memory(emulated::device, bytes)) return cudaErrorMemoryAllocation;
#ifdef __SANITIZE_ADDRESS__
  *data = emulated::allocate(bytes);
#else
  const std::size_t header = 4096, pages = (bytes + 4095) / 4096 * 4096;
  void* base = mmap(nullptr, header + pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return cudaErrorMemoryAllocation;
  *static_cast<std::size_t*>(base) = header + pages;
  *data = static_cast<char*>(base) + header;
  std::memset(*data, emulated::kPoison, bytes);
  emulated::DeviceAccess::protect(*data, pages);
#endif
  return emulated::take_memory(emulated::device, *data, bytes), cudaSuccess;
}
namespace emulated {

inline void free_memory(void* data) {
  give_memory(data);
#ifdef __SANITIZE_ADDRESS__
  std::free(data);
#else
  char* base = static_cast<char*>(data) - 4096;
  munmap(base, *reinterpret_cast<std::size_t*>(base));
#endif
}

}  // namespace emulated

inline cudaError_t cudaFree(void* data) {
  if (data == nullptr) return cudaSuccess;
  cudaDeviceSynchronize();
  return emulated::free_memory(data), cudaSuccess;
}
// Memory is there at once, and goes in the order of the stream.
inline cudaError_t cudaMallocAsync(void** data, std::size_t bytes, cudaStream_t) {
  return cudaMalloc(data, bytes);
}
inline cudaError_t cudaFreeAsync(void* data, cudaStream_t stream) {
  if (data == nullptr) return cudaErrorInvalidValue;
  return emulated::enqueue(stream, [data] { emulated::free_memory(data); });
}
inline cudaError_t cudaHostAlloc(void** data, std::size_t bytes, unsigned) {
  return *data = emulated::allocate(bytes), cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* data) {
  return cudaDeviceSynchronize(), std::free(data), cudaSuccess;
}
inline cudaError_t cudaHostRegister(void*, std::size_t, unsigned) {
  return cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void*) {
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return emulated::enqueue(stream, [=] { emulated::copy_rows(to, 0, from, 0, bytes, 1); });
}
inline cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                                     std::size_t width, std::size_t rows, cudaMemcpyKind, cudaStream_t stream) {
  if (width > to_pitch || width > from_pitch || std::max(to_pitch, from_pitch) > emulated::kMaxPitch)
    return cudaErrorInvalidPitchValue;
  return emulated::enqueue(stream, [=] { emulated::copy_rows(to, to_pitch, from, from_pitch, width, rows); });
}
inline cudaError_t cudaMemset2DAsync(void* to, std::size_t pitch, int value, std::size_t width, std::size_t rows,
                                     cudaStream_t stream) {
  if (width > pitch || pitch > emulated::kMaxPitch) return cudaErrorInvalidPitchValue;
  return emulated::enqueue(stream, [=] {
    const emulated::DeviceAccess access;
    for (std::size_t r = 0; r < rows; r++) std::memset(static_cast<char*>(to) + r * pitch, value, width);
  });
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  return emulated::enqueue(stream, [=] {
    const emulated::DeviceAccess access;
    std::memset(to, value, bytes);
  });
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  std::lock_guard lock(emulated::machine.mutex);
  emulated::streams.push_back(*stream = new emulated::Stream);
  return (*stream)->device = emulated::device, cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::lock_guard lock(emulated::machine.mutex);
  return emulated::run_until(*stream, ~0ull), std::erase(emulated::streams, stream), delete stream, cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  const bool timed = (flags & cudaEventDisableTiming) == 0;
  return *event = new emulated::Event{&emulated::default_stream, 0, timed}, cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (!stream) stream = &emulated::default_stream;
  std::lock_guard lock(emulated::machine.mutex);
  cudaError_t error = cudaSuccess;
  event->time = nullptr;
  // One that is captured is a part of the graph, and has no time.
  if (event->timed && !stream->capturing) {
    event->time = std::make_shared<std::int64_t>(0);
    error = emulated::enqueue(
        stream, [time = event->time] { *time = std::chrono::steady_clock::now().time_since_epoch().count(); });
  }
  return event->stream = stream, event->at = stream->queued, error;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  std::lock_guard lock(emulated::machine.mutex);
  if (!from->time || !to->time) return cudaErrorInvalidResourceHandle;
  if (*from->time == 0 || *to->time == 0) return cudaErrorNotReady;
  return *milliseconds = static_cast<float>(static_cast<double>(*to->time - *from->time) * 1e-6), cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
  return emulated::enqueue_until(
      stream, [event = *event] { return emulated::run_until(*event.stream, event.at) != cudaErrorNotReady; });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return emulated::finish(*event->stream, event->at);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return delete event, cudaSuccess;
}
