// What the measurements of bench/ share: the result, and an operation timed in turn with a ceiling.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace lockstep::binding {

struct BenchResult {
  std::vector<double> seconds, ceilingSeconds;
  double work = 0, ceilingWork = 0;  // multiply-adds, or bytes, of one run of each
  bool verified = true;
};

// Times both in turn, `runs` times, after one run of each that is not counted. What is short is repeated until 20 ms;
// `finish` waits for what the repetitions have started.
void measureInTurn(
    BenchResult&, int runs, const std::function<void()>& run, const std::function<void()>& ceiling,
    const std::function<void()>& finish = [] {});

// A collective in place among ranks of this process, a thread each, on `bytes` of every rank (of its receive buffer
// where it gathers, of its send buffer where it scatters). Work is what nccl-tests calls bus bandwidth times seconds:
// bytes * (ranks - 1) / ranks, twice that of an all-reduce. The ceiling is memcpy by as many threads, each from one
// half of such a buffer to the other; its work is the bytes that one of them copies.
BenchResult benchCollective(comm::Operation, int ranks, int64_t bytes, int runs);

}  // namespace lockstep::binding
