// Where a rank stands among those that compute one model together, and how it talks to them. Of `data` replicas of the
// model each is a pipeline of stages, each stage a tensor group: rank = (replica * pipeline + stage) * tensor + place.
#pragma once

#include <memory>
#include <utility>

#include "comm/background.h"
#include "comm/communicator.h"

namespace lockstep::model {

struct Degrees {
  int pipeline = 1, tensor = 1, data = 1;
  int keyValueRanks = 1;  // ranks that share a key/value head: tensor / G where that is more than one
  bool tiedEnds = false;  // the first and the last stage hold the embedding, each for its end
};

struct Parallel {
  std::shared_ptr<comm::Communicator> world;  // null: the rank is alone
  // Null for a group of one.
  std::unique_ptr<comm::Communicator> replica, tensor, pipeline, data, keyValue, ends;
  // Over `data` as well, behind the computation.
  std::unique_ptr<comm::Background> background;

  // Splits the world into its groups; all its ranks call this at the same time.
  void join(const Degrees& d) {
    const int rank = world->rank(), place = rank % d.tensor, stage = rank / d.tensor % d.pipeline;
    const int replicaRanks = d.tensor * d.pipeline, line = rank / replicaRanks * d.tensor + place;
    const auto group = [&](int size, int colour, const char* site) {
      auto own = world->split(colour, rank, site);
      return size > 1 ? std::move(own) : nullptr;
    };
    replica = group(replicaRanks, rank / replicaRanks, "replica");
    tensor = group(d.tensor, rank / d.tensor, "tensor");
    pipeline = group(d.pipeline, line, "pipeline");
    data = group(d.data, rank % replicaRanks, "data");
    if (data != nullptr) background = std::make_unique<comm::Background>(data->duplicate("background"));
    keyValue = group(d.keyValueRanks, rank / d.keyValueRanks, "keyValue");
    const bool end = d.tiedEnds && d.pipeline > 1 && (stage == 0 || stage == d.pipeline - 1);
    ends = group(2, end ? line : -1, "ends");
    joined_ = true;
  }

  bool joined() const { return world == nullptr || joined_; }
  int tensorRanks() const { return tensor == nullptr ? 1 : tensor->size(); }
  // The rank of its replica that has the answers: the first of the last stage.
  int leader() const { return replica == nullptr ? 0 : replica->size() - tensorRanks(); }
  bool firstStage() const { return pipeline == nullptr || pipeline->rank() == 0; }
  bool lastStage() const { return pipeline == nullptr || pipeline->rank() == pipeline->size() - 1; }

 private:
  bool joined_ = false;
};

}  // namespace lockstep::model
