// GPUs: what there is, their memory, their queues.
#include <algorithm>
#include <cstdlib>
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

// Empty where the kernels were compiled for it.
std::string architectureProblem(int gpu, const Gpu& g) {
  if (g.major >= kLeastMajor) return "";
  return "GPU " + std::to_string(gpu) + " (" + g.name + ") has compute capability " + std::to_string(g.major) + "." +
         std::to_string(g.minor) +
         "; expected 8.0 or newer (A100, H100, RTX 30 and later). Choose another with CUDA_VISIBLE_DEVICES, or compute "
         "on the CPU (device: cpu)";
}

std::string problemOf(cudaError_t error, const Status& s) {
  std::ostringstream text;
  if (s.driver == 0) {
    text << "there is no NVIDIA driver here; install one of branch 580 or newer, or compute on the CPU (device: cpu)";
  } else if (error == cudaErrorInsufficientDriver || s.driver / 1000 < s.runtime / 1000) {
    text << "the NVIDIA driver is for CUDA " << versionText(s.driver) << ", and this addon needs "
         << versionText(s.runtime) << "; install a driver of branch 580 or newer";
  } else if (error == cudaErrorNoDevice || (error == cudaSuccess && s.gpus.empty())) {
    text << "the driver shows no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES";
  } else if (error != cudaSuccess) {
    text << cudaGetErrorString(error) << "; look at what nvidia-smi says";
  } else {
    text << architectureProblem(0, s.gpus.front());
  }
  return text.str();
}

