// One block of memory with a planned size. The plan (which buffer lies where) is made in TypeScript's layout/; an arena
// checks every access against the planned size and remembers the largest end that was used.
#pragma once

#include <cstddef>
#include <string>

namespace lockstep {

class Arena {
 public:
  // Reserves `bytes` of zeroed memory; pages are touched on use. Throws Error("OUT_OF_MEMORY").
  Arena(std::string name, size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // The buffer [offset, offset + bytes). Throws Error("MEMORY_PLAN") when it does not lie inside.
  void* at(size_t offset, size_t bytes, const char* what);

  // Grows (or shrinks) the planned size; memory is kept only when it fits. Only for arenas whose contents do not
  // matter.
  void reserve(size_t bytes);

  // Gives the memory back; planned() and highWater() stay. Only reserve() may follow.
  void release();

  size_t planned() const { return bytes_; }
  // The largest end used so far, in whole units of the alignment.
  size_t highWater() const { return highWater_; }

 private:
  std::string name_;
  char* memory_ = nullptr;
  size_t bytes_ = 0, mapped_ = 0, highWater_ = 0;
};

}  // namespace lockstep
