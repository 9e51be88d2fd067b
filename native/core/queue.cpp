#include "core/queue.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "core/error.h"

namespace lockstep {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t roundUpTo(size_t bytes, size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

Queue::Queue(int threads, size_t scratchBytes) : pool_(threads), scratchBytes_(roundUpTo(scratchBytes, 64)) {
  if (scratchBytes_ == 0) return;
  const size_t bytes = scratchBytes_ * (static_cast<size_t>(threads) + 1);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error("OUT_OF_MEMORY", "scratch: the system refused " + std::to_string(bytes) + " bytes");
  }
  // Blocks of operands staged here are streamed by the products; huge pages spare the TLB.
  if (scratchBytes_ >= kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
  memory_ = static_cast<char*>(memory);
}

Queue::~Queue() {
  close();
}

void Queue::close() {
  pool_.stop();
  if (memory_ != nullptr) munmap(memory_, scratchBytes_ * (static_cast<size_t>(threads()) + 1));
  memory_ = nullptr;
}

void Queue::copyRows(void* to, size_t toStride, const void* from, size_t fromStride, size_t bytes, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto row = static_cast<size_t>(r);
    std::memcpy(static_cast<char*>(to) + row * toStride, static_cast<const char*>(from) + row * fromStride, bytes);
  }
}

void Queue::fillRows(void* at, size_t stride, int byte, size_t bytes, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) std::memset(static_cast<char*>(at) + static_cast<size_t>(r) * stride, byte, bytes);
}

void Queue::toHost(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}

void Queue::fromHost(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}

void Queue::require(size_t bytes) const {
  if (bytes <= scratchBytes_) return;
  throw Error("SCRATCH_TOO_SMALL", "scratch: an operation needs " + std::to_string(bytes) +
                                       " bytes per thread, the queue has " + std::to_string(scratchBytes_));
}

void* Queue::scratch(int thread, size_t bytes) {
  require(bytes);
  size_t seen = highWater_.load(std::memory_order_relaxed);
  while (seen < bytes && !highWater_.compare_exchange_weak(seen, bytes, std::memory_order_relaxed)) {
  }
  return memory_ + static_cast<size_t>(thread) * scratchBytes_;
}

void* Queue::shared(size_t bytes) {
  require(bytes);
  sharedHighWater_ = std::max(sharedHighWater_, bytes);
  return memory_ + static_cast<size_t>(threads()) * scratchBytes_;
}

}  // namespace lockstep
