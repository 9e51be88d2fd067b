// What the communicator over NCCL adds to the contract: buffers on GPUs, and ranks that do not fit together.
#include <chrono>
#include <cstdlib>
#include <memory>
#include <random>
#include <span>
#include <stdexcept>
#include <thread>
#include <vector>

#include "comm/background.h"
#include "comm/nccl/nccl.h"
#include "communicator_harness.h"
#include "core/error.h"
#include "cuda/backend.h"

namespace lockstep::contracts {
namespace {

using comm::Communicator;
using comm::Element;

constexpr int64_t kFloats = 1000;

// A rank on a GPU.
struct GpuRank {
  Communicator& group;
  Queue& queue;
  float *host, *gpu;  // kFloats each
};

// Zeros on a GPU.
class GpuFloats {
 public:
  GpuFloats(int gpu, int64_t count) : memory_(cuda::memoryOf(gpu)) {
    const size_t grain = memory_.grain();
    bytes_ = (static_cast<size_t>(count) * sizeof(float) + grain - 1) / grain * grain;
    at_ = memory_.map(bytes_);
    require(at_ != nullptr, "the GPU has no room");
  }
  ~GpuFloats() { memory_.unmap(at_, bytes_); }
  GpuFloats(const GpuFloats&) = delete;
  GpuFloats& operator=(const GpuFloats&) = delete;

  float* at() const { return reinterpret_cast<float*>(at_); }

