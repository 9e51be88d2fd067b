#include "comm/nccl/nccl.h"

#include <time.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "comm/inside.h"
#include "comm/nccl/nccl_api.h"
#include "comm/nccl/tree_sum.h"
#include "core/error.h"
#include "core/wait.h"
#include "cuda/queue.h"

namespace lockstep::comm {

namespace nccl {
namespace {

constexpr int64_t kMicrosecond = 1'000, kMillisecond = 1'000 * kMicrosecond, kSecond = 1'000 * kMillisecond;
// A wait for the GPU spins so long: as long as a small message takes, since a sleep takes longer.
constexpr int64_t kSpinNanoseconds = 200 * kMicrosecond;
// A long wait looks this often whether NCCL and the world are well.
constexpr int64_t kLookNanoseconds = 2 * kMillisecond;
constexpr int64_t kPatienceNanoseconds = 1800 * kSecond;  // NCCL takes no longer once all ranks have met
// Floats of each rank that wait to be summed at a time, and what is laid beside each other begins at such multiples.
constexpr int64_t kChunk = int64_t{1} << 20, kAligned = 64;
constexpr int64_t kSmall = 2048;  // an all-reduce of so few floats sends all to all: one step where slices take two
// Calls of one NCCL group, and groups on a stream that nobody has waited for.
constexpr int64_t kGroupCalls = 256, kGroups = 16;

enum class Place : int64_t { kNone, kHost, kGpu };

const char* nameOf(Place place) {
  return place == Place::kHost ? "the host" : "its GPU";
}

constexpr int64_t alignedUp(int64_t count) {
  return (count + kAligned - 1) / kAligned * kAligned;
}

// Where the ends of messages lie, of all groups of the process: the control moves bytes between ends on the host, and
// must not be given one end there and one on a GPU.
class Ends {
 public:
  static Ends& all() {
    static Ends ends;
    return ends;
  }

  int64_t newGroup() { return ++groups_; }

  // False when the other end, of as many bytes, has said otherwise.
  bool agree(int64_t group, int from, int to, uint64_t number, Place place, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto [at, first] = said_.try_emplace({group, from, to, static_cast<int64_t>(number)}, place, bytes);
    if (first) return true;
    const auto [other, otherBytes] = at->second;
    said_.erase(at);
    return other == place || otherBytes != bytes;  // the control looks at sizes
  }

  // Of a rank that is gone.
  void forget(int64_t group, int rank) {
    const std::lock_guard lock(mutex_);
    std::erase_if(said_, [&](const auto& said) {
      return said.first[0] == group && (said.first[1] == rank || said.first[2] == rank);
    });
  }

 private:
  std::mutex mutex_;
  std::map<std::array<int64_t, 4>, std::pair<Place, int64_t>> said_;  // by group, sender, receiver and number
  std::atomic<int64_t> groups_{0};
};

// Calls that NCCL takes as one.
class Group {
 public:
  explicit Group(const Api& api) : api_(api) { check(api_.groupStart(), "beginning a group"); }
  ~Group() {
    if (open_) api_.groupEnd();
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  void end() {
    open_ = false;
    check(api_.groupEnd(), "starting a group");
  }

 private:
  const Api& api_;
  bool open_ = true;
};

// What the ranks of a group tell each other of their GPUs.
struct Card {
  char name[256];
  int major, minor, gpu;

