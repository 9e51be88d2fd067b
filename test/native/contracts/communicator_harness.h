// The contract suite of communicators. A case draws from a seed, runs a body on every rank of a new world and judges
// how each rank ended. Bodies of different ranks share no memory, so that an implementation may run them in processes.
//
//   const CommunicatorRegistration kBarrier("barrier", 3, [](CommunicatorTrial& t) {
//     t.expectAllFine(t.run(4, [](Rank& rank) { rank.world->barrier("here"); }));
//   });
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace lockstep::contracts {

// What a body gets. It may destroy the handle; whatever it throws aborts the world, as the error path of a rank does.
struct Rank {
  std::unique_ptr<comm::Communicator> world;
  double markedSeconds = -1;

  // Notes the time of a planted fault.
  void mark();
};

// How a rank ended: with an Error's code, with "FAILURE" when a body found something wrong, with "EXCEPTION", or "".
struct Outcome {
  std::string code, message;
  double endedSeconds = 0, markedSeconds = -1;
};

using Body = std::function<void(Rank&)>;

struct CommunicatorImplementation {
  std::string name;
  // Runs the body on every rank of a world and returns when all have ended, leaving nothing behind.
  std::function<std::vector<Outcome>(int ranks, double timeoutSeconds, const Body&)> run;
};

std::vector<CommunicatorImplementation>& communicatorImplementations();

class CommunicatorTrial {
 public:
  CommunicatorTrial(const CommunicatorImplementation& implementation, uint64_t seed)
      : implementation_(implementation), random_(seed) {}

  std::vector<Outcome> run(int ranks, const Body& body, double timeoutSeconds = 60) {
    return implementation_.run(ranks, timeoutSeconds, body);
  }

  // Of the implementation.
  const std::string& name() const { return implementation_.name; }

  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_); }
  uint64_t seed() { return random_(); }

  // Describes this trial.
  void note(const std::string& text) { notes_ += (notes_.empty() ? "" : ", ") + text; }
  const std::string& notes() const { return notes_; }

  [[noreturn]] void fail(const std::string& message);
  void expectAllFine(const std::vector<Outcome>&);
  // Every rank ended with this code and a message that holds all of `parts`.
  void expectAll(const std::vector<Outcome>&, const std::string& code, const std::vector<std::string>& parts = {});
  void expectOne(const std::vector<Outcome>&, int rank, const std::string& code,
                 const std::vector<std::string>& parts = {});

 private:
  const CommunicatorImplementation& implementation_;
  std::mt19937_64 random_;
  std::string notes_;
};

// Called by bodies: ends the rank with "FAILURE".
void require(bool holds, const std::string& what);

struct CommunicatorCase {
  std::string name;
  int trials;
  std::function<void(CommunicatorTrial&)> run;
};

std::vector<CommunicatorCase>& communicatorCases();

struct CommunicatorRegistration {
  CommunicatorRegistration(const std::string& name, int trials, const std::function<void(CommunicatorTrial&)>& run);
};

// Runs the cases (all, or one) of an implementation and prints a line each. As main(): 0 all hold, 1 not, 2 no such.
int runCommunicatorCases(const std::string& implementation, const std::string& only, uint64_t seed, int trials);

}  // namespace lockstep::contracts
