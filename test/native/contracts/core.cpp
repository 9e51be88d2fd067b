// What every operation stands on: the thread pool, the scratch of a queue, denormals, the tables.
#include <atomic>
#include <cstdint>

#include "core/error.h"
#include "harness.h"

namespace lockstep::contracts {
namespace {

const Registration kPool("threadPool", DType::kFloat32, 1, [](Trial& t) {
  for (const int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 300; ++round) {
      std::vector<int> ran(static_cast<size_t>(threads), 0);
      pool.each([&](int thread) { ++ran[thread]; });
      for (const int count : ran) {
        if (count != 1) t.fail("a thread of " + std::to_string(threads) + " ran " + std::to_string(count) + " times");
      }
      const int64_t count = t.integer(0, 70);
      std::vector<std::atomic<int>> taken(static_cast<size_t>(count));
      std::atomic<bool> outside{false};
      pool.forEach(count, [&](int64_t index, int thread) {
        if (thread < 0 || thread >= threads) outside = true;
        taken[index].fetch_add(1);
      });
      if (outside) t.fail("forEach gave a thread outside of the pool");
      for (const auto& times : taken) {
        if (times != 1)
          t.fail("forEach over " + std::to_string(count) + " dealt an index " + std::to_string(times) + " times");
      }
    }
  }
});

const Registration kDenormals("threadPool.denormals", DType::kFloat32, 1, [](Trial& t) {
  ThreadPool pool(3);
  float results[3] = {1, 1, 1};
  volatile float small = 1e-30f;
  pool.each([&](int thread) { results[thread] = small * 1e-10f; });
  for (const float result : results) {
    if (result != 0) t.fail("a thread of the pool keeps denormals");
  }
});

const Registration kThreads("threadPool.threads", DType::kFloat32, 1, [](Trial& t) {
  for (const int threads : {0, -1, 257}) {
    std::string code;
    try {
      ThreadPool pool(threads);
    } catch (const Error& error) {
      code = error.code();
    }
    if (code != "THREADS_INVALID") t.fail("a pool of " + std::to_string(threads) + " threads was not refused");
  }
});

const Registration kQueue("queue", DType::kFloat32, 1, [](Trial& t) {
  Queue queue(3, 1000);
  const size_t bytes = queue.scratchBytes();
  if (bytes < 1000) t.fail("less scratch than asked for");
  for (int i = 0; i < 4; ++i) {
    char* memory = static_cast<char*>(i < 3 ? queue.scratch(i, bytes) : queue.shared(bytes));
    if (reinterpret_cast<uintptr_t>(memory) % 64 != 0) t.fail("scratch is not 64-byte aligned");
    std::memset(memory, i + 1, bytes);
  }
  for (int i = 0; i < 4; ++i) {
    const char* memory = static_cast<char*>(i < 3 ? queue.scratch(i, bytes) : queue.shared(bytes));
    for (size_t b = 0; b < bytes; ++b) {
      if (memory[b] != i + 1) t.fail("blocks of scratch overlap");
    }
  }
  if (queue.scratchHighWater() != bytes || queue.sharedHighWater() != bytes) t.fail("the high-water mark is wrong");
  std::string code;
  try {
    queue.scratch(0, bytes + 1);
  } catch (const Error& error) {
    code = error.code();
  }
  if (code != "SCRATCH_TOO_SMALL") t.fail("a request beyond the scratch was not refused");
});

const Registration kTable("table", DType::kFloat32, 1, [](Trial& t) {
  // Every field of a table is a pointer: the name, then the operations.
  const kernels::Kernels& table = t.implementation();
  const void* entries[sizeof(kernels::Kernels) / sizeof(void*)];
  std::memcpy(entries, &table, sizeof table);
  for (size_t i = 0; i < std::size(entries); ++i) {
    if (entries[i] == nullptr) t.fail("operation " + std::to_string(i) + " of " + table.name + " is missing");
  }
  std::string code;
  try {
    kernels::cpuKernels("sse2");
  } catch (const Error& error) {
    code = error.code();
  }
  if (code != "ISA_UNSUPPORTED") t.fail("an unknown instruction set was not refused");
});

}  // namespace
}  // namespace lockstep::contracts
