#include "comm/nccl/cards.h"

#include <cstring>
#include <string>

#include "core/error.h"
#include "cuda/queue.h"

namespace lockstep::comm::nccl {

namespace {

// What the ranks of a group tell each other of their GPUs.
struct Card {
  char name[256];
  int major, minor, gpu;

  std::string text(size_t rank) const {
    return "rank " + std::to_string(rank) + " is on GPU " + std::to_string(gpu) + " (" + name +
           ", compute capability " + std::to_string(major) + "." + std::to_string(minor) + ")";
  }
};

}  // namespace

std::vector<int> checkCards(Communicator& group, int gpu) {
  cudaDeviceProp properties{};
  cuda::check(cudaGetDeviceProperties(&properties, gpu), "asking for the GPU's properties");
  Card mine{};
  std::memcpy(mine.name, properties.name, sizeof mine.name);
  mine.major = properties.major, mine.minor = properties.minor, mine.gpu = gpu;
  std::vector<Card> all(static_cast<size_t>(group.size()));
  group.allGather(&mine, all.data(), sizeof mine, Element::kByte, "GPUs");
  for (size_t r = 1; r < all.size(); ++r) {
    const Card &a = all[0], &b = all[r];
    if (std::strcmp(a.name, b.name) != 0 || a.major != b.major || a.minor != b.minor) {
      throw Error("CUDA_GPUS_DIFFER", a.text(0) + ", " + b.text(r) +
                                          "; ranks need GPUs of one kind, for the same bits everywhere: choose them "
                                          "with CUDA_VISIBLE_DEVICES");
    }
    for (size_t other = 0; other < r; ++other) {
      if (all[other].gpu != b.gpu) continue;
      throw Error("CUDA_DEVICE", all[other].text(other) + ", and so is rank " + std::to_string(r) +
                                     "; every rank needs a GPU of its own");
    }
  }
  std::vector<int> gpus;
  for (const Card& card : all) gpus.push_back(card.gpu);
  return gpus;
}

}  // namespace lockstep::comm::nccl
