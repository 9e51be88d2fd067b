// emulation_faults --list
// emulation_faults NAME
//
// Exit 0: the correct form is right everywhere and the broken one was found; 1: not so; 2: the command line is wrong.
#include <sys/wait.h>
#include <unistd.h>

#include <climits>
#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "faults.h"

namespace lockstep::emulation {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw Error("CUDA_FAILED", cudaGetErrorString(error));
}

namespace {

struct Scene {
  emulated::Schedule schedule;
  emulated::Timing timing;
  unsigned seed;
  std::string name;
};

std::vector<Scene> scenes() {
  std::vector<Scene> all;
  for (const auto timing : {emulated::Timing::eager, emulated::Timing::lazy}) {
    const std::string streams = timing == emulated::Timing::eager ? "eager" : "lazy";
    all.push_back({emulated::Schedule::forward, timing, 1, "forward, " + streams});
    all.push_back({emulated::Schedule::reverse, timing, 1, "reverse, " + streams});
    for (unsigned seed = 1; seed <= 4; ++seed) {
      all.push_back({emulated::Schedule::random, timing, seed, "random " + std::to_string(seed) + ", " + streams});
    }
  }
  return all;
}

void set(const Scene& scene) {
  emulated::machine.schedule = scene.schedule;
  emulated::machine.random.seed(scene.seed);
  emulated::timing = scene.timing;
}

struct Outcome {
  bool right = false;
  std::string error;
};

Outcome attempt(const Fault& fault, bool broken, const Scene& scene) {
  set(scene);
  Outcome outcome;
  try {
    outcome.right = fault.run(broken);
  } catch (const std::exception& error) {
    outcome.error = error.what();
  }
  // A failure sticks to a GPU until its process ends; here the next attempt begins anew.
  cudaDeviceSynchronize();
  emulated::failure.clear();
  return outcome;
}

// The status of a child that runs `body`, and what it wrote to stderr.
template <class Body>
std::pair<int, std::string> inChild(const Body& body) {
  int pipes[2];
  if (pipe(pipes) != 0) throw Error("INTERNAL", "no pipe");
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(pipes[1], STDERR_FILENO);
    close(pipes[0]);
    close(pipes[1]);
    body();
    _exit(0);
  }
  close(pipes[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n = 0; (n = read(pipes[0], buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<size_t>(n));
  close(pipes[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return {status, text};
}

std::pair<int, std::string> runSanitized(const std::string& name, bool broken) {
  char self[PATH_MAX] = {};
  if (readlink("/proc/self/exe", self, sizeof self - 1) < 0) throw Error("INTERNAL", "no /proc/self/exe");
  const std::string program = std::string(self) + "_asan";
  return inChild([&] {
    setenv("ASAN_OPTIONS", "detect_leaks=0:abort_on_error=0:exitcode=86", 1);
    execl(program.c_str(), program.c_str(), name.c_str(), broken ? "broken" : "correct", nullptr);
    std::perror(program.c_str());
    _exit(2);
  });
}

// How the broken form was found, or an empty text.
std::string foundIn(const Fault& fault, const Scene& scene) {
  switch (fault.found) {
    case Found::kWrongResult: {
      const Outcome outcome = attempt(fault, true, scene);
      if (!outcome.error.empty()) throw Error("INTERNAL", "a wrong result was expected, not: " + outcome.error);
      return outcome.right ? "" : "a wrong result";
    }
    case Found::kError: {
      const Outcome outcome = attempt(fault, true, scene);
      return outcome.error.find(fault.text) == std::string::npos ? "" : outcome.error;
    }
    case Found::kSignal: {
      set(scene);
      const auto [status, text] = inChild([&] { fault.run(true); });
      return WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV ? "SIGSEGV" : "";
    }
    case Found::kReport: {
      const auto [status, text] = runSanitized(fault.name, true);
      const bool died = WIFEXITED(status) && WEXITSTATUS(status) == 86;
      return died && text.find(fault.text) != std::string::npos ? fault.text : "";
    }
  }
  return "";
}

bool rightIn(const Fault& fault, const Scene& scene) {
  if (fault.found == Found::kReport) {
    const auto [status, text] = runSanitized(fault.name, false);
    if (status != 0) std::printf("%s\n", text.c_str());
    return status == 0;
  }
  const Outcome outcome = attempt(fault, false, scene);
  if (!outcome.error.empty()) std::printf("%s\n", outcome.error.c_str());
  return outcome.right;
}

int examine(const Fault& fault) {
  bool right = true;
  int found = 0;
  std::string first;
  std::vector<Scene> all = scenes();
  if (fault.found == Found::kReport) all.resize(1);  // a program of its own, which goes through the orders
  for (const Scene& scene : all) {
    if (!rightIn(fault, scene)) {
      std::printf("%s: the correct form is wrong (%s)\n", fault.name.c_str(), scene.name.c_str());
      right = false;
    }
    const std::string how = foundIn(fault, scene);
    if (how.empty()) continue;
    if (++found == 1) first = scene.name + ": " + how;
  }
  if (found == 0) {
    std::printf("%s: the broken form was not found\n", fault.name.c_str());
  } else {
    std::printf("%s: found in %d of %zu orders, first in %s\n", fault.name.c_str(), found, all.size(), first.c_str());
  }
  return right && found > 0 ? 0 : 1;
}

int run(int count, char** arguments) {
  std::vector<Fault> all;
  for (auto part : {threadFaults(), memoryFaults(), streamFaults()}) all.insert(all.end(), part.begin(), part.end());
  const std::string name = count == 2 ? arguments[1] : "";
  for (const Fault& fault : all) {
    if (name == "--list") std::printf("%s\n", fault.name.c_str());
    if (name == fault.name) return examine(fault);
  }
  if (name == "--list") return 0;
  std::fprintf(stderr, "emulation_faults --list | NAME\n");
  return 2;
}

}  // namespace
}  // namespace lockstep::emulation

int main(int count, char** arguments) {
  return lockstep::emulation::run(count, arguments);
}
