// Runs CUDA kernel sources on the host (x86-64), for tests on machines without a GPU. Every CUDA thread of a block is a
// fiber with its own stack. A fiber runs until it has to wait: at a barrier, or in an operation of its warp (shuffle,
// vote, mma), which the last lane to arrive computes for all. Two blocks run at a time: at every barrier one gives way
// to the other. Runnable fibers and blocks go in forward, reverse or seeded random order. Found out: accesses out of
// bounds (AddressSanitizer; each allocation is exact), uninitialised shared memory (it is NaN), missing barriers and
// waits (results differ between schedules), divergent barriers, wrong lane masks, waiting for ever (an error that names
// the source lines), blocks that take each other's memory (where they have barriers), and host code that touches device
// memory (protection keys, where the CPU has them).
#pragma once

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
inline void __asan_unpoison_memory_region(const void*, std::size_t) {}
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // only `__shared__ Shared<float[32]> x;` is each block's own, and checked
#define threadIdx (::emulated::machine.self->thread)
#define blockIdx (::emulated::machine.now->index)
#define blockDim (::emulated::machine.block_size)
#define gridDim (::emulated::machine.grid_size)
#define CALL_SITE std::source_location where = std::source_location::current()

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulated {

enum class Schedule { forward, reverse, random };
constexpr unsigned kWarp = 32, kMaxThreads = 1024, kPoison = 0xff;  // 0xff bytes are NaN in float32 and bfloat16
constexpr std::size_t kMaxSharedBytes = 163 * 1024, kStackBytes = 128 * 1024, kGuardBytes = 4096;  // sm_80's
constexpr std::size_t kMaxPitch = (std::size_t{1} << 31) - 1;

struct Copy {  // a cp.async of 16 bytes; from null: zeros
  void* to;
  const void* from;
  unsigned group;
};
inline void perform(const Copy& c) {
  c.from ? std::memcpy(c.to, c.from, 16) : std::memset(c.to, 0, 16);
}

struct Fiber {
  void *stack_pointer = nullptr, *sanitizer_stack = nullptr;
  const void* stack = nullptr;  // lowest address
  std::size_t stack_bytes = 0;
  unsigned index = 0, copy_group = 0;  // linear thread index in the block; cp.async groups committed
  uint3 thread{};
  const char* waits_in = nullptr;  // null while runnable
  std::source_location where;
  std::vector<Copy> copies;
};
struct Meeting {  // the lanes of one mask, on their way into one operation of their warp
  unsigned mask = 0, arrived = 0;
  const char* name = nullptr;
  void* records[kWarp] = {};  // each lane's operands and result, on that lane's stack
};
struct Block {
  uint3 index{};
  std::deque<Fiber> fibers;
  std::vector<Fiber*> ready;  // a stack: the last is the next to run
  unsigned alive = 0, at_barrier = 0;
  std::source_location barrier;  // of the first thread there
  std::vector<Meeting> warps[kMaxThreads / kWarp];
  std::shared_ptr<void> shared;
  std::size_t shared_bytes = 0;
};
struct StaticShared {  // of both blocks
  void* data[2];
  std::size_t bytes;
};
struct Machine {
  Schedule schedule = Schedule::forward;
  std::minstd_rand random{1};
  std::recursive_mutex mutex;
  Fiber host, *self = &host, *previous = nullptr;
  Block blocks[2], *now = blocks;
  unsigned number = 0;  // of `now`
  dim3 grid_size, block_size;
  unsigned threads = 0;
  const std::function<void()>* kernel = nullptr;
  std::vector<StaticShared> static_shared;
  std::string error;

  Machine() {
    const char* name = std::getenv("LOCKSTEP_EMULATION_SCHEDULE");
    if (name != nullptr && std::strcmp(name, "reverse") == 0) schedule = Schedule::reverse;
    if (name != nullptr && std::strcmp(name, "random") == 0) schedule = Schedule::random;
  }
};
inline Machine machine;

inline void* allocate(std::size_t bytes) {  // 128-byte aligned, nothing spare at the end, filled with NaN
  void* data;
  if (posix_memalign(&data, 128, bytes ? bytes : 1) != 0) throw std::bad_alloc();
  std::memset(data, kPoison, bytes);
  return data;
}
inline unsigned lane() {
  return machine.self->index % kWarp;
}
inline bool chance(unsigned n) {
  return machine.schedule == Schedule::random && machine.random() % n == 0;
}

// Device memory that only a kernel or a copy may touch. Threads start without the right to.
class DeviceAccess {
 public:
  DeviceAccess() : before_(key() < 0 ? 0 : pkey_get(key())) {
    if (key() >= 0) pkey_set(key(), 0);
  }
  ~DeviceAccess() {
    if (key() >= 0) pkey_set(key(), static_cast<unsigned>(before_));
  }
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;

  // Negative where the CPU has no protection keys.
  static int key() {
    static const int key = pkey_alloc(0, PKEY_DISABLE_ACCESS);
    return key;
  }
  static void protect(void* memory, std::size_t bytes) {
    if (key() >= 0 && bytes > 0) pkey_mprotect(memory, bytes, PROT_READ | PROT_WRITE, key());
  }

 private:
  int before_;
};

// noipa: a compiler that saw this body would believe that it keeps the caller's scratch registers.
__attribute__((naked, noipa)) inline void switch_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15; movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void arrived_on_stack() {  // tells AddressSanitizer; the launching thread's stack is learnt on leaving it
  const void* stack = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(machine.self->sanitizer_stack, &stack, &bytes);
  if (machine.previous == &machine.host) machine.host.stack = stack, machine.host.stack_bytes = bytes;
}

inline void switch_to(Fiber& to, bool finished = false) {
  Fiber& from = *machine.self;
  if (&from == &to) return;
  machine.previous = &from, machine.self = &to;
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.sanitizer_stack, to.stack, to.stack_bytes);
  switch_stacks(&from.stack_pointer, to.stack_pointer);
  arrived_on_stack();
}

