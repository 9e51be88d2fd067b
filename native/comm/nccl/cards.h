// The GPUs of a group, which must be of one kind, one for each rank.
#pragma once

#include <vector>

#include "comm/communicator.h"

namespace lockstep::comm::nccl {

// Collective. Returns the GPUs of all ranks. Throws Error("CUDA_GPUS_DIFFER") and Error("CUDA_DEVICE").
std::vector<int> checkCards(Communicator& group, int gpu);

}  // namespace lockstep::comm::nccl
