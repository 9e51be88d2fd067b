#include "communicator_program.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <exception>
#include <iterator>

#include "harness.h"

namespace lockstep::contracts {

using comm::Communicator;
using comm::Element;
using comm::Operation;

namespace {

constexpr int kMostMembers = 16;

uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_); }
  int64_t count(int64_t largest) {
    constexpr int64_t kCounts[] = {0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 100, 511, 513, 1025};
    const int64_t kind = integer(0, 9);
    if (kind == 0) return largest;
    return std::min(largest, kind < 7 ? kCounts[integer(0, 13)] : integer(0, largest));
  }
  uint64_t seed() { return random_(); }

 private:
  std::mt19937_64 random_;
};

Grouping drawGrouping(Draw& draw, const std::vector<Grouping>& groups, int ranks) {
  Grouping g;
  g.parent = static_cast<int>(draw.integer(0, static_cast<int64_t>(groups.size()) - 1));
  const int64_t colours = draw.integer(1, 3);
  for (int r = 0; r < ranks; ++r) {
    g.colours.push_back(draw.integer(0, 15) == 0 ? -1 : static_cast<int>(draw.integer(0, colours - 1)));
    g.keys.push_back(static_cast<int>(draw.integer(-2, 2)));
  }
  for (const std::vector<int>& parent : groups[static_cast<size_t>(g.parent)].members) {
    for (int colour = 0; colour < colours; ++colour) {
      std::vector<int> members;
      for (const int r : parent) {
        if (g.colours[static_cast<size_t>(r)] == colour) members.push_back(r);
      }
      std::stable_sort(members.begin(), members.end(),
                       [&](int a, int b) { return g.keys[static_cast<size_t>(a)] < g.keys[static_cast<size_t>(b)]; });
      if (!members.empty()) g.members.push_back(members);
    }
  }
  return g;
}

std::vector<Message> drawMessages(Draw& draw, bool exchange, int64_t largest) {
  std::vector<Message> messages;
  if (!exchange) {
    return {{static_cast<int>(draw.integer(0, 99)), static_cast<int>(draw.integer(0, 99)), draw.count(largest)}};
  }
  const int64_t often = draw.integer(1, 4);
  for (int from = 0; from < kMostMembers; ++from) {
    for (int to = 0; to < kMostMembers; ++to) {
      for (int64_t k = draw.integer(-often, 2); k > 0; --k) messages.push_back({from, to, draw.count(largest / 8)});
    }
  }
  return messages;
}

// Bytes of a rank for an element: float32 numbers, or noise.
std::vector<char> contents(uint64_t seed, int rank, Element element, int64_t count) {
  std::vector<char> bytes(static_cast<size_t>(count * comm::bytesOf(element)));
  if (element == Element::kFloat32) {
    for (int64_t i = 0; i < count; ++i) {
      const float x = valueOf(seed, rank, i);
      std::memcpy(bytes.data() + 4 * i, &x, 4);
    }
  } else {
    for (size_t i = 0; i < bytes.size(); ++i)
      bytes[i] = static_cast<char>(mixed(seed + static_cast<uint64_t>(rank) * 7919 + i));
  }
  return bytes;
}

std::vector<float> floats(uint64_t seed, int rank, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = valueOf(seed, rank, i);
  return values;
}

void requireSame(const void* expected, const void* actual, size_t bytes, const Step& step) {
  if (bytes == 0 || std::memcmp(expected, actual, bytes) == 0) return;
  const char *a = static_cast<const char*>(expected), *b = static_cast<const char*>(actual);
  size_t i = 0;
  while (a[i] == b[i]) ++i;
  require(false, step.site + ": byte " + std::to_string(i) + " of " + std::to_string(bytes) + " differs");
}

void allGather(const Step& step, Communicator& c, const std::vector<int>& members) {
  const size_t bytes = static_cast<size_t>(step.count * comm::bytesOf(step.element));
  const auto of = [&](int i) { return contents(step.seed, members[static_cast<size_t>(i)], step.element, step.count); };
  const std::vector<char> mine = of(c.rank());
  std::vector<char> all(bytes * members.size(), 'x');
  char* const own = all.data() + static_cast<size_t>(c.rank()) * bytes;
  if (step.inPlace) std::copy(mine.begin(), mine.end(), own);
  c.allGather(step.inPlace ? own : mine.data(), all.data(), step.count, step.element, step.site);
  for (int i = 0; i < c.size(); ++i) {
    requireSame(of(i).data(), all.data() + static_cast<size_t>(i) * bytes, bytes, step);
  }
}