[[noreturn]] inline void fail(const std::string& what) {
  machine.error = what;
  switch_to(machine.host), std::abort();
}
inline std::string describe(const Fiber& f) {
  const std::string place = std::string(f.where.file_name()) + ":" + std::to_string(f.where.line());
  return "\n  thread " + std::to_string(f.index) + " in " + f.waits_in + " at " + place;
}

// To the other block, where it has something to do.
inline void run(unsigned number) {
  machine.number = number, machine.now = &machine.blocks[number];
}
inline void give_way() {
  if (const unsigned other = machine.number ^ 1; machine.blocks[other].alive > 0) run(other);
}

inline Fiber& next_fiber() {
  if (machine.now->alive == 0) give_way();
  auto& ready = machine.now->ready;
  if (ready.empty() && machine.now->alive > 0) {
    machine.error = std::to_string(machine.now->alive) + " threads wait for ever:";
    unsigned line = 0;  // of the thread described last: neighbours that wait in the same place are left out
    for (const Fiber& f : machine.now->fibers)
      if (f.waits_in && std::exchange(line, f.where.line()) != f.where.line()) machine.error += describe(f);
  }
  if (ready.empty()) return machine.host;
  if (chance(64)) std::swap(ready.back(), ready[machine.random() % ready.size()]);  // rarely: some must run far ahead
  Fiber& next = *ready.back();
  return ready.pop_back(), next;
}

// Marks as runnable those of the `count` fibers from `first` whose lane is in `mask`.
inline void wake(unsigned first, unsigned count, unsigned mask) {
  const bool reverse = machine.schedule == Schedule::reverse || chance(2);
  for (unsigned n = 0; n < count; n++) {
    const unsigned i = first + (reverse ? n : count - 1 - n);
    if (mask >> i % kWarp & 1) machine.now->ready.push_back(&machine.now->fibers[i]);
  }
}

