// Index arrays of the host as a GPU sees them, and works that are repeated (cuda/queue.h).
#include "cuda/queue.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/arena.h"
#include "cuda/backend.h"
#include "harness.h"

namespace lockstep::contracts {
namespace {

using Array = std::vector<int32_t>;

Array numbers(int64_t count, int32_t first) {
  Array array(static_cast<size_t>(count));
  std::iota(array.begin(), array.end(), first);
  return array;
}

// Sizes are drawn around that of a region, so that arrays of one operation lie in two.
const Registration kStaged("gpuQueue.staged", DType::kFloat32, 20, [](Trial& t) {
  if (!t.onGpu()) return;
  auto& queue = static_cast<cuda::Queue&>(t.implementationQueue());
  const auto sees = [&](const Array& array, const int32_t* device, const char* what) {
    Array back(array.size());
    queue.toHost(back.data(), device, back.size() * sizeof(int32_t));
    if (back != array) t.fail(std::string(what) + " is not what was staged");
  };
  const int64_t region = (int64_t{4} << 20) / static_cast<int64_t>(sizeof(int32_t));
  std::vector<Array> arrays;
  for (int64_t i = 0; i < 6; ++i) arrays.push_back(numbers(t.integer(1, region * 3 / 4), static_cast<int32_t>(i)));
  for (int round = 0; round < 8; ++round) {
    // An operation stages two arrays: both are there when it is launched.
    Array& a = arrays[static_cast<size_t>(t.integer(0, 5))];
    Array& b = arrays[static_cast<size_t>(t.integer(0, 5))];
    if (t.chance(0.3)) a[0] += 1000;
    const int32_t* const first = queue.stage(a.data(), static_cast<int64_t>(a.size()));
    const int32_t* const second = queue.stage(b.data(), static_cast<int64_t>(b.size()));
    sees(a, first, "the first array");
    sees(b, second, "the second array");
    if (queue.stage(b.data(), static_cast<int64_t>(b.size())) != second) t.fail("an unchanged array was sent again");
  }
});

// Longer than the longest stride that CUDA takes.
const Registration kLongFill("gpuQueue.longFill", DType::kFloat32, 1, [](Trial& t) {
  if (!t.onGpu()) return;
  auto& queue = static_cast<cuda::Queue&>(t.implementationQueue());
  constexpr size_t kBytes = (size_t{1} << 31) + 64;
  Arena arena("long", kBytes, nullptr, cuda::memoryOf(queue.gpu()));
  queue.fill(arena.data(), 7, kBytes);
  char last = 0;
  queue.toHost(&last, arena.data() + kBytes - 1, 1);
  if (last != 7) t.fail("the last byte was not filled");
});

size_t freeBytes() {
  size_t free = 0, total = 0;
  cuda::check(cudaMemGetInfo(&free, &total), "asking for free memory");
  return free;
}

// Scratch that grows gives back what it had.
// Free memory is that of the whole GPU: nothing else may use it meanwhile.
const Registration kScratch("gpuQueue.scratch", DType::kFloat32, 2, [](Trial& t) {
  if (!t.onGpu()) return;
  const auto& given = static_cast<cuda::Queue&>(t.implementationQueue());
  constexpr size_t kMiB = size_t{1} << 20, kMost = 64 * kMiB;
  const size_t before = freeBytes();
  {
    cuda::Queue queue(given.gpu(), 1, 0);
    for (size_t bytes = kMiB; bytes <= kMost; bytes += static_cast<size_t>(t.integer(1, 3)) * kMiB) {
      auto* const at = static_cast<char*>(queue.scratch(bytes));
      if (queue.scratch(bytes / 2) != at) t.fail("scratch that is large enough was taken again");
      queue.fill(at, 7, bytes);
      char last = 0;
      queue.toHost(&last, at + bytes - 1, 1);
      if (last != 7) t.fail("the last byte of scratch was not filled");
    }
    // A GPU's driver gives memory of streams in blocks of its own size.
    if (before > freeBytes() + kMost + 64 * kMiB) t.fail("scratch that was given back is not there again");
  }
  if (before > freeBytes() + 32 * kMiB) t.fail("the scratch of a queue outlives it");
});

// More works than there may be graphs: each is done with its arrays of the day, in memory for so many graphs.
// Free memory is that of the whole GPU: nothing else may use it meanwhile.
const Registration kRepeated("gpuQueue.repeated", DType::kFloat32, 2, [](Trial& t) {
  if (!t.onGpu()) return;
  auto& queue = static_cast<cuda::Queue&>(t.implementationQueue());
  constexpr int64_t kCount = 16;
  const Buffer to = t.floats(kCount);
  Array array = numbers(kCount, 0);
  queue.stage(array.data(), kCount);
  queue.synchronize();
  const size_t before = freeBytes();
  for (int work = 0; work < 3 * cuda::Queue::kMostGraphs; ++work) {
    for (int run = 0; run < 3; ++run) {
      array[0] = 10 * work + run;
      queue.repeat("work " + std::to_string(work),
                   [&] { queue.copy(to.as<char>(), queue.stage(array.data(), kCount), to.bytes()); });
      queue.synchronize();
      if (std::memcmp(to.as<char>(), array.data(), to.bytes()) != 0) t.fail("a repeated work was not done");
    }
  }
  // A GPU's driver keeps something of its own for every graph.
  const size_t most = 2 * cuda::Queue::kMostGraphs * cuda::Queue::kGraphArrays;
  if (before > freeBytes() + most) t.fail("graphs take more than " + std::to_string(most) + " bytes");
});

}  // namespace
}  // namespace lockstep::contracts
