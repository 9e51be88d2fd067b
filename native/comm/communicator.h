// How ranks talk to each other: the one contract that every implementation fulfils and that
// test/native/contracts/communicator_*.cpp holds it to.
//
// A group has ranks 0 .. size-1. Every rank holds a Communicator of its own and calls it from one thread at a time; to
// communicate from a second thread of a rank (gradients behind the backward pass, say), give that thread a group of its
// own with split() or duplicate(), as Background (comm/background.h) does. A call returns when its result is there and
// its buffers may be used again.
//
// Every rank of a group makes the same collective calls in the same order. A call carries (operation, count, element,
// root, sequence number, site), and all of them must be equal on all ranks; `site` names the caller, as in
// "layers.3.down". Collectives of a group are numbered from 0; so are the messages from one rank to another, whose
// sites may differ.
//
// Sums are float32 and follow one balanced binary tree over the group in group order: neighbours, then their sums, an
// odd one out passes up. No size, alignment or chunking changes a bit, and all ranks get the same bits. The calling
// thread computes with denormals flushed from then on (core/thread_pool.h).
//
// A rank copies and sums with its calling thread, not with its pool: messages beyond the caches are bound by memory, of
// which one thread takes most, and those within them are fast already (docs/performance.md). It would not pay for a
// pool that the threads of a rank have to share.
//
// Nothing hangs. A group and all that is split from it is one world, and a call that throws has killed the world: every
// pending call of every rank throws within a second, every later one at once, with the first cause:
//   RANK_ABORTED         a rank called abort()
//   RANK_LEFT            a rank destroyed its Communicator while others wait for it
//   RANK_MISSING         a rank did not arrive, nor call anything or progress(), for the world's timeout
//   COLLECTIVE_MISMATCH  ranks made different calls, or wait for each other
//   COLLECTIVE_ARGUMENT  a call cannot be valid: ranks, counts, or buffers that overlap other than as allowed
//   what a rank met      inside a call: its GPU's or its network's error (comm/nccl/nccl.h)
// The message names group, ranks, operation, sequence number and site, what was expected and what came.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "core/dtype.h"

namespace lockstep::comm {

inline constexpr int kMaxRanks = 64;

enum class Element : uint8_t { kByte, kBFloat16, kFloat32 };

constexpr int64_t bytesOf(Element element) {
  return element == Element::kByte ? 1 : element == Element::kBFloat16 ? 2 : 4;
}
constexpr Element elementOf(DType dtype) {
  return dtype == DType::kFloat32 ? Element::kFloat32 : Element::kBFloat16;
}

enum class Operation : uint8_t {
  kAllGather,
  kAllGatherPieces,
  kReduceScatter,
  kReduceScatterPieces,
  kAllReduce,
  kBroadcast,
  kBarrier,
  kSplit,
  kSend,
  kReceive,
};

struct Call {
  Operation operation = Operation::kBarrier;
  Element element = Element::kByte;
  int64_t count = 0;
  int root = -1;  // of a broadcast; the other rank of a message; else -1
  uint64_t sequence = 0;
  std::string_view site;

  bool operator==(const Call&) const = default;
};

// "all-reduce 12 of 4096 float32 at 'layers.3.down'"
std::string describe(const Call&);

// Messages of one exchange().
struct Outgoing {
  int to = 0;
  const void* data = nullptr;
  int64_t count = 0;
  Element element = Element::kByte;
};
struct Incoming {
  int from = 0;
  void* data = nullptr;
  int64_t count = 0;
  Element element = Element::kByte;
};

// Hears of the messages of an exchange whose bytes go another way: those without data.
class Matches {
 public:
  virtual ~Matches() = default;
  // Both ranks are in a call with this message; its sender learns it when this returns.
  virtual void meet(size_t incoming) = 0;
  // Before the call waits for other ranks, and at its end.
  virtual void move() = 0;
};

// What a rank contributes to allGatherPieces: bytes at `data` go to `offset` of everybody's buffer.
struct Piece {
  const void* data = nullptr;
  int64_t offset = 0, bytes = 0;
};

// Elements [offset, offset + count) of a buffer, and the rank that gets their sum in reduceScatterPieces.
struct Share {
  int64_t offset = 0, count = 0;
  int owner = 0;

  bool operator==(const Share&) const = default;
};

// Bytes that came from, and went to, other ranks by this handle; its own share of a result is not counted.
struct Traffic {
  int64_t receivedBytes = 0, sentBytes = 0;
};

class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  // "world", or the path of splits that led here: "world/tensor.1".
  const std::string& name() const { return name_; }

  // For calls that another thread makes for the rank (Background): mark() returns what waits for all that the rank has
  // given to its device so far, or null where a device has nothing in the making; after() makes later calls wait for
  // that instead of everything.
  virtual std::function<void()> mark() { return nullptr; }
  virtual void after(std::function<void()>) {}

  // --- collectives ---------------------------------------------------------------------------------------------------
  // Buffers of one call must not overlap, on one rank or between ranks, except where "in place" is allowed. Counts are
  // in elements; 0 is allowed everywhere, with null pointers too.

