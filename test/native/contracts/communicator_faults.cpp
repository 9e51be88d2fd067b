// What faults get: every rank an error, within a second, that names what is wrong. Each kind is planted at a random
// step of a random program, at a random rank.
#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "communicator_program.h"
#include "core/arena.h"
#include "core/error.h"
#include "harness.h"

namespace lockstep::contracts {
namespace {

using comm::Communicator;
using comm::Element;
using comm::Operation;

constexpr double kBoundSeconds = 1;

// Where and by whom: a step that ties the rank to others.
struct Fault {
  int rank = 0;
  size_t step = 0;
  uint64_t seed = 0;
};

Fault drawFault(CommunicatorTrial& t, const Program& program) {
  Fault fault;
  do {
    fault.rank = static_cast<int>(t.integer(0, program.ranks - 1));
    fault.step = static_cast<size_t>(t.integer(0, static_cast<int64_t>(program.steps.size()) - 1));
  } while (!program.involves(program.steps[fault.step], fault.rank));
  fault.seed = t.seed();
  return fault;
}

// The program, with `plant` in the place of the rank's step.
using Plant = std::function<void(Rank&, ProgramRank&, const Step&)>;

std::vector<Outcome> runWithFault(CommunicatorTrial& t, const Program& program, const Fault& fault, const Plant& plant,
                                  double timeoutSeconds = 60) {
  return t.run(
      program.ranks,
      [&](Rank& rank) {
        runProgram(program, rank, [&](ProgramRank& mine, size_t i) {
          if (rank.world->rank() != fault.rank || i != fault.step) return mine.run(program.steps[i]);
          rank.mark();
          plant(rank, mine, program.steps[i]);
        });
      },
      timeoutSeconds);
}

void expectWithin(CommunicatorTrial& t, const std::vector<Outcome>& outcomes, int faulty, double least, double most) {
  for (size_t i = 0; i < outcomes.size(); ++i) {
    const double after = outcomes[i].endedSeconds - outcomes[static_cast<size_t>(faulty)].markedSeconds;
    if (after < least || after > most) {
      t.fail("rank " + std::to_string(i) + " ended " + std::to_string(after) +
             " s after the fault: " + outcomes[i].message);
    }
  }
}

struct Planted {
  Program program;
  Fault fault;
  const Step& step() const { return program.steps[fault.step]; }
  std::string group() const {
    if (step().group == 0) return "world";
    return "split." + std::to_string(step().group) + ".";
  }
  // "rank 2" of the step's group.
  std::string rank() const {
    const std::vector<int>& members = *program.groups[static_cast<size_t>(step().group)].of(fault.rank);
    return "rank " + std::to_string(std::find(members.begin(), members.end(), fault.rank) - members.begin());
  }
};

Planted drawPlanted(CommunicatorTrial& t) {
  Planted planted;
  planted.program = drawProgram(t.seed(), static_cast<int>(t.integer(2, 8)), 20, 1500);
  planted.fault = drawFault(t, planted.program);
  t.note(std::to_string(planted.program.ranks) + " ranks, rank " + std::to_string(planted.fault.rank) + " at " +
         planted.step().site);
  return planted;
}

// A new world works after the dead one.
void expectAlive(CommunicatorTrial& t) {
  t.expectAllFine(t.run(2, [](Rank& rank) { rank.world->barrier("alive"); }));
}

const CommunicatorRegistration kThrow("faults.throw", 25, [](CommunicatorTrial& t) {
  const Planted p = drawPlanted(t);
  const auto outcomes = runWithFault(t, p.program, p.fault,
                                     [](Rank&, ProgramRank&, const Step&) { throw std::runtime_error("planted"); });
  for (int r = 0; r < p.program.ranks; ++r) {
    if (r == p.fault.rank) {
      t.expectOne(outcomes, r, "EXCEPTION", {"planted"});
    } else {
      t.expectOne(outcomes, r, "RANK_ABORTED",
                  {"group 'world'", "aborted by rank " + std::to_string(p.fault.rank), "planted", " in ", " at '"});
    }
  }
  expectWithin(t, outcomes, p.fault.rank, 0, kBoundSeconds);
  expectAlive(t);
});

const CommunicatorRegistration kAbort("faults.abort", 25, [](CommunicatorTrial& t) {
  const Planted p = drawPlanted(t);
  const auto outcomes = runWithFault(t, p.program, p.fault, [](Rank&, ProgramRank& mine, const Step& step) {
    mine.handle(step.group)->abort("planted");
    mine.run(step);
  });
  t.expectAll(outcomes, "RANK_ABORTED", {"group 'world", p.group(), "aborted by " + p.rank(), "planted", " at '"});
  expectWithin(t, outcomes, p.fault.rank, 0, kBoundSeconds);
  expectAlive(t);
});

// Another call than the others make: another operation, or the same with another count, element, root or site.
void callOtherwise(ProgramRank& mine, Step step, uint64_t seed) {
  Communicator& c = *mine.handle(step.group);
  std::vector<float> buffer(4096);
  if (seed % 3 == 0 || step.operation == Operation::kSend || step.operation == Operation::kBarrier) {
    if (step.operation == Operation::kAllReduce) {
      c.broadcast(buffer.data(), 5, Element::kFloat32, 0, "planted");
    } else {
      c.allReduce(buffer.data(), buffer.data(), 5, "planted");
    }
  } else if (seed % 3 == 1) {
    step.count += 1;
    mine.run(step);
  } else if (step.operation == Operation::kBroadcast && seed % 2 == 0) {
    step.root += 1;
    mine.run(step);
  } else if (step.operation == Operation::kAllGather && seed % 2 == 0) {
    step.element = step.element == Element::kByte ? Element::kFloat32 : Element::kByte;
    mine.run(step);
  } else {
    step.site = "planted";
    mine.run(step);
  }
}

const CommunicatorRegistration kOther("faults.otherCall", 60, [](CommunicatorTrial& t) {
  const Planted p = drawPlanted(t);
  const uint64_t seed = p.fault.seed;
  const auto outcomes = runWithFault(t, p.program, p.fault, [&](Rank&, ProgramRank& mine, const Step& step) {
    callOtherwise(mine, step, seed);
    require(false, "a different call passed");
  });
  // Who waits for a message of the rank later on may find the call before those of this step do.
  const std::string site = p.step().operation == Operation::kSend ? "planted" : p.step().site;
  t.expectAll(outcomes, "COLLECTIVE_MISMATCH",
              {"group 'world", p.group(), p.rank(), "expected", "received", " at '" + site + "'"});
  expectWithin(t, outcomes, p.fault.rank, 0, kBoundSeconds);
  expectAlive(t);
});

// A message of another size or element than its receiver wants.
const CommunicatorRegistration kOtherMessage("faults.otherMessage", 8, [](CommunicatorTrial& t) {
  const bool size = t.integer(0, 1) == 0, late = t.integer(0, 1) == 0;
  const auto outcomes = t.run(3, [&](Rank& rank) {
    Communicator& c = *rank.world;
    std::vector<float> buffer(100);
    if (c.rank() == 2) return c.barrier("rest");
    c.rank() == 0 ? c.send(buffer.data(), 10, Element::kFloat32, 1, "first")
                  : c.receive(buffer.data(), 10, Element::kFloat32, 0, "first");
    if ((c.rank() == 0) == late) std::this_thread::sleep_for(std::chrono::milliseconds(30));
    if (c.rank() == 0) {
      c.send(buffer.data(), size ? 11 : 10, size ? Element::kFloat32 : Element::kBFloat16, 1, "down");
    } else {
      c.receive(buffer.data(), 10, Element::kFloat32, 0, "up");
    }
    require(false, "a different message passed");
  });
  t.expectAll(outcomes, "COLLECTIVE_MISMATCH",
              {"group 'world'", "from rank 0 to rank 1", "expected receive 1 of 10 float32 from rank 0 at 'up'",
               "received send 1 of " + std::string(size ? "11 float32" : "10 bfloat16") + " to rank 1 at 'down'"});
});

const CommunicatorRegistration kSilent("faults.silent", 8, [](CommunicatorTrial& t) {
  constexpr double kTimeout = 0.5;
  const Planted p = drawPlanted(t);
  const auto outcomes = runWithFault(
      t, p.program, p.fault,
      [](Rank&, ProgramRank& mine, const Step& step) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1200));
        mine.run(step);
        require(false, "a late call passed");
      },
      kTimeout);
  t.expectAll(outcomes, "RANK_MISSING", {"group 'world", "expected", "nothing came for 0.5 s", " at '"});
  const std::string name = std::to_string(p.fault.rank);
  for (int r = 0; r < p.program.ranks; ++r) {
    const Outcome& o = outcomes[static_cast<size_t>(r)];
    const bool named = o.message.find("rank " + name + " (") != std::string::npos ||
                       o.message.find(" (" + name + " of the world)") != std::string::npos;
    if (!named) t.fail("rank " + std::to_string(r) + " does not name the silent rank: " + o.message);
    if (r == p.fault.rank) continue;
    const double after = o.endedSeconds - outcomes[static_cast<size_t>(p.fault.rank)].markedSeconds;
    if (after < 0.9 * kTimeout || after > kTimeout + kBoundSeconds) {
      t.fail("rank " + std::to_string(r) + " ended " + std::to_string(after) + " s after the fault");
    }
  }
  expectAlive(t);
});

