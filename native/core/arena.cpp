#include "core/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/error.h"

namespace lockstep {

namespace {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20, kAlignment = 64;

char* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  // Large arenas use huge pages: fewer TLB misses in the products that stream through them.
  if (bytes >= 2 * kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
  return static_cast<char*>(memory);
}

void giveBack(char* from, size_t bytes) {
  // Whole pages inside the range: their next touch finds zeroes.
  const auto begin = (reinterpret_cast<uintptr_t>(from) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(from) + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace

Arena::Arena(std::string name, size_t bytes, MemorySpace* space) : name_(std::move(name)), space_(space) {
  reserve(bytes);
}

Arena::~Arena() {
  release();
}

void Arena::release() {
  if (memory_ != nullptr) munmap(memory_, mapped_);
  memory_ = nullptr;
  mapped_ = 0;
  if (space_ != nullptr) space_->give(counted_);
  counted_ = 0;
}

void Arena::reserve(size_t bytes) {
  bytes_ = bytes;
  if (bytes <= mapped_) return discard(bytes, mapped_ - bytes);
  release();
  if (space_ != nullptr) space_->take(bytes, "arena '" + name_ + "'");
  counted_ = bytes;
  const size_t mapped = (bytes + kPage - 1) / kPage * kPage;
  memory_ = map(mapped);
  if (memory_ == nullptr) {
    throw Error("OUT_OF_MEMORY", "arena '" + name_ + "': the system refused " + std::to_string(mapped) +
                                     " bytes; use a smaller model, batch.microTokens or memory.device");
  }
  mapped_ = mapped;
}

void Arena::trim(size_t bytes) {
  if (bytes >= counted_) return;
  const size_t kept = bytes / kPage * kPage;
  if (kept < mapped_) munmap(memory_ + kept, mapped_ - kept);
  if (kept == 0) memory_ = nullptr;
  mapped_ = kept;
  bytes_ = std::min(bytes_, kept);
  if (space_ != nullptr) space_->give(counted_ - kept);
  counted_ = kept;
}

void Arena::setAbsent(size_t bytes) {
  const size_t before = absent_;
  if (bytes > before) {
    absent_ = bytes;
    discard(before, bytes - before);
    if (space_ != nullptr) space_->give(bytes - before);
    counted_ -= bytes - before;
  } else if (bytes < before) {
    if (space_ != nullptr) space_->take(before - bytes, "arena '" + name_ + "'");
    counted_ += before - bytes;
    absent_ = bytes;
  }
}

void Arena::discard(size_t offset, size_t bytes) const {
  giveBack(memory_ + offset, (offset + bytes == bytes_ ? mapped_ : offset + bytes) - offset);
}

size_t Arena::resident() const {
  std::vector<unsigned char> pages(mapped_ / kPage);
  if (pages.empty() || mincore(memory_, mapped_, pages.data()) != 0) return 0;
  return kPage * static_cast<size_t>(std::count_if(pages.begin(), pages.end(), [](auto page) { return page & 1; }));
}

void* Arena::at(size_t offset, size_t bytes, const char* what) {
  if (offset + bytes > bytes_ || offset % kAlignment != 0) {
    throw Error("MEMORY_PLAN", "arena '" + name_ + "': " + what + " needs bytes " + std::to_string(offset) + ".." +
                                   std::to_string(offset + bytes) + ", the plan has " + std::to_string(bytes_));
  }
  if (absent_ > 0) {
    throw Error("STATE_NOT_ON_DEVICE", "arena '" + name_ + "': " + what + " is needed, and " + std::to_string(absent_) +
                                           " of its " + std::to_string(bytes_) +
                                           " bytes are not on the device; move them there first");
  }
  highWater_ = std::max(highWater_, std::min((offset + bytes + kAlignment - 1) / kAlignment * kAlignment, bytes_));
  return memory_ + offset;
}

}  // namespace lockstep
