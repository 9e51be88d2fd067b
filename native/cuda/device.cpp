// GPUs: what there is, their memory, their queues.
#include <algorithm>
#include <map>
#include <mutex>
#include <sstream>

#include "core/error.h"
#include "core/range.h"
#include "cuda/backend.h"
#include "build.h"
#include "pages.h"
#include "cuda/queue.h"
#include "cuda/stream_timer.h"

namespace lockstep::cuda {

namespace {

constexpr int kLeastMajor = 8;  // what `mma` of bfloat16 and cp.async need

std::string versionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string problemOf(cudaError_t error, const Status& s) {
  std::ostringstream text;
  if (s.driver == 0) {
    text << "there is no NVIDIA driver here; install one of branch 580 or newer, or compute on the CPU (device: cpu)";
  } else if (error == cudaErrorInsufficientDriver || s.driver < s.runtime) {
    text << "the NVIDIA driver is for CUDA " << versionText(s.driver) << ", and this addon needs "
         << versionText(s.runtime) << "; install a driver of branch 580 or newer";
  } else if (error != cudaSuccess) {
    text << cudaGetErrorString(error) << "; look at what nvidia-smi says";
  } else if (s.gpus.empty()) {
    text << "the driver shows no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES";
  }
  return text.str();
}

// Pages of a GPU; a set bit is a grain that has memory.
class GpuMemory final : public Memory {
 public:
  explicit GpuMemory(int gpu) : gpu_(gpu), name_("GPU " + std::to_string(gpu)) {
    check(cudaSetDevice(gpu), "choosing the GPU");
    check(pages::grain(gpu, &grain_), "asking for the size of pages");
    for (Way* way : {&in_, &out_}) {
      check(cudaStreamCreateWithFlags(&way->stream, cudaStreamNonBlocking), "making a stream");
    }
  }

  const std::string& name() const override { return name_; }
  bool isHost() const override { return false; }
  size_t grain() const override { return grain_; }

  char* map(size_t bytes) override {
    if (bytes == 0) return nullptr;
    use();
    char* at = nullptr;
    if (pages::reserve(&at, bytes) != cudaSuccess) return nullptr;
    {
      const std::lock_guard lock(mutex_);
      blocks_[at] = std::vector<bool>(bytes / grain_, false);
    }
    if (restore(at, bytes)) return at;
    unmap(at, bytes);
    return nullptr;
  }

  // The rest of a block, or all of it.
  void unmap(char* at, size_t bytes) override {
    giveBack(at, bytes);
    const std::lock_guard lock(mutex_);
    const auto block = blockOf(at);
    const auto first = static_cast<size_t>(at - block->first) / grain_;
    check(pages::release(at, bytes), "giving addresses back");
    block->second.resize(first);
    if (first == 0) blocks_.erase(block);
  }

  void giveBack(char* at, size_t bytes) override {
    use();
    each(at, bytes, [&](char* grain, auto mapped) {
      if (mapped) check(pages::unmap(grain, grain_), "giving memory back");
      mapped = false;
      return true;
    });
  }

  bool restore(char* at, size_t bytes) override {
    use();
    std::vector<char*> added;
    const bool all = each(at, bytes, [&](char* grain, auto mapped) {
      if (mapped) return true;
      const cudaError_t error = pages::map(gpu_, grain, grain_);
      if (error == cudaErrorMemoryAllocation) return false;
      check(error, "taking memory");
      mapped = true;
      added.push_back(grain);
      return true;
    });
    for (size_t i = 0; i < added.size();) {  // neighbours together
      size_t n = 1;
      while (i + n < added.size() && added[i + n] == added[i] + n * grain_) ++n;
      if (all) {
        check(pages::clear(added[i], n * grain_), "clearing memory");
      } else {
        giveBack(added[i], n * grain_);
      }
      i += n;
    }
    return all;
  }

  size_t resident(const char* at, size_t bytes) const override {
    const std::lock_guard lock(mutex_);
    size_t count = 0;
    for (const auto& [begin, mapped] : blocks_) {
      for (size_t i = 0; i < mapped.size(); ++i) {
        const char* const grain = begin + i * grain_;
        count += mapped[i] && grain >= at && grain < at + bytes ? 1 : 0;
      }
    }
    return count * grain_;
  }

  void toHost(void* to, const char* from, size_t bytes) override {
    const Range range("copy to host");
    transfer(out_, to, from, bytes, cudaMemcpyDeviceToHost);
  }
  void fromHost(char* to, const void* from, size_t bytes) override {
    const Range range("copy from host");
    transfer(in_, to, from, bytes, cudaMemcpyHostToDevice);
  }
  void copy(char* to, const char* from, size_t bytes) override {
    transfer(in_, to, from, bytes, cudaMemcpyDeviceToDevice);
  }
  void pin(void* at, size_t bytes) override {
    use();
    check(cudaHostRegister(at, bytes, cudaHostRegisterPortable), "pinning host memory");
  }
  void unpin(void* at) override { cudaHostUnregister(at); }