  std::string text(size_t rank) const {
    return "rank " + std::to_string(rank) + " is on GPU " + std::to_string(gpu) + " (" + name +
           ", compute capability " + std::to_string(major) + "." + std::to_string(minor) + ")";
  }
};

void checkCards(Communicator& group, int gpu) {
  cudaDeviceProp properties{};
  cuda::check(cudaGetDeviceProperties(&properties, gpu), "asking for the GPU's properties");
  Card mine{};
  std::memcpy(mine.name, properties.name, sizeof mine.name);
  mine.major = properties.major, mine.minor = properties.minor, mine.gpu = gpu;
  std::vector<Card> all(static_cast<size_t>(group.size()));
  group.allGather(&mine, all.data(), sizeof mine, Element::kByte, "GPUs");
  for (size_t r = 1; r < all.size(); ++r) {
    const Card &a = all[0], &b = all[r];
    if (std::strcmp(a.name, b.name) != 0 || a.major != b.major || a.minor != b.minor) {
      throw Error("CUDA_GPUS_DIFFER", a.text(0) + ", " + b.text(r) +
                                          "; ranks need GPUs of one kind, for the same bits everywhere: choose them "
                                          "with CUDA_VISIBLE_DEVICES");
    }
    for (size_t other = 0; other < r; ++other) {
      if (all[other].gpu != b.gpu) continue;
      throw Error("CUDA_DEVICE", all[other].text(other) + ", and so is rank " + std::to_string(r) +
                                     "; every rank needs a GPU of its own");
    }
  }
}

// Every collective is a meeting on the control, under the description of the call, at which the ranks say where their
// buffers lie; then the control or NCCL moves the bytes. Its stream runs nothing but NCCL and the sums.
class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::shared_ptr<Communicator> control, int gpu, std::function<void()> settle)
      : Communicator(control->rank(), control->size(), control->name()),
        control_(std::move(control)),
        gpu_(gpu),
        settle_(std::move(settle)),
        sent_(static_cast<size_t>(size())),
        received_(static_cast<size_t>(size())) {
    guarded({.operation = Operation::kSplit, .site = "a group of GPUs"}, [&] { connect(); });
  }

  ~NcclCommunicator() override {
    control_ = nullptr;  // the others learn at once that this rank has left
    Ends::all().forget(number_, rank());
    if (comm_ == nullptr) return;
    queue_->stream();
    api().commDestroy(comm_);
  }

  void progress() override { control_->progress(); }
  void abort(const std::string& reason) override { control_->abort(reason); }

 protected:
  [[noreturn]] void fail(const std::string& code, const Call& call, const std::string& message) override {
    (control_.get()->*(&Inside::fail))(code, call, message);
    std::terminate();
  }

  void runAllGather(const Call& call, const void* send, void* receive) override {
    const Turn turn(*this, call);
    const int64_t bytes = call.count * bytesOf(call.element);
    const auto [place, records] = meet(call, placeOf(call, bytes, {send, receive}));
    if (place == Place::kHost) return onHost([&] { control(&Inside::runAllGather, call, send, receive); });
    if (place == Place::kNone) return;
    onGpu(call, [&] {
      if (size() == 1) return copy(receive, send, bytes);
      check(api().allGather(send, receive, static_cast<size_t>(bytes), kBytes, comm_, stream()), "an all-gather");
    });
    countReceived((size() - 1) * bytes);
    countSent((size() - 1) * bytes);
  }

  void runAllGatherPieces(const Call& call, std::span<const Piece> pieces, void* receive) override {
    const Turn turn(*this, call);
    Place mine = Place::kNone;
    for (const Piece& piece : pieces) {
      const Place at = placeOf(call, piece.bytes, {piece.data});
      if (at != Place::kNone && mine != Place::kNone && at != mine) refuse(call, kMixed);
      mine = std::max(mine, at);
    }
    const auto [place, records] = meet(call, mine, pieces.size());
    if (place == Place::kHost) return onHost([&] { control(&Inside::runAllGatherPieces, call, pieces, receive); });
    // The control looks whether they overlap. All ranks name the same place for a piece, so it copies nothing.
    char* const nowhere = reinterpret_cast<char*>(uintptr_t{1} << 40);
    std::vector<Piece> named(pieces.begin(), pieces.end());
    for (Piece& piece : named) piece.data = nowhere + piece.offset;
    control(&Inside::runAllGatherPieces, call, std::span<const Piece>(named), static_cast<void*>(nowhere));
    const std::vector<std::vector<Piece>> all = gatherLists(call, pieces, records);
    if (place == Place::kGpu) onGpu(call, [&] { gatherPieces(all, static_cast<char*>(receive)); });
  }

  void runReduceScatter(const Call& call, const float* send, float* receive) override {
    const Turn turn(*this, call);
    const auto [place, records] = meet(call, placeOf(call, call.count, {send, receive}));
    if (place == Place::kHost) return onHost([&] { control(&Inside::runReduceScatter, call, send, receive); });
    if (place == Place::kNone) return;
    onGpu(call, [&] {
      if (size() == 1) return copy(receive, send, call.count * 4);
      const Slots slots = slotsOf(call.count);
      for (int64_t begin = 0; begin < call.count; begin += slots.width) {
        const int64_t count = std::min(slots.width, call.count - begin);
        sumOfSlices(send + begin, call.count, receive + begin, count, slots);
        pace(call);
      }
    });
    countReceived((size() - 1) * call.count * 4);
    countSent((size() - 1) * call.count * 4);
  }