// Blocks of addresses of a GPU. Behind them memory comes and goes in units, each an allocation of the driver that stays
// as long as one of its grains is wanted.
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
      const size_t grains = bytes / grain_, unit = grains < kManyUnits * kUnitGrains ? 1 : kUnitGrains;
      blocks_[at] = {unit, std::vector<bool>(grains), std::vector<bool>((grains + unit - 1) / unit)};
    }
    if (restore(at, bytes)) return at;
    unmap(at, bytes);
    return nullptr;
  }

  // Addresses go with the block. What a GPU that was lost answers is not asked: destructors call this.
  void unmap(char* at, size_t bytes) override {
    cudaSetDevice(gpu_);
    {
      const std::lock_guard lock(capturing(gpu_));
      cudaDeviceSynchronize();  // a call that has failed may have left work behind that uses it
    }
    const std::lock_guard lock(mutex_);
    const auto block = blockOf(at);
    if (at != block->first) return static_cast<void>(drop(*block, at, bytes));
    const size_t all = block->second.wanted.size() * grain_;
    drop(*block, at, all);
    pages::release(at, all);
    blocks_.erase(block);
  }

  void giveBack(char* at, size_t bytes) override {
    if (bytes == 0) return;
    use();
    const std::lock_guard lock(mutex_);
    check(drop(*blockOf(at), at, bytes), "giving memory back");
  }

  bool restore(char* at, size_t bytes) override {
    if (bytes == 0) return true;
    use();
    const std::lock_guard lock(mutex_);
    auto& of = *blockOf(at);
    auto& [begin, block] = of;
    const size_t first = static_cast<size_t>(at - begin) / grain_, end = first + bytes / grain_;
    std::vector<size_t> added;
    for (size_t i = first; i < end; ++i) {
      if (block.wanted[i]) continue;
      const size_t unit = i / block.unit;
      if (!block.mapped[unit]) {
        const cudaError_t error = pages::map(gpu_, begin + unit * block.unit * grain_, bytesOf(block, unit));
        if (error == cudaErrorMemoryAllocation) {
          cudaGetLastError();
          for (const size_t grain : added) drop(of, begin + grain * grain_, grain_);
          return false;
        }
        check(error, "taking memory");
        block.mapped[unit] = true;
      }
      block.wanted[i] = true;
      added.push_back(i);
    }
    const std::lock_guard way(in_.mutex);
    for (size_t i = 0; i < added.size();) {  // neighbours together
      size_t n = 1;
      while (i + n < added.size() && added[i + n] == added[i] + n) ++n;
      check(pages::clear(begin + added[i] * grain_, n * grain_, in_.stream), "clearing memory");
      i += n;
    }
    return true;
  }

  size_t resident(const char* at, size_t bytes) const override {
    const std::lock_guard lock(mutex_);
    size_t count = 0;
    for (const auto& [begin, block] : blocks_) {
      for (size_t i = 0; i < block.wanted.size(); ++i) {
        const char* const grain = begin + i * grain_;
        count += block.mapped[i / block.unit] && grain >= at && grain < at + bytes ? 1 : 0;
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
  void unpin(void* at) override {
    const std::lock_guard lock(capturing(gpu_));
    cudaHostUnregister(at);
  }

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

  // An allocation costs the driver tens of microseconds whatever its size: those of large blocks have 32 MiB.
  static constexpr size_t kUnitGrains = 16, kManyUnits = 16;
  struct Block {
    size_t unit;               // grains
    std::vector<bool> wanted;  // grains
    std::vector<bool> mapped;  // units
  };

  std::map<char*, Block>::iterator blockOf(const char* at) {
    auto next = blocks_.upper_bound(const_cast<char*>(at));
    if (next == blocks_.begin()) throw Error("INTERNAL", "memory of " + name_ + " that was not taken");
    return std::prev(next);
  }

  // The last unit of a block ends with it.
  size_t bytesOf(const Block& block, size_t unit) const {
    return std::min(block.unit, block.wanted.size() - unit * block.unit) * grain_;
  }

  // Of the block that begins at `of.first`; the first error.
  cudaError_t drop(std::pair<char* const, Block>& of, char* at, size_t bytes) {
    auto& [begin, block] = of;
    const size_t first = static_cast<size_t>(at - begin) / grain_, end = first + bytes / grain_;
    for (size_t i = first; i < end; ++i) block.wanted[i] = false;
    cudaError_t all = cudaSuccess;
    for (size_t unit = first / block.unit; unit * block.unit < end; ++unit) {
      const auto from = block.wanted.begin() + static_cast<std::ptrdiff_t>(unit * block.unit);
      const auto to = from + static_cast<std::ptrdiff_t>(bytesOf(block, unit) / grain_);
      if (!block.mapped[unit] || std::find(from, to, true) != to) continue;
      const cudaError_t error = pages::unmap(begin + unit * block.unit * grain_, bytesOf(block, unit));
      if (all == cudaSuccess) all = error;
      block.mapped[unit] = false;
    }
    return all;
  }

  const int gpu_;
  const std::string name_;
  size_t grain_ = 0;
  Way in_{StreamWork::Stream::kFromHost}, out_{StreamWork::Stream::kToHost};
  mutable std::mutex mutex_;
  std::map<char*, Block> blocks_;
};

}  // namespace

Status status() {
  // What is loaded when it is first launched waits, inside the driver, for all that its GPU was given, and NCCL's part
  // of that may wait for another rank that waits so, too. CUDA reads this when it is first used.
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
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
  const bool exists = gpu >= 0 && gpu < static_cast<int>(s.gpus.size());
  const std::string architecture = exists ? architectureProblem(gpu, s.gpus[static_cast<size_t>(gpu)]) : "";
  if (!architecture.empty()) throw Error("CUDA_ARCHITECTURE", architecture);
  if (!s.problem.empty()) throw Error("CUDA_UNAVAILABLE", s.problem);
  if (!exists) {
    throw Error("CUDA_DEVICE", "GPU " + std::to_string(gpu) + " is needed, and this machine shows " +
                                   std::to_string(s.gpus.size()) + " (0.." + std::to_string(s.gpus.size() - 1) +
                                   "); use fewer ranks (parallel), or look at CUDA_VISIBLE_DEVICES");
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
