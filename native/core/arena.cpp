#include "core/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <vector>

#include "core/error.h"

namespace lockstep {

namespace {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;

char* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  // Large arenas use huge pages: fewer TLB misses in the products that stream through them.
  if (bytes >= 2 * kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
  return static_cast<char*>(memory);
}

}  // namespace

Arena::Arena(std::string name, size_t bytes) : name_(std::move(name)) {
  reserve(bytes);
}

Arena::~Arena() {
  release();
}

void Arena::release() {
  if (memory_ != nullptr) munmap(memory_, mapped_);
  memory_ = nullptr;
  mapped_ = 0;
}

void Arena::reserve(size_t bytes) {
  bytes_ = bytes;
  if (bytes <= mapped_) return discard(bytes, mapped_ - bytes);
  release();
  const size_t mapped = (bytes + kPage - 1) / kPage * kPage;
  memory_ = map(mapped);
  if (memory_ == nullptr) {
    throw Error("OUT_OF_MEMORY", "arena '" + name_ + "': the system refused " + std::to_string(mapped) +
                                     " bytes; use a smaller model, batch.microTokens or memory.device");
  }
  mapped_ = mapped;
}

void Arena::discard(size_t offset, size_t bytes) {
  const size_t begin = (offset + kPage - 1) / kPage * kPage, end = std::min(offset + bytes, mapped_) / kPage * kPage;
  if (begin < end) madvise(memory_ + begin, end - begin, MADV_DONTNEED);
}

size_t Arena::resident() const {
  std::vector<unsigned char> pages(mapped_ / kPage);
  if (pages.empty() || mincore(memory_, mapped_, pages.data()) != 0) return 0;
  return kPage * static_cast<size_t>(std::count_if(pages.begin(), pages.end(), [](auto page) { return page & 1; }));
}

void* Arena::at(size_t offset, size_t bytes, const char* what) {
  if (offset + bytes > bytes_ || offset % 64 != 0) {
    throw Error("MEMORY_PLAN", "arena '" + name_ + "': " + what + " needs bytes " + std::to_string(offset) + ".." +
                                   std::to_string(offset + bytes) + ", the plan has " + std::to_string(bytes_));
  }
  highWater_ = std::max(highWater_, offset + bytes);
  return memory_ + offset;
}

}  // namespace lockstep