 private:
  Memory& memory_;
  size_t bytes_ = 0;
  char* at_ = nullptr;
};

// Runs on ranks of a new local world that NCCL is laid over; not for other implementations.
void runOnGpus(CommunicatorTrial& t, int ranks, const std::function<int(int)>& gpuOf,
               const std::function<void(GpuRank&, Rank&)>& body,
               const std::function<void(const std::vector<Outcome>&)>& judge) {
  if (t.name() != "nccl") return;
  const auto& local = communicatorImplementations().front();
  judge(local.run(ranks, 60, [&](Rank& rank) {
    const int gpu = gpuOf(rank.world->rank());
    const auto queue = cuda::makeQueue(gpu, 1, 0);
    std::vector<float> host(kFloats);
    const GpuFloats memory(gpu, kFloats);
    rank.world = comm::overNccl(std::move(rank.world), gpu, comm::computationOf(*queue));
    GpuRank mine{*rank.world, *queue, host.data(), memory.at()};
    try {
      body(mine, rank);
    } catch (const std::exception& error) {
      rank.world->abort(error.what());
      rank.world = nullptr;
      throw;
    }
    rank.world = nullptr;
  }));
}

int ownGpu(int rank) {
  return rank;
}

// One rank's buffers on the host, the other's on its GPU; or one of each on a rank.
const CommunicatorRegistration kPlaces("nccl.places", 12, [](CommunicatorTrial& t) {
  const int64_t kind = t.integer(0, 3);
  runOnGpus(
      t, 2, ownGpu,
      [&](GpuRank& mine, Rank&) {
        Communicator& c = mine.group;
        float* const buffer = c.rank() == 0 ? mine.host : mine.gpu;
        if (kind == 0) c.allReduce(buffer, buffer, 10, "sum");
        if (kind == 1) c.allReduce(mine.host, mine.gpu, 10, "sum");
        if (kind == 2)
          c.rank() == 0 ? c.send(buffer, 3, Element::kFloat32, 1, "m")
                        : c.receive(buffer, 3, Element::kFloat32, 0, "m");
        if (kind == 3)
          c.rank() == 1 ? c.send(buffer, 3, Element::kFloat32, 0, "m")
                        : c.receive(buffer, 3, Element::kFloat32, 1, "m");
      },
      [&](const std::vector<Outcome>& outcomes) {
        t.expectAll(outcomes, "COLLECTIVE_ARGUMENT", {"host", "GPU", kind < 2 ? "at 'sum'" : "at 'm'"});
      });
});

// A rank with no piece of its own, and shares that are nobody's, still take part.
const CommunicatorRegistration kNothing("nccl.nothing", 2, [](CommunicatorTrial& t) {
  runOnGpus(
      t, 3, ownGpu,
      [&](GpuRank& mine, Rank&) {
        Communicator& c = mine.group;
        c.allReduce(nullptr, nullptr, 0, "empty");
        c.allGather(nullptr, nullptr, 0, Element::kByte, "empty");
        c.reduceScatterPieces(mine.gpu, kFloats, {}, "no shares");
        mine.queue.fill(mine.gpu, c.rank() + 1, kFloats * 4);
        const comm::Piece piece{mine.gpu, 0, 400};
        c.allGatherPieces(c.rank() == 1 ? std::span(&piece, 1) : std::span<const comm::Piece>(), mine.gpu, 4000, "one");
        mine.queue.toHost(mine.host, mine.gpu, kFloats * 4);
        const char* const bytes = reinterpret_cast<const char*>(mine.host);
        for (int i = 0; i < 4000; ++i) require(bytes[i] == (i < 400 ? 2 : c.rank() + 1), "a byte is wrong");
      },
      [&](const std::vector<Outcome>& outcomes) { t.expectAllFine(outcomes); });
});

// Sums of many chunks, and of many small shares.
const CommunicatorRegistration kChunks("nccl.chunks", 1, [](CommunicatorTrial& t) {
  constexpr int64_t kMany = (int64_t{3} << 20) + 5000;
  runOnGpus(
      t, 3, ownGpu,
      [&](GpuRank& mine, Rank&) {
        Communicator& c = mine.group;
        std::vector<float> host(kMany), back(kMany);
        for (int64_t i = 0; i < kMany; ++i) host[static_cast<size_t>(i)] = static_cast<float>(i % 1000 + c.rank());
        const GpuFloats memory(c.rank(), kMany);
        float* const gpu = memory.at();
        const auto expect = [&](const std::string& what, int64_t from, int64_t to) {
          mine.queue.toHost(back.data(), gpu, kMany * 4);
          for (int64_t i = from; i < to; ++i)
            require(back[static_cast<size_t>(i)] == static_cast<float>(3 * (i % 1000) + 3), what + ": a sum is wrong");
        };
        mine.queue.fromHost(gpu, host.data(), kMany * 4);
        c.allReduce(gpu, gpu, kMany, "sum");
        expect("all-reduce", 0, kMany);
        mine.queue.fromHost(gpu, host.data(), kMany * 4);
        std::vector<comm::Share> shares{{0, kMany - 6000, 1}};
        for (int i = 0; i < 600; ++i) shares.push_back({kMany - 6000 + 10 * i, 10, i % 3});
        c.reduceScatterPieces(gpu, kMany, shares, "shares");
        if (c.rank() == 1) expect("shares", 0, kMany - 6000);
        std::vector<comm::Piece> pieces;
        for (const comm::Share& share : shares) {
          if (share.owner == c.rank()) pieces.push_back({gpu + share.offset, share.offset * 4, share.count * 4});
        }
        c.allGatherPieces(pieces, gpu, kMany * 4, "pieces");
        expect("pieces", 0, kMany);
      },
      [&](const std::vector<Outcome>& outcomes) { t.expectAllFine(outcomes); });
});

// A send ends when its own message was received, whatever else the receiver waits for in the same exchange.
const CommunicatorRegistration kApart("nccl.messagesApart", 3, [](CommunicatorTrial& t) {
  runOnGpus(
      t, 3, ownGpu,
      [&](GpuRank& mine, Rank& rank) {
        Communicator& c = mine.group;
        if (c.rank() == 0) {
          c.send(mine.gpu, kFloats, Element::kFloat32, 1, "first");
          c.send(mine.host, 1, Element::kFloat32, 2, "go on");
        } else if (c.rank() == 1) {
          const comm::Incoming both[] = {{0, mine.gpu, kFloats, Element::kFloat32},
                                         {2, mine.host, 1, Element::kFloat32}};
          c.exchange({}, both, "both");
        } else {
          c.receive(mine.host, 1, Element::kFloat32, 0, "go on");
          c.send(mine.host, 1, Element::kFloat32, 1, "second");
        }
        rank.mark();
      },
      [&](const std::vector<Outcome>& outcomes) { t.expectAllFine(outcomes); });
});

// A call dies on all ranks, and so does every later one.
void dies(Communicator& group, const std::function<void()>& call) {
  bool thrown = false;
  try {
    call();
  } catch (const Error&) {
    thrown = true;
  }
  require(thrown, "a call went well that one rank could not make");
  group.barrier("later");
}

// What NCCL says to one rank, at once or while the bytes move, all of them say.
const CommunicatorRegistration kFails("nccl.fails", 1, [](CommunicatorTrial& t) {
  for (const char* const fault : {"nccl-call", "nccl-later"}) {
    t.note(fault);
    setenv("LOCKSTEP_EMULATION_FAULT", fault, 1);
    runOnGpus(
        t, 3, ownGpu,
        [&](GpuRank& mine, Rank&) {
          dies(mine.group, [&] { mine.group.allReduce(mine.gpu, mine.gpu, kFloats, "sum"); });
        },
        [&](const std::vector<Outcome>& outcomes) {
          unsetenv("LOCKSTEP_EMULATION_FAULT");
          t.expectAll(outcomes, "NCCL_FAILED",
                      {"group 'world', rank 1: all-reduce 0 of 1000 float32 at 'sum'",
                       "NCCL says: unhandled system error", "in barrier", "at 'later'"});
        });
  }
});

// A rank that can not join ends the others, which wait for it in NCCL.
const CommunicatorRegistration kJoins("nccl.joins", 1, [](CommunicatorTrial& t) {
  setenv("LOCKSTEP_EMULATION_FAULT", "nccl-init", 1);
  const auto began = std::chrono::steady_clock::now();
  runOnGpus(
      t, 3, ownGpu, [](GpuRank&, Rank&) {},
      [&](const std::vector<Outcome>& outcomes) {
        unsetenv("LOCKSTEP_EMULATION_FAULT");
        t.expectAll(outcomes, "NCCL_FAILED",
                    {"group 'world', rank 1: split 0 at 'a group of GPUs'",
                     "joining a group: NCCL says: unhandled system error"});
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        if (took.count() > 1) t.fail("the ranks ended after " + std::to_string(took.count()) + " s");
      });
  unsetenv("LOCKSTEP_EMULATION_FAULT");
});

// The first messages between two ranks, of which one has both at once and the other one after the other.
const CommunicatorRegistration kFirst("nccl.firstMessages", 20, [](CommunicatorTrial& t) {
  const bool together = t.integer(0, 1) == 1;
  runOnGpus(
      t, 2, ownGpu,
      [&](GpuRank& mine, Rank&) {
        Communicator& c = mine.group;
        const int other = 1 - c.rank();
        float* const to = mine.gpu + 500;
        mine.queue.fill(mine.gpu, c.rank() + 1, 400);
        const comm::Outgoing out{other, mine.gpu, 100, Element::kFloat32};
        const comm::Incoming in{other, to, 100, Element::kFloat32};
        if (c.rank() == 0 || together) {
          c.exchange({&out, 1}, {&in, 1}, "both");
        } else {
          std::this_thread::sleep_for(std::chrono::milliseconds(5));
          c.receive(to, 100, Element::kFloat32, 0, "activations");
          c.send(mine.gpu, 100, Element::kFloat32, 0, "gradients");
        }
        mine.queue.toHost(mine.host, to, 400);
        const char* const bytes = reinterpret_cast<const char*>(mine.host);
        for (int i = 0; i < 400; ++i) require(bytes[i] == other + 1, "a byte is wrong");
      },
      [&](const std::vector<Outcome>& outcomes) { t.expectAllFine(outcomes); });
});

// Two communicators on the same GPUs, of two threads that come in different orders.
const CommunicatorRegistration kSharedGpus("nccl.sharedGpus", 3, [](CommunicatorTrial& t) {
  const auto seed = static_cast<unsigned>(t.integer(1, 1 << 20));
  runOnGpus(
      t, 3, ownGpu,
      [&](GpuRank& mine, Rank&) {
        Communicator& c = mine.group;
        const int next = (c.rank() + 1) % 3, before = (c.rank() + 2) % 3;
        std::minstd_rand random(seed + static_cast<unsigned>(c.rank()));
        const auto pause = [](uint32_t drawn) { std::this_thread::sleep_for(std::chrono::microseconds(drawn % 1000)); };
        comm::Background behind(c.duplicate("behind"));
        mine.queue.fill(mine.gpu, 0, kFloats * 4);
        for (int i = 0; i < 30; ++i) {
          behind.submit([&, drawn = random()](Communicator& group) {
            pause(drawn);
            group.allReduce(mine.gpu, mine.gpu, 100, "behind");
          });
        }
        for (int i = 0; i < 30; ++i) {
          pause(random());
          const comm::Outgoing out{next, mine.gpu + 400, 100, Element::kFloat32};
          const comm::Incoming in{before, mine.gpu + 500, 100, Element::kFloat32};
          i % 2 == 0 ? c.exchange({&out, 1}, {&in, 1}, "ring")
                     : c.allReduce(mine.gpu + 600, mine.gpu + 600, 100, "sum");
        }
        behind.drain();
      },
      [&](const std::vector<Outcome>& outcomes) { t.expectAllFine(outcomes); });
});

// Unequal shares are a mismatch on all ranks, from then on.
const CommunicatorRegistration kShares("nccl.shares", 3, [](CommunicatorTrial& t) {
  const int odd = static_cast<int>(t.integer(1, 2));
  runOnGpus(
      t, 3, ownGpu,
      [&](GpuRank& mine, Rank&) {
        const comm::Share share{0, mine.group.rank() == odd ? 12 : 10, 0};
        dies(mine.group, [&] { mine.group.reduceScatterPieces(mine.gpu, kFloats, {&share, 1}, "shares"); });
      },
      [&](const std::vector<Outcome>& outcomes) {
        t.expectAll(outcomes, "COLLECTIVE_MISMATCH",
                    {"reduce-scatter of pieces 0", "at 'shares'", "10 elements at offset 0 for rank 0, as of rank 0",
                     "12 elements at offset 0 for rank 0 from rank " + std::to_string(odd), "at 'later'"});
      });
});

// What the rank's own computation throws ends the world.
const CommunicatorRegistration kSettle("nccl.settle", 1, [](CommunicatorTrial& t) {
  if (t.name() != "nccl") return;
  const auto outcomes = communicatorImplementations().front().run(2, 60, [](Rank& rank) {
    const int r = rank.world->rank();
    rank.world = comm::overNccl(std::move(rank.world), r, {[r] {
                                  if (r == 1) throw Error("CUDA_FAILED", "planted");
                                }});
    const GpuFloats memory(r, 1);
    rank.world->allReduce(memory.at(), memory.at(), 1, "sum");
  });
  t.expectAll(outcomes, "CUDA_FAILED", {"group 'world', rank 1: all-reduce 0 of 1 float32 at 'sum': planted"});
});

// Work behind a computation waits for what was given to the GPU before it, not for what follows.
const CommunicatorRegistration kMark("nccl.mark", 1, [](CommunicatorTrial& t) {
  if (t.name() != "nccl") return;
  t.expectAllFine(communicatorImplementations().front().run(2, 60, [](Rank& rank) {
    const int r = rank.world->rank();
    int given = 0, awaited = -1;
    const auto mark = [&]() -> std::function<void()> { return [&, now = given] { awaited = now; }; };
    rank.world =
        comm::overNccl(std::move(rank.world), r, {[] { require(false, "work waits for all that was given"); }, mark});
    const GpuFloats memory(r, 1);
    comm::Background behind(rank.world->duplicate("behind"));
    for (given = 1; given <= 3; ++given) {
      const auto ticket =
          behind.submit([&](Communicator& group) { group.allReduce(memory.at(), memory.at(), 1, "sum"); });
      const int before = given++;
      behind.wait(ticket);
      require(awaited == before, "work does not wait for what was given before it");
    }
  }));
});

const CommunicatorRegistration kDiffer("nccl.gpusDiffer", 1, [](CommunicatorTrial& t) {
  if (t.name() != "nccl") return;
  setenv("LOCKSTEP_EMULATION_FAULT", "mixed", 1);
  std::vector<Outcome> differ;
  runOnGpus(
      t, 2, ownGpu, [](GpuRank&, Rank&) {}, [&](const auto& outcomes) { differ = outcomes; });
  unsetenv("LOCKSTEP_EMULATION_FAULT");
  t.expectAll(differ, "CUDA_GPUS_DIFFER", {"rank 0 is on GPU 0 (emulated sm_80", "rank 1 is on GPU 1 (emulated sm_90"});
  runOnGpus(
      t, 2, [](int) { return 3; }, [](GpuRank&, Rank&) {},
      [&](const auto& outcomes) {
        t.expectAll(outcomes, "CUDA_DEVICE", {"rank 0 is on GPU 3", "rank 1"});
      });
});

}  // namespace
}  // namespace lockstep::contracts