// Rank 0 falls silent; 1 waits for it, and 2 for 1: all name 0.
const CommunicatorRegistration kChain("faults.chain", 4, [](CommunicatorTrial& t) {
  const auto outcomes = t.run(
      3,
      [](Rank& rank) {
        Communicator& c = *rank.world;
        const auto pair = c.split(c.rank() == 0 ? 0 : 1, 0, "pair");
        char byte = 0;
        if (c.rank() == 0) {
          std::this_thread::sleep_for(std::chrono::milliseconds(250));
          c.progress();
          std::this_thread::sleep_for(std::chrono::milliseconds(900));
        } else if (c.rank() == 1) {
          c.receive(&byte, 1, Element::kByte, 0, "from the silent");
        }
        pair->barrier("after the message");
      },
      0.5);
  t.expectAll(
      outcomes, "RANK_MISSING",
      {"group 'world': expected receive 0 of 1 bytes from rank 0 at 'from the silent' (of rank 1)", "; rank 0 ("});
});

// The others are at another call then, or wait in a group that the rank does not come to.
const CommunicatorRegistration kSkip("faults.skip", 8, [](CommunicatorTrial& t) {
  Planted p = drawPlanted(t);
  while (p.step().operation == Operation::kSend || p.fault.step + 1 == p.program.steps.size()) p = drawPlanted(t);
  const auto outcomes = runWithFault(
      t, p.program, p.fault, [](Rank&, ProgramRank&, const Step&) {}, 0.5);
  for (int r = 0; r < p.program.ranks; ++r) {
    const std::string& code = outcomes[static_cast<size_t>(r)].code;
    t.expectOne(outcomes, r, code == "RANK_MISSING" ? code : "COLLECTIVE_MISMATCH", {"group 'world", "expected"});
  }
  expectWithin(t, outcomes, p.fault.rank, 0, 0.5 * 1.25 + kBoundSeconds);
});

