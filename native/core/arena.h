// One block of memory with a planned size. The plan (which buffer lies where) is made in TypeScript's layout/; an arena
// checks every access against the planned size and remembers the largest end that was used.
#pragma once

#include <atomic>
#include <cstddef>
#include <string>

#include "core/memory.h"
#include "core/memory_space.h"

namespace lockstep {

class Arena {
 public:
  // Reserves `bytes` of zeroed memory; on the host pages are touched on use. What it holds counts in `space`, when
  // there is one. Throws Error("OUT_OF_MEMORY") and what MemorySpace::take throws.
  Arena(std::string name, size_t bytes, MemorySpace* space = nullptr, Memory& memory = hostMemory());
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // The buffer [offset, offset + bytes). Throws Error("MEMORY_PLAN") when it does not lie inside, and
  // Error("STATE_NOT_ON_DEVICE") while some of the arena is absent.
  void* at(size_t offset, size_t bytes, const char* what);

  // Grows (or shrinks) the planned size; memory is kept only when it fits, and none beyond the size. Only for arenas
  // whose contents do not matter.
  void reserve(size_t bytes);

  // Gives memory beyond `bytes` back; contents are lost, planned() is at most `bytes` afterwards.
  void trim(size_t bytes);

  // Gives the memory back; planned() and highWater() stay. Only reserve() may follow.
  void release();

  size_t planned() const { return bytes_; }
  // The largest end used so far, in whole units of the alignment.
  size_t highWater() const { return highWater_; }
  // What the system keeps in memory for it now, in whole pages.
  size_t resident() const;

  // Bytes [0, absent) are not here: more absent bytes give their pages back, fewer take zeroed ones. Addresses stay.
  // Throws Error("OUT_OF_MEMORY") and what MemorySpace::take throws.
  void setAbsent(size_t bytes);
  size_t absent() const { return absent_; }
  // The contents of a range are lost; on the host its pages are given back, and read as zeroes.
  void discard(size_t offset, size_t bytes) const;
  // The block itself, whatever is absent: for those who move it.
  char* data() { return data_; }
  Memory& memory() const { return memory_; }
  const std::string& name() const { return name_; }

 private:
  [[noreturn]] void refuse(size_t bytes) const;

  std::string name_;
  MemorySpace* space_;
  Memory& memory_;
  char* data_ = nullptr;
  size_t bytes_ = 0, mapped_ = 0, highWater_ = 0;
  size_t counted_ = 0;  // in space_
  std::atomic<size_t> absent_{0};
};

}  // namespace lockstep