// The bytes are cut where a hash says so, and each piece belongs to one rank or to none.
void allGatherPieces(const Step& step, Communicator& c, const std::vector<int>& members) {
  const std::vector<char> whole = contents(step.seed, 0, Element::kByte, step.count);
  std::vector<char> expected(whole.size(), 'x'), received(whole.size(), 'x');
  std::vector<std::vector<char>> sources;
  std::vector<comm::Piece> pieces;
  for (int64_t begin = 0, k = 0; begin < step.count; ++k) {
    const uint64_t hash = mixed(step.seed + static_cast<uint64_t>(k));
    const int64_t bytes = std::min<int64_t>(step.count - begin, static_cast<int64_t>(hash % 997));
    const int owner = static_cast<int>((hash >> 20) % (members.size() + 1));
    if (owner < c.size()) std::copy_n(whole.begin() + begin, bytes, expected.begin() + begin);
    if (owner == c.rank()) {
      const bool inPlace = step.inPlace && (hash >> 40) % 2 == 0;
      if (inPlace) std::copy_n(whole.begin() + begin, bytes, received.begin() + begin);
      sources.emplace_back(whole.begin() + begin, whole.begin() + begin + bytes);
      pieces.push_back({inPlace ? received.data() + begin : sources.back().data(), begin, bytes});
    }
    begin += std::max<int64_t>(bytes, 1);
  }
  c.allGatherPieces(pieces, received.data(), step.count, step.site);
  requireSame(expected.data(), received.data(), expected.size(), step);
}

void reduceScatter(const Step& step, Communicator& c, const std::vector<int>& members) {
  std::vector<float> send = floats(step.seed, members[static_cast<size_t>(c.rank())], step.count * c.size());
  std::vector<float> apart(static_cast<size_t>(step.count));
  float* const receive = step.inPlace ? send.data() + c.rank() * step.count : apart.data();
  c.reduceScatter(send.data(), receive, step.count, step.site);
  for (int64_t i = 0; i < step.count; ++i) {
    std::vector<float> addends;
    for (const int r : members) addends.push_back(valueOf(step.seed, r, c.rank() * step.count + i));
    require(std::bit_cast<uint32_t>(plainTree(addends)) == std::bit_cast<uint32_t>(receive[i]),
            step.site + ": element " + std::to_string(i) + " has other bits than the tree");
  }
}

// The elements are cut where a hash says so, and each share belongs to one rank or to none; all are gathered again.
void reduceScatterPieces(const Step& step, Communicator& c, const std::vector<int>& members) {
  std::vector<float> buffer = floats(step.seed, members[static_cast<size_t>(c.rank())], step.count);
  const std::vector<float> before = buffer;
  std::vector<comm::Share> shares;
  for (int64_t begin = 0, k = 0; begin < step.count; ++k) {
    const uint64_t hash = mixed(step.seed + static_cast<uint64_t>(k));
    const int64_t count = std::min<int64_t>(step.count - begin, static_cast<int64_t>(hash % 251));
    const int owner = static_cast<int>((hash >> 20) % (members.size() + 1));
    if (owner < c.size()) shares.push_back({begin, count, owner});
    begin += std::max<int64_t>(count, 1);
  }
  if (step.root % 2 == 0) std::reverse(shares.begin(), shares.end());
  c.reduceScatterPieces(buffer.data(), step.count, shares, step.site);
  std::vector<bool> summed(buffer.size());
  std::vector<comm::Piece> own;
  for (const comm::Share& share : shares) {
    std::fill_n(summed.begin() + share.offset, share.count, true);
    if (share.owner == c.rank()) own.push_back({buffer.data() + share.offset, share.offset * 4, share.count * 4});
  }
  c.allGatherPieces(own, buffer.data(), step.count * 4, step.site);
  for (int64_t i = 0; i < step.count; ++i) {
    const size_t at = static_cast<size_t>(i);
    std::vector<float> addends;
    for (const int r : members) addends.push_back(valueOf(step.seed, r, i));
    const float expected = summed[at] ? plainTree(addends) : before[at];
    require(std::bit_cast<uint32_t>(expected) == std::bit_cast<uint32_t>(buffer[at]),
            step.site + ": element " + std::to_string(i) + " has other bits than " +
                (summed[at] ? "the tree" : "before, and is in no share"));
  }
}