const CommunicatorRegistration kLeave("faults.leave", 25, [](CommunicatorTrial& t) {
  const Planted p = drawPlanted(t);
  const auto outcomes = t.run(p.program.ranks, [&](Rank& rank) {
    ProgramRank mine(p.program, *rank.world);
    for (size_t i = 0; i < p.program.steps.size(); ++i) {
      if (rank.world->rank() == p.fault.rank && i == p.fault.step) return rank.mark();
      mine.run(p.program.steps[i]);
    }
  });
  for (int r = 0; r < p.program.ranks; ++r) {
    if (r == p.fault.rank) {
      t.expectOne(outcomes, r, "");
    } else {
      t.expectOne(outcomes, r, "RANK_LEFT", {"group 'world", "expected", "it has left the group", " at '"});
    }
  }
  expectWithin(t, outcomes, p.fault.rank, 0, kBoundSeconds);
  expectAlive(t);
});

// Ranks that wait for each other the same way, or one in a message and one in a collective.
const CommunicatorRegistration kCrossed("faults.crossed", 4, [](CommunicatorTrial& t) {
  const int64_t kind = t.integer(0, 2);
  const auto outcomes = t.run(3, [&](Rank& rank) {
    Communicator& c = *rank.world;
    char bytes[8] = {};
    if (c.rank() == 2) return c.barrier("rest");
    rank.mark();
    const int other = 1 - c.rank();
    if (kind == 2 && c.rank() == 1) return c.barrier("rest");
    if (kind == 0) return c.send(bytes, 8, Element::kByte, other, "cross");
    c.receive(bytes, 8, Element::kByte, other, "cross");
  });
  t.expectAll(outcomes, "COLLECTIVE_MISMATCH", {"group 'world'", "rank 0", "rank 1", "at 'cross'"});
  expectWithin(t, outcomes, 0, 0, kBoundSeconds);
});

