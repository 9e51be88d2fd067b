// Moves slices between the memories of a group's ranks: the executor of the lists that layout/ makes
// (transition-plan.ts, reshard-plan.ts). A list in which every rank sends the same slices to the same places of all
// others is one all-gather, into place where source and destination are one memory; any other list is one exchange of
// messages. What goes to another rank is summed by its sender before and by its receiver after, and the sums must be
// equal; what a rank copies for itself is not.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "core/arena.h"
#include "core/queue.h"

namespace lockstep::transfer {

// Runs of equal length at equal distances, from the memory of rank `from` of the group to that of rank `to`.
struct Slice {
  std::string tensor;
  int from = 0, to = 0;
  int64_t sourceOffset = 0, destinationOffset = 0;  // bytes
  int64_t bytes = 0;                                // of one run
  int64_t count = 1, sourceStride = 0, destinationStride = 0;

  int64_t total() const { return bytes * count; }
  int64_t sourceEnd() const { return sourceOffset + (count - 1) * sourceStride + bytes; }
  int64_t destinationEnd() const { return destinationOffset + (count - 1) * destinationStride + bytes; }
};

// 64 bits of the runs of one slice: any single changed bit changes them.
uint64_t checksum(const char* data, int64_t bytes, int64_t count, int64_t stride);

struct TransferResult {
  int64_t receivedBytes = 0, sentBytes = 0;  // by the communicator's count
  double moveSeconds = 0, checkSeconds = 0;
};

class Transfer {
 public:
  // Every rank of the group has the same slices; `ranks` are the group's members as messages name them. A null
  // communicator is a group of one. Throws Error("TRANSFER_PLAN") for a slice that cannot be.
  Transfer(std::shared_ptr<comm::Communicator>, std::shared_ptr<Arena> source, std::shared_ptr<Arena> destination,
           std::vector<Slice> slices, std::vector<int> ranks);

  // Before the first run, all ranks together: the group becomes connect(group), for what lies on the device.
  template <class Connect>
  void connect(const Connect& connect) {
    if (connected_) return;
    communicator_ = connect(std::move(communicator_));
    connected_ = true;
  }

  // All ranks together. Throws Error("WEIGHTS_DIFFER") where what arrived is not what was sent. An error of one rank
  // ends the group's communicator, so that the calls of all end.
  TransferResult run(Queue&, bool check);

  // Throws Error("WEIGHTS_CHANGED") when what the last checked run() sent is not what lies there now.
  void verify(Queue&) const;

  bool gathers() const { return gathers_; }

 private:
  struct Incoming {
    size_t slice;
    size_t place;  // among what its sender sends
  };

  void validate() const;
  bool isGather() const;
  std::vector<size_t> between(int from, int to) const;
  std::vector<size_t> sentBy(int rank) const;
  void runChecked(Queue&, TransferResult&);
  void move(Queue&, TransferResult&);
  void gather();
  void exchange(Queue&);
  void copyLocal(Queue&);
  std::vector<uint64_t> sumsOfSent(Queue&) const;
  // Checksums of slices that lie in an arena, on the source's side or the destination's.
  std::vector<uint64_t> sumsOf(Queue&, Arena&, const char* base, const std::vector<size_t>& slices, bool source) const;
  char* source() const;
  char* destination() const;

  std::shared_ptr<comm::Communicator> communicator_;
  std::shared_ptr<Arena> source_, destination_;
  std::vector<Slice> slices_;
  std::vector<int> ranks_;
  int rank_ = 0, size_ = 1;
  bool gathers_ = false, connected_ = false;
  size_t mostSent_ = 0;
  int64_t sourceEnd_ = 0, destinationEnd_ = 0, gatheredEnd_ = 0;
  std::vector<size_t> sent_;
  std::vector<Incoming> incoming_;
  std::vector<uint64_t> sums_;  // of sent_, by the last checked run()
};

}  // namespace lockstep::transfer