  void runReduceScatterPieces(const Call& call, float* buffer, std::span<const Share> shares) override {
    const Turn turn(*this, call);
    Place mine = Place::kNone;
    int64_t own = 0, others = 0;
    for (const Share& share : shares) {
      if (mine == Place::kNone) mine = placeOf(call, share.count, {buffer + share.offset});
      (share.owner == rank() ? own : others) += share.count;
    }
    const auto [place, records] = meet(call, mine, shares.size());
    if (place == Place::kHost) return onHost([&] { control(&Inside::runReduceScatterPieces, call, buffer, shares); });
    checkSameShares(call, gatherLists(call, shares, records));
    if (place == Place::kGpu && size() > 1) onGpu(call, [&] { sumShares(call, buffer, shares); });
    countReceived((size() - 1) * own * 4);
    countSent(others * 4);
  }

  void runAllReduce(const Call& call, const float* send, float* receive) override {
    const Turn turn(*this, call);
    const auto [place, records] = meet(call, placeOf(call, call.count, {send, receive}));
    if (place == Place::kHost) return onHost([&] { control(&Inside::runAllReduce, call, send, receive); });
    if (place == Place::kNone) return;
    onGpu(call, [&] {
      if (size() == 1) return copy(receive, send, call.count * 4);
      const Slots slots = slotsOf(call.count);
      int64_t begin = 0;
      const int64_t least = size() * kAligned;
      while (size() > 2 && call.count > kSmall && call.count - begin >= least) {
        const int64_t slice = std::min(slots.width, (call.count - begin) / least * kAligned);
        float* const own = receive + begin + rank() * slice;
        sumOfSlices(send + begin, slice, own, slice, slots);
        check(api().allGather(own, receive + begin, static_cast<size_t>(slice) * 4, kBytes, comm_, stream()),
              "spreading sums");
        begin += size() * slice;
        countBoth(2 * (size() - 1) * slice * 4);
        pace(call);
      }
      while (begin < call.count) {
        const int64_t count = std::min(slots.width, call.count - begin);
        check(api().allGather(send + begin, slots.at, static_cast<size_t>(count) * 4, kBytes, comm_, stream()),
              "gathering addends");
        const float* addends[kMaxRanks];
        for (int r = 0; r < size(); ++r) addends[r] = slots.at + r * count;
        treeSum(*queue_, addends, size(), count, receive + begin);
        begin += count;
        countBoth((size() - 1) * count * 4);
        pace(call);
      }
    });
  }

  void runBroadcast(const Call& call, void* data) override {
    const Turn turn(*this, call);
    const int64_t bytes = call.count * bytesOf(call.element);
    const auto [place, records] = meet(call, placeOf(call, bytes, {data}));
    if (place == Place::kHost) return onHost([&] { control(&Inside::runBroadcast, call, data); });
    if (place == Place::kNone) return;
    onGpu(call, [&] {
      if (size() == 1) return;
      check(api().broadcast(data, data, static_cast<size_t>(bytes), kBytes, call.root, comm_, stream()), "a broadcast");
    });
    if (rank() == call.root) {
      countSent((size() - 1) * bytes);
    } else {
      countReceived(bytes);
    }
  }

  void runBarrier(const Call& call) override {
    const Turn turn(*this, call);
    control(&Inside::runBarrier, call);
  }

  std::unique_ptr<Communicator> runSplit(const Call& call, int colour, int key) override {
    const Turn turn(*this, call);
    std::unique_ptr<Communicator> part = control(&Inside::runSplit, call, colour, key);
    if (part == nullptr) return nullptr;
    return std::make_unique<NcclCommunicator>(std::move(part), gpu_, settle_);
  }

