#include "cuda/queue.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <utility>

#include "core/error.h"
#include "cuda/stream_timer.h"

namespace lockstep::cuda {

namespace {

constexpr size_t kAlignment = 256, kMostStaged = 64;

// A work that cannot be recorded, or not be repeated.
struct CannotRepeat {};

size_t aligned(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would find it
  const std::string text = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation)
    throw Error("CUDA_OUT_OF_MEMORY", text + "; lower memory.device, or end what else uses this GPU (nvidia-smi)");
  throw Error("CUDA_FAILED", text +
                                 "; the GPU can not be used by this process any more: run again, with --resume to go "
                                 "on from the last checkpoint, and look at the kernel log if it comes back");
}

std::mutex& capturing(int gpu) {
  static std::mutex gpus[64];
  return gpus[gpu % 64];
}

Queue::Queue(int gpu, int threads, size_t hostScratchBytes, bool timed)
    : lockstep::Queue(threads, hostScratchBytes),
      gpu_(gpu),
      timer_(timed ? std::make_unique<StreamTimer>(StreamWork::Stream::kCompute) : nullptr) {
  check(cudaSetDevice(gpu), "choosing the GPU");
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, gpu), "asking for the GPU's properties");
  multiprocessors_ = static_cast<unsigned>(properties.multiProcessorCount);
}

Queue::~Queue() {
  close();
}

void Queue::close() {
  if (stream_ != nullptr) {
    cudaSetDevice(gpu_);
    if (scratch_ != nullptr) cudaFreeAsync(scratch_, stream_);
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    timer_.reset();
    const std::lock_guard lock(capturing(gpu_));
    forgetGraphs();
    for (Region& region : regions_) release(region);
  }
  stream_ = nullptr;
  scratch_ = nullptr;
  lockstep::Queue::close();
}

cudaStream_t Queue::stream() const {
  check(cudaSetDevice(gpu_), "choosing the GPU");
  launching();
  return stream_;
}

void Queue::copyRows(void* to, size_t toStride, const void* from, size_t fromStride, size_t bytes, int64_t rows) {
  if (bytes == 0 || rows == 0) return;
  if (!admit({nullptr, {bytes, static_cast<uint64_t>(rows), toStride}, fromStride, 0})) return;
  cudaStream_t const stream = this->stream();
  const auto count = static_cast<size_t>(rows);
  check(count == 1 ? cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream)
                   : cudaMemcpy2DAsync(to, toStride, from, fromStride, bytes, count, cudaMemcpyDeviceToDevice, stream),
        "copying");
}

void Queue::toHost(void* to, const void* from, size_t bytes) {
  refuseWaiting();
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream()), "copying to the host");
  synchronize();
}

void Queue::fromHost(void* to, const void* from, size_t bytes) {
  refuseWaiting();
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream()), "copying from the host");
  wait("copying from the host");
}

void Queue::fillRows(void* at, size_t stride, int byte, size_t bytes, int64_t rows) {
  if (bytes == 0 || rows == 0) return;
  if (!admit({nullptr, {bytes, static_cast<uint64_t>(rows), stride}, static_cast<uint64_t>(byte), 1})) return;
  // One row may be longer than the longest stride, 2 GiB.
  check(rows == 1 ? cudaMemsetAsync(at, byte, bytes, stream())
                  : cudaMemset2DAsync(at, stride, byte, bytes, static_cast<size_t>(rows), stream()),
        "filling memory");
}

void Queue::synchronize() {
  refuseWaiting();
  wait("working");
}

void Queue::launching() const {
  if (timer_ != nullptr && repeating_ == nullptr) timer_->begin(stream_);
}

void Queue::wait(const char* what) {
  check(cudaSetDevice(gpu_), "choosing the GPU");
  if (timer_ != nullptr) return timer_->wait(stream_, what);
  check(cudaStreamSynchronize(stream_), what);
}

cudaError_t Queue::take(Region& region, size_t bytes) {
  cudaError_t error = cudaHostAlloc(reinterpret_cast<void**>(&region.pinned), bytes, cudaHostAllocPortable);
  if (error == cudaSuccess) error = cudaMalloc(reinterpret_cast<void**>(&region.device), bytes);
  region.bytes = error == cudaSuccess ? bytes : 0;
  return error;
}

void Queue::release(Region& region) {
  if (region.pinned != nullptr) cudaFreeHost(region.pinned);
  cudaFree(region.device);
  region = {};
}

void Queue::nextRegion(size_t bytes) {
  region_ ^= 1;
  synchronize();
  // An array that is asked for again moves along: the region that it lies in is the next to be renewed.
  staged_.clear();
  Region& region = regions_[region_];
  region.end = 0;
  if (bytes <= region.bytes) return;
  const std::lock_guard lock(capturing(gpu_));
  release(region);
  check(take(region, std::max(kFirstStaging, 2 * aligned(bytes))), "memory for index arrays");
}

