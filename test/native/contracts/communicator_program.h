// Random programs of calls over a world and groups split from it: the same for every rank of equal seed. Each step is
// verified by the ranks that take part, byte for byte, against plain loops.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "communicator_harness.h"

namespace lockstep::contracts {

// The order of a sum across ranks, as plainly as it can be said: level by level, an odd one out passes up.
float plainTree(std::vector<float> level);

// A number that depends on all arguments, of either sign and of very different sizes.
float valueOf(uint64_t seed, int rank, int64_t index);

struct Message {
  int from = 0, to = 0;
  int64_t count = 0;
};

struct Step {
  int group = 0;  // index into Program::groups
  comm::Operation operation = comm::Operation::kBarrier;
  comm::Element element = comm::Element::kFloat32;
  int64_t count = 0;
  int root = 0;  // modulo the size of the group
  bool inPlace = false;
  uint64_t seed = 0;
  // Of operation kSend: one exchange, or else one message by send and receive.
  bool exchange = false;
  std::vector<Message> messages;
  std::string site;

  // The messages between the members of a group of this size.
  std::vector<Message> messagesAmong(int size) const;
};

// One split of an earlier group: members of each colour by their ranks in the world, in the new order.
struct Grouping {
  int parent = -1;
  std::vector<int> colours, keys;  // by rank in the world
  std::vector<std::vector<int>> members;

  const std::vector<int>* of(int worldRank) const;
};

struct Program {
  int ranks = 1;
  std::vector<Grouping> groups;  // the first is the world
  std::vector<Step> steps;       // the last is a barrier of the world

  // Whether a rank has to do with others in a step.
  bool involves(const Step&, int worldRank) const;
};

Program drawProgram(uint64_t seed, int ranks, int steps, int64_t largest);

// The handles of one rank, and its steps.
class ProgramRank {
 public:
  ProgramRank(const Program&, comm::Communicator& world);

  // Null where the rank is in no such group.
  comm::Communicator* handle(int group) { return group == 0 ? &world_ : groups_[static_cast<size_t>(group)].get(); }
  // Throws Failure when a result is wrong.
  void run(const Step&);

 private:
  void collective(const Step&, comm::Communicator&, const std::vector<int>& members);
  void messages(const Step&, comm::Communicator&, const std::vector<int>& members);

  const Program& program_;
  comm::Communicator& world_;
  int worldRank_;
  std::vector<std::unique_ptr<comm::Communicator>> groups_;
};

// All steps, each by `runStep` when one is given; errors abort the world while the handles still live.
using RunStep = std::function<void(ProgramRank&, size_t step)>;
void runProgram(const Program&, Rank&, const RunStep& runStep = nullptr);

}  // namespace lockstep::contracts