  // The control takes every message from one rank to the other, those on GPUs without their bytes.
  void runExchange(std::span<const Outgoing> outgoing, std::span<const Incoming> incoming,
                   std::string_view site) override {
    Call call{.operation = outgoing.empty() ? Operation::kReceive : Operation::kSend, .site = site};
    const auto first = [&](const auto& message, int peer, const std::vector<int64_t>& numbers) {
      call.element = message.element, call.count = message.count, call.root = peer;
      call.sequence = static_cast<uint64_t>(numbers[static_cast<size_t>(peer)]);
    };
    if (!outgoing.empty()) {
      first(outgoing[0], outgoing[0].to, sent_);
    } else if (!incoming.empty()) {
      first(incoming[0], incoming[0].from, received_);
    }
    const Turn turn(*this, call);
    std::vector<Outgoing> sent(outgoing.begin(), outgoing.end()), sentGpu;
    std::vector<Incoming> received(incoming.begin(), incoming.end()), receivedGpu;
    std::vector<Place> places;
    for (const Outgoing& m : sent) places.push_back(placeOf(call, m.count, {m.data}));
    for (const Incoming& m : received) places.push_back(placeOf(call, m.count, {m.data}));
    const bool anyOnGpu = std::find(places.begin(), places.end(), Place::kGpu) != places.end();
    if (anyOnGpu) settle(call);
    auto place = places.begin();
    const auto part = [&](auto& message, auto& onGpus, int from, int to, int64_t& number) {
      const auto own = static_cast<uint64_t>(number++);
      const Place mine = *place++;
      if (!Ends::all().agree(number_, from, to, own, mine, message.count * bytesOf(message.element))) {
        refuse({from == rank() ? Operation::kSend : Operation::kReceive, message.element, message.count,
                from == rank() ? to : from, own, site},
               mine == Place::kHost ? "this end lies on the host, the other on a GPU"
                                    : "this end lies on a GPU, the other on the host");
      }
      if (mine != Place::kGpu) return;
      onGpus.push_back(message);
      message.data = nullptr;
    };
    for (Outgoing& m : sent) part(m, sentGpu, rank(), m.to, sent_[static_cast<size_t>(m.to)]);
    for (Incoming& m : received) part(m, receivedGpu, m.from, rank(), received_[static_cast<size_t>(m.from)]);
    const auto agree = [&] {
      onHost([&] {
        control(&Inside::runExchange, std::span<const Outgoing>(sent), std::span<const Incoming>(received), site);
      });
    };
    if (!anyOnGpu) return agree();
    // First the bytes: messages of one exchange must not wait for each other, as a stage's last activations and the
    // gradients that it waits for.
    onGpu(call, [&] {
      moveMessages(sentGpu, receivedGpu);
      agree();
    });
  }

 private:
  // What a rank says at a meeting.
  struct Record {
    Place place = Place::kNone;
    int64_t items = 0;  // of its list of pieces or shares
  };
  struct Meeting {
    Place place;
    std::vector<Record> records;
  };

  // The one thread that is in a call.
  class Turn {
   public:
    Turn(NcclCommunicator& group, const Call& call) : group_(group) {
      if (group_.busy_.exchange(true)) group_.refuse(call, "another thread is in a call of this handle");
    }
    ~Turn() { group_.busy_.store(false); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    NcclCommunicator& group_;
  };

  // Room for addends of all ranks, `width` floats apart.
  struct Slots {
    float* at;
    int64_t width;
  };

  template <class R, class... P, class... A>
  R control(R (Communicator::*run)(P...), A&&... arguments) {
    return (control_.get()->*run)(std::forward<A>(arguments)...);
  }

  cudaStream_t stream() const { return queue_->stream(); }

  // --- coming to be --------------------------------------------------------------------------------------------------

  void connect() {
    checkCards(*control_, gpu_);
    queue_ = std::make_unique<cuda::Queue>(gpu_, 1, 0);
    if (size() > 1) {
      const Api& api = nccl::api();
      UniqueId id{};
      if (rank() == 0) check(api.getUniqueId(&id), "making a group");
      control_->broadcast(&id, sizeof id, Element::kByte, 0, "NCCL's group");
      stream();  // the GPU is the thread's current one
      check(api.commInitRank(&comm_, size(), id, rank()), "joining a group");
    }
    if (rank() == 0) number_ = Ends::all().newGroup();
    control_->broadcast(&number_, sizeof number_, Element::kByte, 0, "the group's number");
  }

  // --- the frame of a call -------------------------------------------------------------------------------------------