const void* Queue::stageBytes(const void* host, size_t bytes) {
  if (repeating_ != nullptr) return stageRepeated(host, bytes);
  for (size_t i = staged_.size(); i-- > 0;) {
    const Staged& s = staged_[i];
    const Region& region = regions_[region_];
    if (s.host == host && s.bytes == bytes && std::memcmp(region.pinned + s.offset, host, bytes) == 0)
      return region.device + s.offset;
  }
  if (regions_[region_].end + bytes > regions_[region_].bytes) nextRegion(bytes);
  if (staged_.size() == kMostStaged) staged_.erase(staged_.begin(), staged_.begin() + kMostStaged / 2);
  Region& region = regions_[region_];
  const size_t offset = region.end;
  region.end += aligned(bytes);
  std::memcpy(region.pinned + offset, host, bytes);
  check(cudaMemcpyAsync(region.device + offset, region.pinned + offset, bytes, cudaMemcpyHostToDevice, stream()),
        "sending index arrays");
  staged_.push_back({host, offset, bytes});
  return region.device + offset;
}

// Each array has a place of its own, in the order in which they are first staged.
const void* Queue::stageRepeated(const void* host, size_t bytes) {
  Region& arrays = repeating_->arrays;
  for (const Staged& s : repeating_->staged) {
    if (s.host == host && s.bytes == bytes && std::memcmp(arrays.pinned + s.offset, host, bytes) == 0)
      return arrays.device + s.offset;
  }
  const size_t offset = arrays.end;
  if (offset + bytes > arrays.bytes) throw CannotRepeat{};
  arrays.end += aligned(bytes);
  std::memcpy(arrays.pinned + offset, host, bytes);
  if (admit({nullptr, {offset, bytes, 0}, 0, 2})) {
    check(cudaMemcpyAsync(arrays.device + offset, arrays.pinned + offset, bytes, cudaMemcpyHostToDevice, stream()),
          "sending index arrays");
  }
  repeating_->staged.push_back({host, offset, bytes});
  return arrays.device + offset;
}

void Queue::refuseWaiting() const {
  if (repeating_ != nullptr) throw CannotRepeat{};
}

void Queue::repeat(const std::string& key, const std::function<void()>& work) {
  const auto [at, isNew] = repeated_.try_emplace(key);
  Repeated& r = at->second;
  if (r.state == Repeated::State::kRecorded && replay(r, work)) return;
  if (r.state != Repeated::State::kSeen || isNew) return work();
  if (graphs_ < kMostGraphs) return record(r, work);
  synchronize();
  forget();
  repeat(key, work);
}

// False: it cannot be recorded, and nothing was done.
bool Queue::capture(Repeated& r, const std::function<void()>& work) {
  const std::lock_guard lock(capturing(gpu_));
  if (take(r.arrays, kGraphArrays) != cudaSuccess) return release(r.arrays), false;
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "recording a graph");
  repeating_ = &r;
  recording = &r.recording;
  bool whole = true;
  std::exception_ptr failure;
  try {
    work();
  } catch (const CannotRepeat&) {
    whole = false;
  } catch (...) {
    failure = std::current_exception();
  }
  repeating_ = nullptr;
  recording = nullptr;
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream_, &graph);
  whole = whole && !failure && ended == cudaSuccess && cudaGraphInstantiate(&r.graph, graph, 0) == cudaSuccess;
  if (graph != nullptr) cudaGraphDestroy(graph);
  // Of a capture that was spoilt, operations fail, too.
  if (failure && ended == cudaSuccess) std::rethrow_exception(failure);
  return whole;
}

void Queue::record(Repeated& r, const std::function<void()>& work) {
  ++graphs_;
  r.state = Repeated::State::kRefused;
  if (!capture(r, work)) {
    cudaGetLastError();
    return work();
  }
  r.state = Repeated::State::kRecorded;
  launching();
  check(cudaGraphLaunch(r.graph, stream_), "launching a graph");
}

// False: the run takes other steps, and nothing was done.
bool Queue::replay(Repeated& r, const std::function<void()>& work) {
  wait("working");  // the last run has read its arrays
  r.arrays.end = 0;
  r.staged.clear();
  r.recording.comparing = true;
  r.recording.at = 0;
  repeating_ = &r;
  recording = &r.recording;
  bool same = true;
  try {
    work();
  } catch (const CannotRepeat&) {
    same = false;
  } catch (...) {
    repeating_ = nullptr;
    recording = nullptr;
    throw;
  }
  repeating_ = nullptr;
  recording = nullptr;
  if (!same || r.recording.differs || r.recording.at != r.recording.steps.size()) {
    r.state = Repeated::State::kRefused;
    return false;
  }
  launching();
  check(cudaGraphLaunch(r.graph, stream_), "launching a graph");
  return true;
}

void Queue::forget() {
  const std::lock_guard lock(capturing(gpu_));
  forgetGraphs();
}

void Queue::forgetGraphs() {
  for (auto& [key, r] : repeated_) {
    if (r.graph != nullptr) cudaGraphExecDestroy(r.graph);
    release(r.arrays);
  }
  repeated_.clear();
  graphs_ = 0;
}

// In the order of the stream: cudaFree would wait for all that the GPU was given, of which NCCL's part may wait for a
// rank that waits so, too. What the stream has given back is the GPU's again when the stream was waited for.
void* Queue::scratch(size_t bytes) {
  if (bytes <= scratchSize_) return scratch_;
  synchronize();
  forget();  // graphs have its address
  if (scratch_ != nullptr) {
    scratchSize_ = 0;
    check(cudaFreeAsync(std::exchange(scratch_, nullptr), stream_), "giving scratch memory back");
    synchronize();
  }
  check(cudaMallocAsync(&scratch_, bytes, stream_), "scratch memory");
  scratchSize_ = bytes;
  return scratch_;
}

}  // namespace lockstep::cuda