 private:
  void use() const { check(cudaSetDevice(gpu_), "choosing the GPU"); }

  // One stream each way, so that what goes and what comes use both directions of the bus; one copy at a time on each.
  struct Way {
    explicit Way(StreamWork::Stream kind) : timer(kind) {}
    std::mutex mutex;
    cudaStream_t stream = nullptr;
    StreamTimer timer;
  };

  void transfer(Way& way, void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    use();
    const std::lock_guard lock(way.mutex);
    // Copies within the GPU take turns with those that come, and are none of them.
    if (kind != cudaMemcpyDeviceToDevice) way.timer.begin(way.stream);
    check(cudaMemcpyAsync(to, from, bytes, kind, way.stream), "copying between host and GPU");
    way.timer.wait(way.stream, "copying between host and GPU", bytes);
  }

  std::map<char*, std::vector<bool>>::iterator blockOf(const char* at) {
    auto next = blocks_.upper_bound(const_cast<char*>(at));
    if (next == blocks_.begin()) throw Error("INTERNAL", "memory of " + name_ + " that was not taken");
    return std::prev(next);
  }

  // visit(grain, mapped) until it says false.
  template <class Visit>
  bool each(char* at, size_t bytes, const Visit& visit) {
    const std::lock_guard lock(mutex_);
    if (bytes == 0) return true;
    const auto block = blockOf(at);
    const size_t first = static_cast<size_t>(at - block->first) / grain_;
    for (size_t i = 0; i < bytes / grain_; ++i) {
      if (!visit(at + i * grain_, block->second[first + i])) return false;
    }
    return true;
  }

  const int gpu_;
  const std::string name_;
  size_t grain_ = 0;
  Way in_{StreamWork::Stream::kFromHost}, out_{StreamWork::Stream::kToHost};
  mutable std::mutex mutex_;
  std::map<char*, std::vector<bool>> blocks_;
};

}  // namespace

Status status() {
  Status s{kBuild, "", 0, 0, {}};
  cudaRuntimeGetVersion(&s.runtime);
  cudaDriverGetVersion(&s.driver);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  for (int i = 0; error == cudaSuccess && i < count; ++i) {
    cudaDeviceProp p{};
    if (cudaGetDeviceProperties(&p, i) != cudaSuccess) continue;
    s.gpus.push_back({p.name, p.major, p.minor, p.multiProcessorCount, static_cast<int64_t>(p.totalGlobalMem)});
  }
  s.problem = problemOf(error, s);
  return s;
}

void requireGpu(int gpu) {
  static const Status s = status();
  if (!s.problem.empty()) throw Error("CUDA_UNAVAILABLE", s.problem);
  if (gpu < 0 || gpu >= static_cast<int>(s.gpus.size())) {
    throw Error("CUDA_DEVICE", "GPU " + std::to_string(gpu) + " is needed, and this machine shows " +
                                   std::to_string(s.gpus.size()) + " (0.." + std::to_string(s.gpus.size() - 1) +
                                   "); use fewer ranks (parallel), or look at CUDA_VISIBLE_DEVICES");
  }
  const Gpu& g = s.gpus[static_cast<size_t>(gpu)];
  if (g.major < kLeastMajor) {
    throw Error("CUDA_ARCHITECTURE", "GPU " + std::to_string(gpu) + " (" + g.name + ") has compute capability " +
                                         std::to_string(g.major) + "." + std::to_string(g.minor) +
                                         "; expected 8.0 or newer (A100, H100, RTX 30 and later)");
  }
}

MemoryInfo memoryInfo(int gpu) {
  requireGpu(gpu);
  size_t free = 0, total = 0;
  check(cudaSetDevice(gpu), "choosing the GPU");
  check(cudaMemGetInfo(&free, &total), "asking for free memory");
  return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
}

Memory& memoryOf(int gpu) {
  requireGpu(gpu);
  static std::mutex mutex;
  static std::map<int, GpuMemory*> memories;  // never destroyed: arenas may outlive the library's other statics
  const std::lock_guard lock(mutex);
  auto& memory = memories[gpu];
  if (memory == nullptr) memory = new GpuMemory(gpu);
  return *memory;
}

std::unique_ptr<lockstep::Queue> makeQueue(int gpu, int threads, size_t hostScratchBytes) {
  requireGpu(gpu);
  return std::make_unique<Queue>(gpu, threads, hostScratchBytes, true);
}

}  // namespace lockstep::cuda