// The first cause stays: later calls throw it at once, on groups made before the failure too.
const CommunicatorRegistration kDead("faults.dead", 2, [](CommunicatorTrial& t) {
  t.expectAllFine(t.run(4, [](Rank& rank) {
    Communicator& c = *rank.world;
    const auto pair = c.split(c.rank() / 2, 0, "pair");
    const auto twin = c.duplicate("twin");
    c.barrier("all have their groups");
    if (c.rank() == 3) pair->abort("first");
    if (c.rank() == 2) twin->abort("second");
    const std::function<void()> calls[] = {
        [&] { c.barrier("later"); },
        [&] { pair->barrier("later"); },
        [&] { twin->split(0, 0, "later"); },
        [&] { c.exchange({}, {}, "later"); },
    };
    std::string first;
    for (const auto& call : calls) {
      std::string caught;
      try {
        call();
      } catch (const Error& error) {
        caught = error.what();
        require(error.code() == "RANK_ABORTED", "a dead group throws " + error.code());
      }
      const std::string cause = caught.substr(0, caught.find(" ["));
      require(!caught.empty(), "a dead group works");
      require(first.empty() || cause == first, "the cause changed from " + first + " to " + cause);
      first = cause;
    }
    rank.world = nullptr;
  }));
});

const CommunicatorRegistration kOutside("faults.abortFromOutside", 2, [](CommunicatorTrial& t) {
  const auto outcomes = t.run(2, [](Rank& rank) {
    if (rank.world->rank() == 1) {
      rank.mark();
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      return rank.world->barrier("wait");
    }
    std::thread closing([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      rank.world->abort("closing");
    });
    std::string code;
    char byte = 0;
    try {
      rank.world->receive(&byte, 1, Element::kByte, 1, "wait");
    } catch (const Error& error) {
      code = error.code();
    }
    closing.join();
    require(code == "RANK_ABORTED", "a wait ended with '" + code + "'");
  });
  t.expectOne(outcomes, 0, "");
  t.expectOne(outcomes, 1, "RANK_ABORTED", {"aborted by rank 0", "closing"});
  expectWithin(t, outcomes, 1, 0, kBoundSeconds);
});

// A call that throws in the middle of a copy leaves no reader behind: its buffers, large enough to have pages of their
// own, are given back to the system at once.
const CommunicatorRegistration kMiddle("faults.abortInTheMiddle", 12, [](CommunicatorTrial& t) {
  const int64_t microseconds = t.integer(0, 12000);
  const int64_t kind = t.integer(0, 3);
  const auto outcomes = t.run(3, [&](Rank& rank) {
    constexpr int64_t kCount = 600'000;
    Communicator& c = *rank.world;
    std::thread closing([&] {
      if (c.rank() != 0) return;
      std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
      c.abort("closing");
    });
    try {
      Arena sent("sent", kCount * 12), received("received", kCount * 12);
      auto* const send = static_cast<float*>(sent.at(0, kCount * 12, "all"));
      auto* const receive = static_cast<float*>(received.at(0, kCount * 12, "all"));
      const comm::Outgoing to{(c.rank() + 1) % 3, send, kCount * 3, Element::kFloat32};
      const comm::Incoming from{(c.rank() + 2) % 3, receive, kCount * 3, Element::kFloat32};
      for (;;) {
        if (kind == 0) c.allReduce(send, receive, kCount * 3, "sum");
        if (kind == 1) c.reduceScatter(send, receive, kCount, "sums");
        if (kind == 2) c.allGather(send, receive, kCount, Element::kFloat32, "gather");
        if (kind == 3) c.exchange({&to, 1}, {&from, 1}, "ring");
      }
    } catch (const Error&) {
      closing.join();
      throw;
    }
  });
  t.expectAll(outcomes, "RANK_ABORTED", {"closing"});
});