void allReduce(const Step& step, Communicator& c, const std::vector<int>& members) {
  std::vector<float> send = floats(step.seed, members[static_cast<size_t>(c.rank())], step.count);
  std::vector<float> apart(send.size());
  float* const receive = step.inPlace ? send.data() : apart.data();
  c.allReduce(send.data(), receive, step.count, step.site);
  for (int64_t i = 0; i < step.count; ++i) {
    std::vector<float> addends;
    for (const int r : members) addends.push_back(valueOf(step.seed, r, i));
    require(std::bit_cast<uint32_t>(plainTree(addends)) == std::bit_cast<uint32_t>(receive[i]),
            step.site + ": element " + std::to_string(i) + " has other bits than the tree");
  }
}

void broadcast(const Step& step, Communicator& c, const std::vector<int>& members) {
  const int root = step.root % c.size();
  const std::vector<char> expected = contents(step.seed, members[static_cast<size_t>(root)], step.element, step.count);
  std::vector<char> data = contents(step.seed, members[static_cast<size_t>(c.rank())], step.element, step.count);
  c.broadcast(data.data(), step.count, step.element, root, step.site);
  requireSame(expected.data(), data.data(), expected.size(), step);
}

}  // namespace

std::vector<Message> Step::messagesAmong(int size) const {
  std::vector<Message> among;
  if (!exchange && size > 1) {
    const Message& m = messages[0];
    const int from = m.from % size;
    return {{from, (from + 1 + m.to % (size - 1)) % size, m.count}};
  }
  if (!exchange) return among;
  std::copy_if(messages.begin(), messages.end(), std::back_inserter(among),
               [&](const Message& m) { return m.from < size && m.to < size; });
  return among;
}

float plainTree(std::vector<float> level) {
  while (level.size() > 1) {
    std::vector<float> next;
    for (size_t i = 0; i + 1 < level.size(); i += 2) next.push_back(level[i] + level[i + 1]);
    if (level.size() % 2 == 1) next.push_back(level.back());
    level = next;
  }
  return level[0];
}

float valueOf(uint64_t seed, int rank, int64_t index) {
  const uint64_t hash = mixed(mixed(seed + static_cast<uint64_t>(index)) + static_cast<uint64_t>(rank));
  const float x = static_cast<float>(static_cast<int32_t>(hash)) * 0x1p-31f;
  const uint64_t kind = (hash >> 32) % 64;
  if (kind == 0) return std::bit_cast<float>(static_cast<uint32_t>(hash) & 0x807fffffu);  // denormal, or a zero
  return kind < 16 ? x * 1e6f : kind < 32 ? x * 1e-6f : x;
}

const std::vector<int>* Grouping::of(int worldRank) const {
  for (const std::vector<int>& list : members) {
    if (std::find(list.begin(), list.end(), worldRank) != list.end()) return &list;
  }
  return nullptr;
}

bool Program::involves(const Step& step, int worldRank) const {
  const std::vector<int>* members = groups[static_cast<size_t>(step.group)].of(worldRank);
  if (members == nullptr || members->size() < 2) return false;
  if (step.operation != Operation::kSend) return true;
  const auto place = static_cast<int>(std::find(members->begin(), members->end(), worldRank) - members->begin());
  const std::vector<Message> among = step.messagesAmong(static_cast<int>(members->size()));
  return std::any_of(among.begin(), among.end(),
                     [&](const Message& m) { return m.from != m.to && (m.from == place || m.to == place); });
}

Program drawProgram(uint64_t seed, int ranks, int steps, int64_t largest) {
  Draw draw(seed);
  Program program;
  program.ranks = ranks;
  Grouping world;
  world.members.emplace_back();
  for (int r = 0; r < ranks; ++r) world.members[0].push_back(r);
  program.groups.push_back(world);
  const int64_t splits = draw.integer(0, 3);
  for (int64_t i = 0; i < splits; ++i) program.groups.push_back(drawGrouping(draw, program.groups, ranks));
  constexpr Operation kOperations[] = {
      Operation::kAllGather, Operation::kAllGatherPieces, Operation::kReduceScatter, Operation::kReduceScatterPieces,
      Operation::kAllReduce, Operation::kBroadcast,       Operation::kBarrier,       Operation::kSend,
      Operation::kSend};
  constexpr Element kElements[] = {Element::kByte, Element::kBFloat16, Element::kFloat32};
  for (int i = 0; i < steps; ++i) {
    Step step;
    step.group = static_cast<int>(draw.integer(0, static_cast<int64_t>(program.groups.size()) - 1));
    step.operation = kOperations[draw.integer(0, 8)];
    step.element = kElements[draw.integer(0, 2)];
    step.count = draw.count(largest);
    step.root = static_cast<int>(draw.integer(0, kMostMembers - 1));
    step.inPlace = draw.integer(0, 1) == 1;
    step.exchange = draw.integer(0, 1) == 1;
    step.seed = draw.seed();
    step.site = "step." + std::to_string(i);
    if (step.operation == Operation::kSend) step.messages = drawMessages(draw, step.exchange, largest);
    program.steps.push_back(step);
  }
  Step last;
  last.site = "end";
  program.steps.push_back(last);
  return program;
}