inline void wait() {
  switch_to(next_fiber());
  machine.self->waits_in = nullptr;
}
inline void fiber_main() {
  arrived_on_stack();
  (*machine.kernel)();
  machine.now->alive--, switch_to(next_fiber(), true), std::abort();
}

// The running block is that of the grid's `index`; its threads wait to begin.
inline void start(unsigned number, uint3 index, std::size_t shared_bytes) {
  run(number);
  Block& block = *machine.now;
  block.index = index;
  while (block.fibers.size() < machine.threads) {
    void* base = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
    Fiber& fiber = block.fibers.emplace_back();
    fiber.index = static_cast<unsigned>(block.fibers.size() - 1);
    fiber.stack = static_cast<unsigned char*>(base) + kGuardBytes;
    fiber.stack_bytes = kStackBytes - fiber.index % 61 * 192;  // staggered: tops fall into different cache sets
  }
  for (Fiber& f : block.fibers) f.waits_in = nullptr, f.sanitizer_stack = nullptr, f.copies.clear(), f.copy_group = 0;
  for (unsigned i = 0; i < machine.threads; i++) {
    Fiber& fiber = block.fibers[i];
    const dim3 size = machine.block_size;
    fiber.thread = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);  // what the last block left there
    auto** top = reinterpret_cast<void**>(reinterpret_cast<std::uintptr_t>(fiber.stack) + fiber.stack_bytes);
    std::fill(top - 8, top, nullptr);  // six registers, where to return, and one word that aligns the stack
    top[-2] = reinterpret_cast<void*>(fiber_main);
    fiber.stack_pointer = top - 8;
  }
  if (block.shared_bytes != shared_bytes || !block.shared) block.shared = {allocate(shared_bytes), std::free};
  std::memset(block.shared.get(), kPoison, block.shared_bytes = shared_bytes);
  for (const StaticShared& all : machine.static_shared) std::memset(all.data[number], kPoison, all.bytes);
  for (auto& warp : block.warps) warp.clear();
  block.at_barrier = 0, block.alive = machine.threads, block.ready.clear(), wake(0, machine.threads, ~0u);
}

// Runs `kernel` once per thread of every block. Throws std::runtime_error when it breaks a rule.
inline void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel) {
  std::lock_guard lock(machine.mutex);
  const DeviceAccess access;
  _mm_setcsr(_mm_getcsr() | 0x8040);  // as -ftz=true
  const unsigned blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > kMaxThreads ||
      shared_bytes > kMaxSharedBytes)
    throw std::runtime_error("emulated launch: invalid configuration");
  machine.grid_size = grid, machine.block_size = block, machine.threads = threads, machine.kernel = &kernel;
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; i++) order[i] = machine.schedule == Schedule::reverse ? blocks - 1 - i : i;
  if (machine.schedule == Schedule::random) std::shuffle(order.begin(), order.end(), machine.random);
  for (std::size_t first = 0; first < order.size(); first += 2) {
    for (std::size_t n = std::min<std::size_t>(2, order.size() - first); n-- > 0;) {
      const unsigned i = order[first + n];
      start(static_cast<unsigned>(n), {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}, shared_bytes);
    }
    switch_to(next_fiber());
    for (Block& b : machine.blocks) b.alive = 0;  // of one that broke
    if (!machine.error.empty()) throw std::runtime_error("emulated kernel: " + std::exchange(machine.error, {}));
  }
}

