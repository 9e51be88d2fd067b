// The order in which the communicators of a process start what they have on the GPUs that they share. A kernel of NCCL
// waits on its GPU for the kernels of its peers: of two communicators that start theirs in different orders on two
// GPUs, neither may come to its end. So each GPU has a line. A launch gets its place in the lines of all its GPUs at
// once, when all its ranks are there; a rank starts its part when that is first in its GPU's line, and leaves the line
// when it has started. Nobody is in line who still waits for others, so lines move.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace lockstep::comm::nccl {

// What a group of ranks starts together: its next collective step, or a message.
struct Launch {
  int64_t group = 0, number = 0;
  int from = -1, to = -1;  // of a message

  auto operator<=>(const Launch&) const = default;
};

class LaunchOrder {
 public:
  static LaunchOrder& all();

  // Of a GPU; as long as the process lives.
  class Line {
   public:
    // Whether a launch of the group is first.
    bool isNextOf(int64_t group) const { return next_.load() == group; }

   private:
    friend class LaunchOrder;
    std::deque<Launch> launches_;
    std::atomic<int64_t> next_{0};  // the group of the first; groups are numbered from 1
  };
  Line& lineOf(int gpu);

  // One rank of the launch is there; the last puts it in line.
  void arrive(const Launch&, const std::vector<int>& gpus);
  // All are there.
  void add(const Launch&, const std::vector<int>& gpus);
  // Launches of the group at the head of the line, up to the first of another.
  std::vector<Launch> nextOf(Line&, int64_t group);
  bool contains(Line&, int64_t group);
  void leave(Line&, const std::vector<Launch>& started);

  // The group failed: it leaves all lines, and comes to none any more.
  void drop(int64_t group);

 private:
  void update(Line&);

  std::mutex mutex_;
  std::map<int, Line> lines_;
  std::map<Launch, size_t> arrived_;
  std::set<int64_t> dropped_;
};

}  // namespace lockstep::comm::nccl