ProgramRank::ProgramRank(const Program& program, Communicator& world)
    : program_(program), world_(world), worldRank_(world.rank()), groups_(program.groups.size()) {
  for (size_t g = 1; g < program.groups.size(); ++g) {
    const Grouping& grouping = program.groups[g];
    Communicator* const parent = handle(grouping.parent);
    if (parent == nullptr) continue;
    const size_t self = static_cast<size_t>(worldRank_);
    groups_[g] = parent->split(grouping.colours[self], grouping.keys[self], "split." + std::to_string(g));
    const std::vector<int>* const members = grouping.of(worldRank_);
    require((members == nullptr) == (groups_[g] == nullptr), "a split has the wrong members");
    if (members == nullptr) continue;
    require(groups_[g]->size() == static_cast<int>(members->size()), "a group has the wrong size");
    require((*members)[static_cast<size_t>(groups_[g]->rank())] == worldRank_, "a group has the wrong order");
  }
}

void ProgramRank::run(const Step& step) {
  Communicator* const c = handle(step.group);
  if (c == nullptr) return;
  const std::vector<int>& members = *program_.groups[static_cast<size_t>(step.group)].of(worldRank_);
  if (step.operation == Operation::kSend) {
    messages(step, *c, members);
  } else {
    collective(step, *c, members);
  }
}

void ProgramRank::collective(const Step& step, Communicator& c, const std::vector<int>& members) {
  switch (step.operation) {
    case Operation::kAllGather:
      return allGather(step, c, members);
    case Operation::kAllGatherPieces:
      return allGatherPieces(step, c, members);
    case Operation::kReduceScatter:
      return reduceScatter(step, c, members);
    case Operation::kReduceScatterPieces:
      return reduceScatterPieces(step, c, members);
    case Operation::kAllReduce:
      return allReduce(step, c, members);
    case Operation::kBroadcast:
      return broadcast(step, c, members);
    default:
      return c.barrier(step.site);
  }
}

void ProgramRank::messages(const Step& step, Communicator& c, const std::vector<int>& members) {
  std::vector<std::vector<char>> sent, received, expected;
  std::vector<comm::Outgoing> outgoing;
  std::vector<comm::Incoming> incoming;
  const std::vector<Message> among = step.messagesAmong(c.size());
  for (size_t i = 0; i < among.size(); ++i) {
    const Message& m = among[i];
    const auto bytes = [&] {
      return contents(step.seed + i, members[static_cast<size_t>(m.from)], step.element, m.count);
    };
    if (m.from == c.rank()) {
      sent.push_back(bytes());
      outgoing.push_back({m.to, sent.back().data(), m.count, step.element});
    }
    if (m.to == c.rank()) {
      expected.push_back(bytes());
      received.emplace_back(expected.back().size());
      incoming.push_back({m.from, received.back().data(), m.count, step.element});
    }
  }
  if (step.exchange) {
    c.exchange(outgoing, incoming, step.site);
  } else {
    for (const comm::Outgoing& m : outgoing) c.send(m.data, m.count, m.element, m.to, step.site);
    for (const comm::Incoming& m : incoming) c.receive(m.data, m.count, m.element, m.from, step.site);
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    requireSame(expected[i].data(), received[i].data(), expected[i].size(), step);
  }
}

void runProgram(const Program& program, Rank& rank, const RunStep& runStep) {
  ProgramRank mine(program, *rank.world);
  try {
    for (size_t i = 0; i < program.steps.size(); ++i) {
      if (runStep) {
        runStep(mine, i);
      } else {
        mine.run(program.steps[i]);
      }
    }
  } catch (const Failure& failure) {
    rank.world->abort(failure.message);
    throw;
  } catch (const std::exception& error) {
    rank.world->abort(error.what());
    throw;
  }
}

}  // namespace lockstep::contracts