// `mine` holds this lane's operands; the last lane of `mask` calls perform(records), which fills in every result.
template <class Record, class Perform>
void meet(unsigned mask, Record& mine, Perform perform, const char* name, std::source_location where) {
  const unsigned warp = machine.self->index / kWarp, present = std::min(machine.threads - warp * kWarp, kWarp);
  if (present < kWarp) mask &= (1u << present) - 1;
  machine.self->waits_in = name, machine.self->where = where;
  auto& meetings = machine.now->warps[warp];
  auto it = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return m.mask == mask; });
  if (it == meetings.end()) it = meetings.insert(it, {mask, 0, name, {}});
  if (!(mask >> lane() & 1)) fail("a lane is not in its own mask:" + describe(*machine.self));
  if (it->arrived && it->name != name && std::strcmp(it->name, name))
    fail(std::string("others in ") + it->name + describe(*machine.self));
  it->name = name, it->records[lane()] = &mine, it->arrived |= 1u << lane();
  if (it->arrived != mask) return wait();
  Record* records[kWarp];  // null for lanes outside the mask
  for (unsigned i = 0; i < kWarp; i++) records[i] = static_cast<Record*>(mask >> i & 1 ? it->records[i] : nullptr);
  perform(records);
  it->arrived = 0, machine.self->waits_in = nullptr;
  wake(warp * kWarp, present, mask & ~(1u << lane()));
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* name, std::source_location where) {
  struct Record {
    T value;
    unsigned source;
    T result;
  } mine{value, source, value};
  meet(
      mask, mine,
      [](auto& lanes) {
        for (auto* lane : lanes)
          if (lane && lanes[lane->source])
            lane->result = lanes[lane->source]->value;
          else if (lane)
            std::memset(&lane->result, kPoison, sizeof(T));  // from outside the mask: undefined on hardware
      },
      name, where);
  return mine.result;
}

}  // namespace emulated

template <class T>
T __shfl_sync(unsigned mask, T value, int source, CALL_SITE) {
  return emulated::shuffle(mask, value, source % 32u, "__shfl_sync", where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, CALL_SITE) {
  return emulated::shuffle(mask, value, emulated::lane() ^ bits, "__shfl_xor_sync", where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, CALL_SITE) {
  const unsigned from = emulated::lane() + by;
  return emulated::shuffle(mask, value, from < 32 ? from : emulated::lane(), "__shfl_down_sync", where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, CALL_SITE) {
  const unsigned from = emulated::lane() - by;
  return emulated::shuffle(mask, value, from < 32 ? from : emulated::lane(), "__shfl_up_sync", where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CALL_SITE) {
  struct Record {
    int predicate;
    unsigned votes;
  } mine{predicate, 0};
  emulated::meet(
      mask, mine,
      [](auto& lanes) {
        unsigned votes = 0;
        for (int i = 0; i < 32; i++) votes |= unsigned{lanes[i] && lanes[i]->predicate} << i;
        for (auto* lane : lanes)
          if (lane) lane->votes = votes;
      },
      "__ballot_sync", where);
  return mine.votes;
}
inline int __any_sync(unsigned mask, int predicate, CALL_SITE) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline void __syncwarp(unsigned mask = ~0u, CALL_SITE) {
  emulated::meet(
      mask, mask, [](auto&) {}, "__syncwarp", where);
}
inline void __syncthreads(CALL_SITE) {
  using namespace emulated;
  Block& block = *machine.now;
  machine.self->waits_in = "__syncthreads", machine.self->where = where;
  if (block.at_barrier++ == 0) block.barrier = where;
  if (block.barrier.line() != where.line())
    fail("divergent __syncthreads, others at line " + std::to_string(block.barrier.line()) + describe(*machine.self));
  if (block.at_barrier == machine.threads) block.at_barrier = 0, wake(0, machine.threads, ~0u), give_way();
  wait();
}

// Of the eight bytes of (x, y), y the upper: result byte i is the one that nibble i of `selector` names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t both = std::uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<unsigned>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1;
}
// In shared memory; whole numbers only, since the order of arrival shows in sums of others.
template <class T>
T atomicAdd(T* to, T value) {
  static_assert(std::is_integral_v<T>);
  return std::exchange(*to, *to + value);
}
