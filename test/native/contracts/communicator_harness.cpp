#include "communicator_harness.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <thread>

#include "comm/local/local.h"
#include "communicator_on_gpus.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "core/wait.h"
#include "harness.h"

namespace lockstep::contracts {

namespace {

double nowSeconds() {
  return static_cast<double>(nowNanoseconds()) / 1e9;
}

int64_t threadsOfProcess() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return std::distance(begin(tasks), end(tasks));
}

// Makes a rank's communicator of the local one.
using Make = std::function<std::unique_ptr<comm::Communicator>(std::unique_ptr<comm::Communicator>)>;

// What a rank does with its body: errors abort the world, and the handles end with the rank.
Outcome runRank(std::unique_ptr<comm::Communicator> local, const Make& make, const Body& body) {
  flushDenormals();
  Outcome outcome;
  Rank rank;
  try {
    rank.world = make(std::move(local));
    body(rank);
  } catch (const Failure& failure) {
    outcome.code = "FAILURE";
    outcome.message = failure.message;
  } catch (const Error& error) {
    outcome.code = error.code();
    outcome.message = error.what();
  } catch (const std::exception& error) {
    outcome.code = "EXCEPTION";
    outcome.message = error.what();
  }
  if (!outcome.code.empty() && rank.world != nullptr) rank.world->abort(outcome.message);
  outcome.endedSeconds = nowSeconds();
  outcome.markedSeconds = rank.markedSeconds;
  return outcome;
}

std::vector<Outcome> runThreads(int ranks, double timeoutSeconds, const Make& make, const Body& body) {
  // A sanitizer starts a thread of its own beside the first; an ended thread stays in the list for a moment.
  static const int64_t threadsBefore = [] {
    std::thread([] {}).join();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    return threadsOfProcess();
  }();
  std::vector<std::unique_ptr<comm::Communicator>> handles =
      comm::localWorld(ranks, {.name = "world", .timeoutSeconds = timeoutSeconds});
  std::vector<Outcome> outcomes(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (size_t i = 0; i < handles.size(); ++i) {
    threads.emplace_back([&, i] { outcomes[i] = runRank(std::move(handles[i]), make, body); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 1000 && threadsOfProcess() > threadsBefore; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  if (threadsOfProcess() > threadsBefore) throw Failure{"a world left threads behind"};
  return outcomes;
}

std::vector<Outcome> runLocal(int ranks, double timeoutSeconds, const Body& body) {
  return runThreads(
      ranks, timeoutSeconds, [](auto local) { return local; }, body);
}

std::vector<Outcome> runNccl(int ranks, double timeoutSeconds, const Body& body) {
  return runThreads(ranks, timeoutSeconds, onGpus, body);
}

bool runCase(const CommunicatorCase& contract, const CommunicatorImplementation& implementation, uint64_t seed,
             int trials) {
  const double began = nowSeconds();
  for (int i = 0; i < trials; ++i) {
    CommunicatorTrial trial(implementation, seed * 1'000'003 + static_cast<uint64_t>(i));
    try {
      contract.run(trial);
    } catch (const Failure& failure) {
      std::printf("%s, %s, seed %llu, trial %d (%s): %s\n", contract.name.c_str(), implementation.name.c_str(),
                  static_cast<unsigned long long>(seed), i, trial.notes().c_str(), failure.message.c_str());
      return false;
    }
  }
  std::printf("%s, %s: %d trials hold (%.1f s)\n", contract.name.c_str(), implementation.name.c_str(), trials,
              nowSeconds() - began);
  return true;
}

}  // namespace

std::vector<CommunicatorImplementation>& communicatorImplementations() {
  static std::vector<CommunicatorImplementation> all{{"local", runLocal}, {"nccl", runNccl}};
  return all;
}

std::vector<CommunicatorCase>& communicatorCases() {
  static std::vector<CommunicatorCase> all;
  return all;
}

CommunicatorRegistration::CommunicatorRegistration(const std::string& name, int trials,
                                                   const std::function<void(CommunicatorTrial&)>& run) {
  communicatorCases().push_back({name, trials, run});
}

void Rank::mark() {
  markedSeconds = nowSeconds();
}

void require(bool holds, const std::string& what) {
  if (!holds) throw Failure{what};
}

void CommunicatorTrial::fail(const std::string& message) {
  throw Failure{message};
}

void CommunicatorTrial::expectOne(const std::vector<Outcome>& outcomes, int rank, const std::string& code,
                                  const std::vector<std::string>& parts) {
  const Outcome& outcome = outcomes[static_cast<size_t>(rank)];
  const std::string ended = "; it ended with '" + outcome.code + "': " + outcome.message;
  if (outcome.code != code) fail("rank " + std::to_string(rank) + ": expected '" + code + "'" + ended);
  for (const std::string& part : parts) {
    if (outcome.message.find(part) == std::string::npos) {
      fail("rank " + std::to_string(rank) + ": expected \"" + part + "\" in the message" + ended);
    }
  }
}

void CommunicatorTrial::expectAll(const std::vector<Outcome>& outcomes, const std::string& code,
                                  const std::vector<std::string>& parts) {
  for (size_t i = 0; i < outcomes.size(); ++i) expectOne(outcomes, static_cast<int>(i), code, parts);
}

void CommunicatorTrial::expectAllFine(const std::vector<Outcome>& outcomes) {
  // Where one rank found something wrong the others only say that it aborted.
  for (size_t i = 0; i < outcomes.size(); ++i) {
    if (outcomes[i].code == "FAILURE") expectOne(outcomes, static_cast<int>(i), "");
  }
  expectAll(outcomes, "");
}

int runCommunicatorCases(const std::string& implementation, const std::string& only, uint64_t seed, int trials) {
  bool hold = true, found = false;
  for (const CommunicatorImplementation& candidate : communicatorImplementations()) {
    if (candidate.name != implementation) continue;
    for (const CommunicatorCase& contract : communicatorCases()) {
      if (!only.empty() && contract.name != only) continue;
      found = true;
      hold = runCase(contract, candidate, seed, trials > 0 ? trials : contract.trials) && hold;
    }
  }
  if (!found) std::fprintf(stderr, "no case '%s' of communicator '%s'\n", only.c_str(), implementation.c_str());
  return !found ? 2 : hold ? 0 : 1;
}

}  // namespace lockstep::contracts
