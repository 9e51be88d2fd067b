// Where a rank stands among those that compute one model together, and how it talks to them. A stage of the pipeline is
// one tensor group; ranks of equal place in their groups are one pipeline, in the order of the stages.
#pragma once

#include <memory>
#include <utility>

#include "comm/communicator.h"

namespace lockstep::model {

struct Parallel {
  std::shared_ptr<comm::Communicator> world;             // null: the rank is alone
  std::unique_ptr<comm::Communicator> tensor, pipeline;  // null for a group of one

  // Splits the world into its groups; all its ranks call this at the same time. Rank = stage * tensorRanks + place.
  void join(int tensorRanks) {
    const int rank = world->rank(), stages = world->size() / tensorRanks;
    auto stage = world->split(rank / tensorRanks, rank, "tensor");
    auto line = world->split(rank % tensorRanks, rank, "pipeline");
    if (tensorRanks > 1) tensor = std::move(stage);
    if (stages > 1) pipeline = std::move(line);
  }

  bool joined() const { return world == nullptr || tensor != nullptr || pipeline != nullptr; }
  int tensorRanks() const { return tensor == nullptr ? 1 : tensor->size(); }
  // The rank of the world that has the answers: the first of the last stage.
  int leader() const { return world == nullptr ? 0 : world->size() - tensorRanks(); }
  bool firstStage() const { return pipeline == nullptr || pipeline->rank() == 0; }
  bool lastStage() const { return pipeline == nullptr || pipeline->rank() == pipeline->size() - 1; }
};

}  // namespace lockstep::model
