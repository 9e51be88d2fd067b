#include <algorithm>
#include <cstring>
#include <memory>

#include "binding/bench.h"
#include "comm/local/local.h"
#include "core/arena.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace lockstep::binding {

namespace {

using comm::Operation;

// Shorter collectives are run as often as to move this much, so that starting the threads does not count.
constexpr int64_t kLeastBytes = int64_t{8} << 20;

float valueOf(int rank, int64_t i) {
  const uint32_t hash = (static_cast<uint32_t>(i) * 2654435761u) ^ (static_cast<uint32_t>(rank + 1) * 2246822519u);
  return static_cast<float>(hash >> 8) * 0x1p-24f - 0.5f;
}

// Neighbours, then their sums; an odd one out passes up.
float sumOverRanks(int ranks, int64_t i) {
  float level[comm::kMaxRanks];
  for (int r = 0; r < ranks; ++r) level[r] = valueOf(r, i);
  for (int n = ranks; n > 1; n = (n + 1) / 2) {
    for (int k = 0; k < n / 2; ++k) level[k] = level[2 * k] + level[2 * k + 1];
    if (n % 2 == 1) level[n / 2] = level[n - 1];
  }
  return level[0];
}

class Collective {
 public:
  Collective(Operation operation, int ranks, int64_t bytes)
      : operation_(operation), pool_(ranks), world_(comm::localWorld(ranks)), share_(bytes / 4 / ranks) {
    for (int r = 0; r < ranks; ++r)
      buffers_.push_back(std::make_unique<Arena>("bench", static_cast<size_t>(ranks * share_ * 4)));
  }

  void run(int64_t times) {
    pool_.each([&](int rank) {
      for (int64_t i = 0; i < times; ++i) once(*world_[static_cast<size_t>(rank)]);
    });
  }

  // Each thread copies half of its buffer to the other half.
  void copy(int64_t times) {
    pool_.each([&](int rank) {
      const int64_t half = count() / 2;
      for (int64_t i = 0; i < times; ++i) std::memcpy(buffer(rank) + half, buffer(rank), static_cast<size_t>(half * 4));
    });
  }

  bool verify() {
    pool_.each([&](int rank) {
      for (int64_t i = 0; i < count(); ++i) buffer(rank)[i] = valueOf(rank, i);
    });
    run(1);
    std::vector<char> right(world_.size());
    pool_.each([&](int rank) { right[static_cast<size_t>(rank)] = isRight(rank); });
    return std::all_of(right.begin(), right.end(), [](char ok) { return ok; });
  }

  // Sums of sums of zeros stay zeros.
  void clear() {
    pool_.each([&](int rank) { std::fill_n(buffer(rank), count(), 0.0f); });
  }

  int ranks() const { return static_cast<int>(world_.size()); }
  int64_t count() const { return ranks() * share_; }

 private:
  float* buffer(int rank) { return static_cast<float*>(buffers_[static_cast<size_t>(rank)]->at(0, 0, "bench")); }

  void once(comm::Communicator& c) {
    float* const own = buffer(c.rank());
    float* const mine = own + c.rank() * share_;
    if (operation_ == Operation::kAllGather) {
      c.allGather(mine, own, share_, comm::Element::kFloat32, "bench");
    } else if (operation_ == Operation::kReduceScatter) {
      c.reduceScatter(own, mine, share_, "bench");
    } else {
      c.allReduce(own, own, count(), "bench");
    }
  }

  bool isRight(int rank) {
    const bool scatters = operation_ == Operation::kReduceScatter, gathers = operation_ == Operation::kAllGather;
    const int64_t begin = scatters ? rank * share_ : 0, end = scatters ? begin + share_ : count();
    for (int64_t i = begin; i < end; ++i) {
      const float expected = gathers ? valueOf(static_cast<int>(i / share_), i) : sumOverRanks(ranks(), i);
      if (std::memcmp(&expected, buffer(rank) + i, 4) != 0) return false;
    }
    return true;
  }

  Operation operation_;
  ThreadPool pool_;
  std::vector<std::unique_ptr<comm::Communicator>> world_;
  int64_t share_;
  std::vector<std::unique_ptr<Arena>> buffers_;
};

}  // namespace

BenchResult benchCollective(Operation operation, int ranks, int64_t bytes, int runs) {
  Collective collective(operation, ranks, bytes);
  BenchResult result;
  result.verified = collective.verify();
  collective.clear();
  const int64_t times = std::max<int64_t>(1, kLeastBytes / bytes);
  const int64_t half = collective.count() / 2 * 4;
  const int64_t moved = collective.count() / ranks * (ranks - 1) * 4 * (operation == Operation::kAllReduce ? 2 : 1);
  result.work = static_cast<double>(moved * times);
  result.ceilingWork = static_cast<double>(half * times);
  measureInTurn(
      result, runs, [&] { collective.run(times); }, [&] { collective.copy(times); });
  return result;
}

}  // namespace lockstep::binding