  // What throws has killed the world, and nobody uses this rank's buffers any more.
  template <class Work>
  void guarded(const Call& call, const Work& work) {
    try {
      try {
        work();
      } catch (const Error& error) {
        fail(error.code(), call, error.what());  // the others learn it before this rank waits for its GPU
      } catch (const std::exception& error) {
        control_->abort(error.what());
        throw;
      }
    } catch (...) {
      if (comm_ != nullptr) api().commAbort(std::exchange(comm_, nullptr));
      if (queue_ != nullptr) cudaStreamSynchronize(stream());
      throw;
    }
  }

  Place placeOf(const Call& call, int64_t count, std::initializer_list<const void*> buffers) {
    if (count == 0) return Place::kNone;
    Place place = Place::kNone;
    for (const void* const buffer : buffers) {
      cudaPointerAttributes attributes{};
      const bool known = cudaPointerGetAttributes(&attributes, buffer) == cudaSuccess;
      if (!known) cudaGetLastError();
      const bool onGpu = known && (attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged);
      const Place at = onGpu ? Place::kGpu : Place::kHost;
      if (place != Place::kNone && at != place) refuse(call, kMixed);
      place = at;
    }
    return place;
  }

  static constexpr const char* kMixed = "its buffers lie in part on the host, in part on the GPU";

  void settle(const Call& call) {
    control_->progress();
    guarded(call, settle_);
  }

  // All ranks are in this call. Returns where its buffers lie on all that have some.
  Meeting meet(const Call& call, Place mine, size_t items = 0) {
    if (mine == Place::kGpu) settle(call);
    std::vector<Record> records(static_cast<size_t>(size()));
    Record& own = records[static_cast<size_t>(rank())];
    own = {mine, static_cast<int64_t>(items)};
    const Piece piece{&own, rank() * static_cast<int64_t>(sizeof own), sizeof own};
    control(&Inside::runAllGatherPieces, call, std::span(&piece, 1), static_cast<void*>(records.data()));
    size_t first = records.size();
    for (size_t r = 0; r < records.size(); ++r) {
      if (records[r].place == Place::kNone) continue;
      first = std::min(first, r);
      if (records[r].place == records[first].place) continue;
      refuse(call, "rank " + std::to_string(first) + " has its buffers on " + nameOf(records[first].place) + ", rank " +
                       std::to_string(r) + " on " + nameOf(records[r].place));
    }
    const Place place = first < records.size() ? records[first].place : Place::kNone;
    if (place == Place::kGpu && mine != Place::kGpu) settle(call);  // it sends nothing, and receives
    return {place, std::move(records)};
  }

  // Every rank's list.
  template <class Item>
  std::vector<std::vector<Item>> gatherLists(const Call& call, std::span<const Item> mine,
                                             const std::vector<Record>& records) {
    std::vector<std::vector<Item>> lists(records.size());
    int64_t items = 0, before = 0;
    for (size_t r = 0; r < records.size(); ++r) {
      if (static_cast<int>(r) == rank()) before = items;
      items += records[r].items;
    }
    std::vector<Item> all(static_cast<size_t>(items));
    constexpr auto kItem = static_cast<int64_t>(sizeof(Item));
    const Piece piece{mine.data(), before * kItem, static_cast<int64_t>(mine.size()) * kItem};
    control(&Inside::runAllGatherPieces, call, std::span(&piece, 1), static_cast<void*>(all.data()));
    auto from = all.begin();
    for (size_t r = 0; r < records.size(); from += records[r].items, ++r)
      lists[r].assign(from, from + records[r].items);
    return lists;
  }

  template <class Run>
  void onHost(const Run& run) {
    const Traffic before = control_->traffic();
    run();
    const Traffic after = control_->traffic();
    countReceived(after.receivedBytes - before.receivedBytes);
    countSent(after.sentBytes - before.sentBytes);
  }

  template <class Move>
  void onGpu(const Call& call, const Move& move) {
    guarded(call, [&] {
      stream();  // the GPU is the thread's current one
      groups_ = 0;
      move();
      finish(call);
    });
  }

  // Between the groups of one call: no more lie on the stream than launches can be ahead of a GPU.
  void pace(const Call& call) {
    if (++groups_ % kGroups == 0) finish(call);
  }

