#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/memory.h"

namespace lockstep {

namespace {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;

class HostMemory final : public Memory {
 public:
  const std::string& name() const override { return name_; }
  bool isHost() const override { return true; }
  size_t grain() const override { return kPage; }

  char* map(size_t bytes) override {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    // Large arenas use huge pages: fewer TLB misses in the products that stream through them.
    if (bytes >= 2 * kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
    return static_cast<char*>(memory);
  }
  void unmap(char* at, size_t bytes) override { munmap(at, bytes); }
  void giveBack(char* at, size_t bytes) override { madvise(at, bytes, MADV_DONTNEED); }
  bool restore(char*, size_t) override { return true; }

  size_t resident(const char* at, size_t bytes) const override {
    std::vector<unsigned char> pages(bytes / kPage);
    if (pages.empty() || mincore(const_cast<char*>(at), bytes, pages.data()) != 0) return 0;
    return kPage * static_cast<size_t>(std::count_if(pages.begin(), pages.end(), [](auto page) { return page & 1; }));
  }

  void toHost(void* to, const char* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void fromHost(char* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void copy(char* to, const char* from, size_t bytes) override { std::memcpy(to, from, bytes); }

 private:
  const std::string name_ = "host";
};

}  // namespace

Memory& hostMemory() {
  static HostMemory memory;
  return memory;
}

}  // namespace lockstep
