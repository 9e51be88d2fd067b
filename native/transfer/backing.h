// Where the bytes of an arena are kept while they are away from the device: in host memory within a budget, or in a
// file. Bytes are given in chunks and taken back by the same chunks, in any order.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "core/memory.h"
#include "transfer/host_room.h"

namespace lockstep::transfer {

class Backing {
 public:
  virtual ~Backing() = default;
  // Keeps `bytes` bytes of `from`, on the device, as those at `offset`. A failure leaves what was kept before.
  virtual void put(size_t offset, const char* from, size_t bytes) = 0;
  // The inverse; the backing need not keep them any longer.
  virtual void take(size_t offset, char* to, size_t bytes) = 0;
};

// Host memory, taken and given chunk by chunk. put() throws what HostRoom::take throws.
std::unique_ptr<Backing> hostBacking(const std::string& name, HostRoom& host, Memory& device);

// A file of `bytes` bytes in `folder`. It has no name once it is open, so nothing is left of it however the process
// ends. Throws Error("OFFLOAD_FILE") with the path and the system's reason; the constructor already when there is no
// room for all bytes.
std::unique_ptr<Backing> fileBacking(const std::string& name, size_t bytes, const std::string& folder, Memory& device);

}  // namespace lockstep::transfer
