// Where arenas lie: in the host's memory or in a GPU's. Addresses of device memory mean nothing to host code: it
// copies.
#pragma once

#include <cstddef>
#include <string>

namespace lockstep {

class Memory {
 public:
  virtual ~Memory() = default;

  // "host", or "GPU 1".
  virtual const std::string& name() const = 0;
  virtual bool isHost() const = 0;
  // Memory comes and goes in multiples of this.
  virtual size_t grain() const = 0;

  // In whole grains. Zeroed; null when there is no room.
  virtual char* map(size_t bytes) = 0;
  // A block, or its end, of which some addresses may stay taken until the block goes.
  virtual void unmap(char* at, size_t bytes) = 0;
  // Gives the memory behind a range back; its addresses stay.
  virtual void giveBack(char* at, size_t bytes) = 0;
  // Puts memory behind a range again, zeroed where none was. False: there is no room, and nothing has changed.
  virtual bool restore(char* at, size_t bytes) = 0;
  // What is there now of a range.
  virtual size_t resident(const char* at, size_t bytes) const = 0;

  // Between this memory and the host's, or within it, from any thread; done on return. They do not wait for operations
  // of a Queue.
  virtual void toHost(void* to, const char* from, size_t bytes) = 0;
  virtual void fromHost(char* to, const void* from, size_t bytes) = 0;
  virtual void copy(char* to, const char* from, size_t bytes) = 0;
  // Memory of the host that is copied from and to at full speed, until unpin().
  virtual void pin(void*, size_t) {}
  virtual void unpin(void*) {}
};

// Pages appear when they are touched.
Memory& hostMemory();

}  // namespace lockstep