  // receive [size, count] gets every rank's send [count], in group order. In place: send == receive + rank * count.
  void allGather(const void* send, void* receive, int64_t count, Element, std::string_view site);

  // receive [receiveBytes] gets every rank's pieces, each at its offset; the rest of it is left alone. Ranks contribute
  // different numbers of pieces of different sizes, which must not overlap and lie inside `receive`; receiveBytes is
  // the same everywhere. In place: a piece may lie in `receive` at its own offset, and nowhere else.
  void allGatherPieces(std::span<const Piece> pieces, void* receive, int64_t receiveBytes, std::string_view site);

  // receive [count] gets the sum over ranks of send [size, count], row `rank`. In place: receive == send + rank *
  // count.
  void reduceScatter(const float* send, float* receive, int64_t count, std::string_view site);

  // On the owner of each share its elements of buffer [count] become the sum over ranks; on the other ranks they are
  // undefined afterwards, and what is in no share is left alone. All ranks give the same shares in the same order; they
  // must not overlap and lie inside the buffer. The way back is allGatherPieces of each rank's own shares, in place:
  // both cost what the shares hold, however large the buffer.
  void reduceScatterPieces(float* buffer, int64_t count, std::span<const Share> shares, std::string_view site);

  // receive [count] gets the sum over ranks of send [count]. In place: send == receive.
  void allReduce(const float* send, float* receive, int64_t count, std::string_view site);

  // data [count] of rank `root` replaces that of the others.
  void broadcast(void* data, int64_t count, Element, int root, std::string_view site);

  // Returns when every rank has called.
  void barrier(std::string_view site);

  // Ranks of equal colour form a group, ordered by (key, rank); its name is this one's, site and colour. A negative
  // colour joins none and gets null.
  std::unique_ptr<Communicator> split(int colour, int key, std::string_view site);

  // The same ranks in the same order as a group of its own.
  std::unique_ptr<Communicator> duplicate(std::string_view site) { return split(0, rank(), site); }

  // --- messages between two ranks ------------------------------------------------------------------------------------
  // From one rank to another messages arrive in the order sent; count and element must be the receiver's. A send
  // returns when its message was received: nothing is buffered. Ranks that send to each other do so in one exchange().

  void send(const void* data, int64_t count, Element, int to, std::string_view site);
  void receive(void* data, int64_t count, Element, int from, std::string_view site);

  // All these messages at once, in whatever order they come; messages to, or from, the same rank keep their order. A
  // rank may exchange with itself.
  void exchange(std::span<const Outgoing>, std::span<const Incoming>, std::string_view site);

  // --- from any thread -----------------------------------------------------------------------------------------------

  // Says that this rank is alive while it computes for long. Every call says so as well.
  virtual void progress() = 0;

  // Kills the world: for the error path of a rank, or to end a wait from outside.
  virtual void abort(const std::string& reason) = 0;

  Traffic traffic() const;

 protected:
  Communicator(int rank, int size, std::string name);

  // Kills the world with what this rank has found in a call, unless it is dead already, and throws the first cause.
  [[noreturn]] virtual void fail(const std::string& code, const Call&, const std::string& message) = 0;
  [[noreturn]] void refuse(const Call&, const std::string& message);

  // The calls above after their arguments were checked. Those of exchange() number their messages themselves.
  virtual void runAllGather(const Call&, const void* send, void* receive) = 0;
  virtual void runAllGatherPieces(const Call&, std::span<const Piece>, void* receive) = 0;
  virtual void runReduceScatter(const Call&, const float* send, float* receive) = 0;
  virtual void runReduceScatterPieces(const Call&, float* buffer, std::span<const Share>) = 0;
  virtual void runAllReduce(const Call&, const float* send, float* receive) = 0;
  virtual void runBroadcast(const Call&, void* data) = 0;
  virtual void runBarrier(const Call&) = 0;
  virtual std::unique_ptr<Communicator> runSplit(const Call&, int colour, int key) = 0;
  virtual void runExchange(std::span<const Outgoing>, std::span<const Incoming>, std::string_view site, Matches*) = 0;

  // As progress(), in the middle of a call; throws the cause when the world is dead.
  virtual void live(const Call&) = 0;

  void countReceived(int64_t bytes) { receivedBytes_.fetch_add(bytes, std::memory_order_relaxed); }
  void countSent(int64_t bytes) { sentBytes_.fetch_add(bytes, std::memory_order_relaxed); }

 private:
  Call next(Operation, Element, int64_t count, int root, std::string_view site);
  void checkPeer(const Call&);
  void checkShares(const Call&, std::span<const Share>);
  void checkApart(const Call&, const void* a, int64_t aBytes, const void* b, int64_t bBytes);

  int rank_, size_;
  std::string name_;
  std::atomic<uint64_t> sequence_{0};
  std::atomic<int64_t> receivedBytes_{0}, sentBytes_{0};
};

}  // namespace lockstep::comm
