// Communicators of GPUs (comm/nccl) under the contract suite, whose buffers are the host's.
#pragma once

#include <memory>

#include "comm/communicator.h"

namespace lockstep::contracts {

// Collective: NCCL over `control`, rank i on the emulated GPU i. Most calls copy their buffers to a GPU before and back
// after, the others stay on the host.
std::unique_ptr<comm::Communicator> onGpus(std::unique_ptr<comm::Communicator> control);

}  // namespace lockstep::contracts
