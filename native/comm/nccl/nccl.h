// A communicator for ranks that compute on GPUs: threads of one process, a GPU each. What lies on the host goes through
// another communicator, the control, and so does the agreement on every call; what lies on a GPU goes through NCCL.
//
// NCCL waits for nobody unheard: its communicators do not block, so a rank that waits in NCCL looks at the world as it
// does in the control, and leaves when that is dead. All ranks of a group exchange a byte when it is made, since NCCL
// connects two ranks when one first sends to the other, and starts nothing before. Several communicators of one GPU are
// used by several threads: what they start has one order on all GPUs (comm/nccl/launch_order.h).
//
// Three makers: nccl.cpp with nvcc's headers or with those of the emulation, and none.cpp without CUDA.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "comm/communicator.h"
#include "core/queue.h"

namespace lockstep::comm {

struct NcclStatus {
  std::string path;     // of the library; empty when there is none
  std::string version;  // "2.27.3"
  std::string problem;  // why it can not be used, and what to do; empty when it can
};

// What there is; never throws.
NcclStatus ncclStatus();

// How a communicator waits for what the rank computes on its GPU, before it touches buffers there.
struct Computation {
  // Returns when all that was given to the GPU is done. On the thread that communicates.
  std::function<void()> settle;
  // Returns what waits for all that was given to the GPU by now (Communicator::mark). Null: settle does.
  std::function<std::function<void()>()> mark = nullptr;
};

// Of the queue of a GPU (cuda/backend.h).
Computation computationOf(Queue&);

// Collective over the group of `control`, which must be of this process. The computation must work as long as this
// communicator and all that is split from it. A group of one needs no NCCL.
//
// Beyond the contract (comm/communicator.h): buffers of one collective lie all on the host or all on the ranks' GPUs,
// else COLLECTIVE_ARGUMENT; so do both ends of a message.
//
// Throws Error: NCCL_UNAVAILABLE, NCCL_VERSION, NCCL_FAILED; CUDA_GPUS_DIFFER for ranks on different kinds of GPU,
// CUDA_DEVICE for two ranks on one; what Queue (cuda/queue.h) throws.
std::unique_ptr<Communicator> overNccl(std::shared_ptr<Communicator> control, int gpu, Computation);

}  // namespace lockstep::comm