  // Waits for the stream, and for whatever makes waiting useless.
  void finish(const Call& call) {
    const int64_t began = nowNanoseconds();
    const int64_t spinUntil = began + (spinningPays() ? kSpinNanoseconds : 0);
    int64_t lookAt = began + kLookNanoseconds;
    for (;;) {
      const cudaError_t state = cudaStreamQuery(stream());
      if (state == cudaSuccess) return;
      const int64_t now = nowNanoseconds();
      if (state != cudaErrorNotReady || now >= lookAt) {
        lookAt = now + kLookNanoseconds;
        // An empty exchange throws the world's cause when it is dead; what NCCL says may only follow from that.
        control(&Inside::runExchange, std::span<const Outgoing>(), std::span<const Incoming>(), call.site);
        if (state != cudaErrorNotReady) cuda::check(state, "communicating");
        Result error = kSuccess;
        if (comm_ != nullptr) check(api().commGetAsyncError(comm_, &error), "asking NCCL how it is");
        check(error, "moving the bytes");
        if (now - began > kPatienceNanoseconds) {
          throw Error("NCCL_FAILED", "NCCL has not moved the bytes for " +
                                         std::to_string(kPatienceNanoseconds / kSecond) +
                                         " s; run again with NCCL_DEBUG=INFO in the environment to see more");
        }
      }
      if (now < spinUntil) continue;
      const timespec pause{0, 50 * kMicrosecond};
      nanosleep(&pause, nullptr);
    }
  }

  void countBoth(int64_t bytes) {
    countReceived(bytes);
    countSent(bytes);
  }

  // --- on the GPU ----------------------------------------------------------------------------------------------------

  void copy(void* to, const void* from, int64_t bytes) {
    if (to != from) queue_->copy(to, from, static_cast<size_t>(bytes));
  }

  void send(const void* data, int64_t bytes, int to) {
    check(api().send(data, static_cast<size_t>(bytes), kBytes, to, comm_, stream()), "sending");
  }
  void receive(void* data, int64_t bytes, int from) {
    check(api().receive(data, static_cast<size_t>(bytes), kBytes, from, comm_, stream()), "receiving");
  }

  Slots slotsOf(int64_t count) {
    const int64_t width = std::min(kChunk, alignedUp(count));
    return {queue_->scratchOf<float>(size() * width), width};
  }

  // sum = tree over ranks of their slice for this rank. The slice for rank p begins at slices + p * stride.
  void sumOfSlices(const float* slices, int64_t stride, float* sum, int64_t count, const Slots& slots) {
    Group group(api());
    const float* addends[kMaxRanks];
    addends[rank()] = slices + rank() * stride;
    for (int step = 1; step < size(); ++step) {
      const int to = (rank() + step) % size(), from = (rank() + size() - step) % size();
      float* const slot = slots.at + from * slots.width;
      addends[from] = slot;
      send(slices + to * stride, count * 4, to);
      receive(slot, count * 4, from);
    }
    group.end();
    treeSum(*queue_, addends, size(), count, sum);
  }

  void gatherPieces(const std::vector<std::vector<Piece>>& all, char* to) {
    std::unique_ptr<Group> group;
    int64_t calls = 0;
    for (int owner = 0; owner < size(); ++owner) {
      for (const Piece& piece : all[static_cast<size_t>(owner)]) {
        if (piece.bytes == 0) continue;
        char* const at = to + piece.offset;
        if (size() == 1) {
          copy(at, piece.data, piece.bytes);
          continue;
        }
        if (group == nullptr) group = std::make_unique<Group>(api());
        const void* const from = owner == rank() ? piece.data : at;
        check(api().broadcast(from, at, static_cast<size_t>(piece.bytes), kBytes, owner, comm_, stream()), "a piece");
        owner == rank() ? countSent((size() - 1) * piece.bytes) : countReceived(piece.bytes);
        if (++calls % kGroupCalls != 0) continue;
        group->end();
        group = nullptr;
      }
    }
    if (group != nullptr) group->end();
  }

