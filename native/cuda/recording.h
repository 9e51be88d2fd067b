// What a Queue does while the operations of a repeated work are recorded into a graph, or only compared with one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lockstep::cuda {

// A launch, a copy or a fill without its arguments: equal works make equal steps in the same order.
struct Step {
  const void* kernel;  // null: a copy or a fill
  uint64_t grid[3], threads, sharedBytes;

  bool operator==(const Step&) const = default;
};

struct Recording {
  std::vector<Step> steps;
  bool comparing = false;
  size_t at = 0;
  bool differs = false;

  // Whether the step is to be made.
  bool admit(const Step& step) {
    if (!comparing) return steps.push_back(step), true;
    differs = differs || at >= steps.size() || !(steps[at] == step);
    ++at;
    return false;
  }
};

// Of the calling thread; null: everything is made.
inline thread_local Recording* recording = nullptr;

inline bool admit(const Step& step) {
  return recording == nullptr || recording->admit(step);
}

}  // namespace lockstep::cuda