const CommunicatorRegistration kArguments("faults.arguments", 1, [](CommunicatorTrial& t) {
  static float buffer[64];
  const std::pair<std::string, std::function<void(Communicator&)>> wrong[] = {
      {"negative", [](Communicator& c) { c.allReduce(buffer, buffer, -1, "bad"); }},
      {"negative", [](Communicator& c) { c.broadcast(buffer, -1, Element::kByte, 0, "bad"); }},
      {"0..1, got 2", [](Communicator& c) { c.broadcast(buffer, 1, Element::kByte, 2, "bad"); }},
      {"0..1, got -1", [](Communicator& c) { c.send(buffer, 1, Element::kByte, -1, "bad"); }},
      {"0..1, got 9", [](Communicator& c) { c.receive(buffer, 1, Element::kByte, 9, "bad"); }},
      {"to itself", [](Communicator& c) { c.send(buffer, 1, Element::kByte, c.rank(), "bad"); }},
      {"overlap", [](Communicator& c) { c.allReduce(buffer, buffer + 1, 4, "bad"); }},
      {"overlap", [](Communicator& c) { c.reduceScatter(buffer, buffer + 5, 4, "bad"); }},
      {"overlap", [](Communicator& c) { c.allGather(buffer + 3, buffer, 4, Element::kFloat32, "bad"); }},
      {"outside",
       [](Communicator& c) {
         const comm::Piece piece{buffer + 32, 60, 8};
         c.allGatherPieces({&piece, 1}, buffer, 64, "bad");
       }},
      {"overlap",
       [](Communicator& c) {
         const comm::Piece piece{buffer + 1, 0, 8};
         c.allGatherPieces({&piece, 1}, buffer, 64, "bad");
       }},
      {"outside",
       [](Communicator& c) {
         const comm::Share share{60, 5, 0};
         c.reduceScatterPieces(buffer, 64, {&share, 1}, "bad");
       }},
      {"0..1",
       [](Communicator& c) {
         const comm::Share share{0, 5, 2};
         c.reduceScatterPieces(buffer, 64, {&share, 1}, "bad");
       }},
      {"4 elements at offset 6 for rank 1 overlap",
       [](Communicator& c) {
         const comm::Share shares[] = {{6, 4, 1}, {20, 3, 1}, {0, 7, 0}};
         c.reduceScatterPieces(buffer, 64, shares, "bad");
       }},
  };
  for (const auto& [part, call] : wrong) {
    const auto outcomes = t.run(2, [&](Rank& rank) {
      if (rank.world->rank() == 0) return rank.world->barrier("wait");
      call(*rank.world);
    });
    t.expectAll(outcomes, "COLLECTIVE_ARGUMENT", {"group 'world'", "rank 1", part, "at 'bad'"});
  }
});

const CommunicatorRegistration kPieces("faults.pieces", 1, [](CommunicatorTrial& t) {
  const auto outcomes = t.run(3, [](Rank& rank) {
    Communicator& c = *rank.world;
    char all[30], mine[11] = {};
    const comm::Piece piece{mine, c.rank() * 10, c.rank() == 1 ? 11 : 10};
    c.allGatherPieces({&piece, 1}, all, 30, "weights");
  });
  t.expectAll(outcomes, "COLLECTIVE_MISMATCH",
              {"bytes 10..21 from rank 1", "20..30 from rank 2", "all-gather of pieces 0 of 30 bytes at 'weights'"});
});

const CommunicatorRegistration kOtherShares("faults.shares", 2, [](CommunicatorTrial& t) {
  const bool shorter = t.integer(0, 1) == 0;
  const auto outcomes = t.run(3, [&](Rank& rank) {
    Communicator& c = *rank.world;
    float all[30] = {};
    const comm::Share shares[] = {{0, 10, 0}, {10, 10, c.rank() == 1 && !shorter ? 2 : 1}};
    c.reduceScatterPieces(all, 30, {shares, c.rank() == 1 && shorter ? size_t{1} : size_t{2}}, "gradients");
  });
  t.expectAll(
      outcomes, "COLLECTIVE_MISMATCH",
      {"reduce-scatter of pieces 0 of 30 float32 at 'gradients'",
       "expected share 1 to be 10 elements at offset 10 for rank 1, as of rank 0",
       shorter ? "received no further share from rank 1" : "received 10 elements at offset 10 for rank 2 from rank 1"});
});

const CommunicatorRegistration kOneCaller("faults.secondThread", 1, [](CommunicatorTrial& t) {
  const auto outcomes = t.run(2, [](Rank& rank) {
    if (rank.world->rank() == 0) {
      std::thread second([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        try {
          rank.world->barrier("second");
        } catch (const Error&) {
        }
      });
      try {
        rank.world->barrier("first");
      } catch (...) {
        second.join();
        throw;
      }
      second.join();
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    rank.world->barrier("first");
  });
  t.expectAll(outcomes, "COLLECTIVE_ARGUMENT", {"another thread", "at 'second'"});
});

}  // namespace
}  // namespace lockstep::contracts
