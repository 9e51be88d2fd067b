// kernel_contracts --list | --implementations
// kernel_contracts [--implementation NAME] [--case NAME] [--seed N] [--trials N] [--most N] [--tensor-cores]
//
// kernel_contracts --communicator-list | --communicators
// kernel_contracts --communicator NAME [--case NAME] [--seed N] [--trials N]
//
// --list prints the cases; --implementations prints those that this machine can run. Otherwise runs the cases (all, or
// one) of one implementation ("" is the best), with as many trials as each asks for, --most so many, or --trials so
// many. --tensor-cores: products of bfloat16 may differ by what tensor cores round differently, all else still to the
// last bit. Exit 0: all hold; 1: one does not; 2: the command line is wrong. The same for communicators.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "communicator_harness.h"
#include "core/error.h"
#include "harness.h"

namespace lockstep::contracts {
namespace {

constexpr const char* kImplementations[] = {"reference", "avx2", "avx512", "avx512-bf16", "cuda"};

struct Options {
  std::string implementation, communicator, only;
  uint64_t seed = 1;
  int trials = 0;  // 0: as many as each case asks for, at most `most`
  int most = std::numeric_limits<int>::max();
  bool tensorCores = false;
};

// How far a bfloat16 case may be from the reference on tensor cores, which sum exact products in an order and with a
// rounding of their own; relative to 1 + |expected|. What rounds to bfloat16 on the way may land on the next number,
// 2^-8 away. Cases that compare the implementation with itself are not here: they hold to the last bit.
struct Tolerance {
  const char* prefix;
  double bound;
};
constexpr Tolerance kTensorCores[] = {
    {"linear", 0x1p-7},           {"activatedLinear", 0x1p-6},
    {"attention", 0x1p-5},        {"softmaxStatistics", 0x1p-10},
    {"mergeStatistics", 0x1p-10}, {"logprobsBackward", 0x1p-6},
    {"sample.logprobs", 0x1p-10},
};

double toleranceOf(const Case& contract, const Options& options) {
  if (!options.tensorCores || contract.dtype != DType::kBFloat16) return 0;
  for (const Tolerance& t : kTensorCores) {
    if (contract.op.rfind(t.prefix, 0) == 0) return t.bound;
  }
  return 0;
}

const kernels::Kernels& kernelsNamed(const std::string& name) {
  if (name == "reference") return kernels::referenceKernels();
  return name == "cuda" ? kernels::cudaKernels() : kernels::cpuKernels(name.c_str());
}

std::vector<Case> sortedCases() {
  std::vector<Case> sorted = cases();
  std::sort(sorted.begin(), sorted.end(), [](const Case& a, const Case& b) { return a.name() < b.name(); });
  return sorted;
}

bool runCase(const Case& contract, const kernels::Kernels& implementation, const Options& options) {
  const int trials = options.trials > 0 ? options.trials : std::min(contract.trials, options.most);
  for (int i = 0; i < trials; ++i) {
    Trial trial(implementation, contract.dtype, options.seed * 1'000'003 + static_cast<uint64_t>(i),
                toleranceOf(contract, options));
    try {
      contract.run(trial);
    } catch (const Failure& failure) {
      std::printf("%s, %s, seed %llu, trial %d (%s): %s\n", contract.name().c_str(), implementation.name,
                  static_cast<unsigned long long>(options.seed), i, trial.shape().c_str(), failure.message.c_str());
      return false;
    } catch (const Error& error) {
      std::printf("%s, %s, trial %d (%s): %s: %s\n", contract.name().c_str(), implementation.name, i,
                  trial.shape().c_str(), error.code().c_str(), error.what());
      return false;
    }
  }
  std::printf("%s, %s: %d trials hold\n", contract.name().c_str(), implementation.name, trials);
  return true;
}

int runAll(const Options& options) {
  const kernels::Kernels& implementation = kernelsNamed(options.implementation);
  bool hold = true, found = false;
  for (const Case& contract : sortedCases()) {
    if (!options.only.empty() && contract.name() != options.only) continue;
    found = true;
    hold = runCase(contract, implementation, options) && hold;
  }
  if (!found) std::fprintf(stderr, "no case '%s'; --list prints them\n", options.only.c_str());
  return !found ? 2 : hold ? 0 : 1;
}

int listImplementations() {
  for (const char* name : kImplementations) {
    try {
      std::printf("%s\n", kernelsNamed(name).name);
    } catch (const Error& error) {
      std::fprintf(stderr, "%s\n", error.what());
    }
  }
  return 0;
}

int run(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name == "--implementations") return listImplementations();
    if (name == "--list") {
      for (const Case& contract : sortedCases()) std::printf("%s\n", contract.name().c_str());
      return 0;
    }
    if (name == "--communicators") {
      for (const auto& implementation : communicatorImplementations()) std::printf("%s\n", implementation.name.c_str());
      return 0;
    }
    if (name == "--communicator-list") {
      for (const CommunicatorCase& contract : communicatorCases()) std::printf("%s\n", contract.name.c_str());
      return 0;
    }
    if (name == "--tensor-cores") {
      options.tensorCores = true;
      continue;
    }
    const char* value = i + 1 < count ? arguments[++i] : nullptr;
    if (value != nullptr && name == "--implementation")
      options.implementation = value;
    else if (value != nullptr && name == "--communicator")
      options.communicator = value;
    else if (value != nullptr && name == "--case")
      options.only = value;
    else if (value != nullptr && name == "--seed")
      options.seed = std::strtoull(value, nullptr, 10);
    else if (value != nullptr && name == "--trials")
      options.trials = std::atoi(value);
    else if (value != nullptr && name == "--most")
      options.most = std::atoi(value);
    else {
      std::fprintf(stderr, "unknown or incomplete option '%s'\n", name.c_str());
      return 2;
    }
  }
  if (!options.communicator.empty()) {
    return runCommunicatorCases(options.communicator, options.only, options.seed, options.trials);
  }
  try {
    return runAll(options);
  } catch (const Error& error) {
    std::fprintf(stderr, "%s: %s\n", error.code().c_str(), error.what());
    return 2;
  }
}

}  // namespace
}  // namespace lockstep::contracts

int main(int count, char** arguments) {
  lockstep::flushDenormals();
  return lockstep::contracts::run(count, arguments);
}
