#include "comm/nccl/launch_order.h"

#include <algorithm>

namespace lockstep::comm::nccl {

LaunchOrder& LaunchOrder::all() {
  static LaunchOrder order;
  return order;
}

LaunchOrder::Line& LaunchOrder::lineOf(int gpu) {
  const std::lock_guard lock(mutex_);
  return lines_[gpu];
}

void LaunchOrder::arrive(const Launch& launch, const std::vector<int>& gpus) {
  {
    const std::lock_guard lock(mutex_);
    if (dropped_.contains(launch.group) || ++arrived_[launch] < gpus.size()) return;
    arrived_.erase(launch);
  }
  add(launch, gpus);
}

void LaunchOrder::add(const Launch& launch, const std::vector<int>& gpus) {
  const std::lock_guard lock(mutex_);
  if (dropped_.contains(launch.group)) return;
  for (const int gpu : gpus) {
    lines_[gpu].launches_.push_back(launch);
    update(lines_[gpu]);
  }
}

std::vector<Launch> LaunchOrder::nextOf(Line& line, int64_t group) {
  const std::lock_guard lock(mutex_);
  const auto end = std::find_if(line.launches_.begin(), line.launches_.end(),
                                [&](const Launch& launch) { return launch.group != group; });
  return {line.launches_.begin(), end};
}

bool LaunchOrder::contains(Line& line, int64_t group) {
  const std::lock_guard lock(mutex_);
  return std::any_of(line.launches_.begin(), line.launches_.end(),
                     [&](const Launch& launch) { return launch.group == group; });
}

void LaunchOrder::leave(Line& line, const std::vector<Launch>& started) {
  const std::lock_guard lock(mutex_);
  for (const Launch& launch : started) std::erase(line.launches_, launch);
  update(line);
}

void LaunchOrder::drop(int64_t group) {
  const std::lock_guard lock(mutex_);
  dropped_.insert(group);
  std::erase_if(arrived_, [&](const auto& launch) { return launch.first.group == group; });
  for (auto& [gpu, line] : lines_) {
    std::erase_if(line.launches_, [&](const Launch& launch) { return launch.group == group; });
    update(line);
  }
}

void LaunchOrder::update(Line& line) {
  line.next_ = line.launches_.empty() ? 0 : line.launches_.front().group;
}

}  // namespace lockstep::comm::nccl
