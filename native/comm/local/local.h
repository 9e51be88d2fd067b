// Ranks that are threads of one process. Bytes go straight from the sender's buffer to the receiver's.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace lockstep::comm {

struct LocalOptions {
  std::string name = "world";
  double timeoutSeconds = 300;
};

// One handle per rank, 1 .. kMaxRanks of them. No thread is started. Throws Error("RANKS_INVALID").
std::vector<std::unique_ptr<Communicator>> localWorld(int ranks, const LocalOptions& = {});

}  // namespace lockstep::comm