  void checkSameShares(const Call& call, const std::vector<std::vector<Share>>& lists) {
    const auto text = [](const std::vector<Share>& shares, size_t i) {
      if (i == shares.size()) return std::string("no further share");
      return std::to_string(shares[i].count) + " elements at offset " + std::to_string(shares[i].offset) +
             " for rank " + std::to_string(shares[i].owner);
    };
    const std::vector<Share>& expected = lists[0];
    for (size_t r = 1; r < lists.size(); ++r) {
      const auto [a, b] = std::mismatch(expected.begin(), expected.end(), lists[r].begin(), lists[r].end());
      if (a == expected.end() && b == lists[r].end()) continue;
      const auto i = static_cast<size_t>(a - expected.begin());
      fail("COLLECTIVE_MISMATCH", call,  // all of them find this
           "expected share " + std::to_string(i) + " to be " + text(expected, i) + ", as of rank 0, received " +
               text(lists[r], i) + " from rank " + std::to_string(r));
    }
  }

  // Shares go to their owners in rounds, each of as much as there is room for at every owner.
  void sumShares(const Call& call, float* buffer, std::span<const Share> shares) {
    int64_t total = 0;
    for (const Share& share : shares) total += alignedUp(share.count);
    const Slots slots = slotsOf(total);
    std::vector<int64_t> filled(static_cast<size_t>(size()));
    std::vector<Share> round;
    const auto flush = [&] {
      sumRound(buffer, round, slots);
      round.clear();
      std::fill(filled.begin(), filled.end(), 0);
      pace(call);
    };
    for (const Share& share : shares) {
      for (int64_t done = 0; done < share.count;) {
        int64_t& full = filled[static_cast<size_t>(share.owner)];
        if (full == slots.width || static_cast<int64_t>(round.size()) * (size() - 1) >= kGroupCalls) flush();
        const int64_t count = std::min(share.count - done, slots.width - full);
        round.push_back({share.offset + done, count, share.owner});
        full += alignedUp(count);
        done += count;
      }
    }
    if (!round.empty()) flush();
  }

  void sumRound(float* buffer, const std::vector<Share>& round, const Slots& slots) {
    Group group(api());
    int64_t place = 0;
    for (const Share& share : round) {
      if (share.owner != rank()) {
        send(buffer + share.offset, share.count * 4, share.owner);
        continue;
      }
      for (int r = 0; r < size(); ++r) {
        if (r != rank()) receive(slots.at + r * slots.width + place, share.count * 4, r);
      }
      place += alignedUp(share.count);
    }
    group.end();
    place = 0;
    for (const Share& share : round) {
      if (share.owner != rank()) continue;
      const float* addends[kMaxRanks];
      for (int r = 0; r < size(); ++r) addends[r] = slots.at + r * slots.width + place;
      addends[rank()] = buffer + share.offset;
      treeSum(*queue_, addends, size(), share.count, buffer + share.offset);
      place += alignedUp(share.count);
    }
  }

  void moveMessages(const std::vector<Outgoing>& sent, const std::vector<Incoming>& received) {
    auto own = sent.begin();  // to this rank itself, in order
    for (const Incoming& m : received) {
      if (m.from != rank()) continue;
      own = std::find_if(own, sent.end(), [&](const Outgoing& o) { return o.to == rank(); });
      copy(m.data, own->data, m.count * bytesOf(m.element));
      ++own;
    }
    if (size() == 1) return;
    Group group(api());
    for (const Outgoing& m : sent) {
      if (m.to != rank()) send(m.data, m.count * bytesOf(m.element), m.to);
    }
    for (const Incoming& m : received) {
      if (m.from != rank()) receive(m.data, m.count * bytesOf(m.element), m.from);
    }
    group.end();
  }

  std::shared_ptr<Communicator> control_;
  int gpu_;
  std::function<void()> settle_;
  std::unique_ptr<cuda::Queue> queue_;
  Comm comm_ = nullptr;  // null in a group of one, and after a failure
  std::atomic<bool> busy_{false};
  int64_t number_ = 0;                    // of the group, in this process
  std::vector<int64_t> sent_, received_;  // messages to and from each rank
  int64_t groups_ = 0;
};

}  // namespace
}  // namespace nccl

std::unique_ptr<Communicator> overNccl(std::shared_ptr<Communicator> control, int gpu, std::function<void()> settle) {
  return std::make_unique<nccl::NcclCommunicator>(std::move(control), gpu, std::move(settle));
}

}  // namespace lockstep::comm
