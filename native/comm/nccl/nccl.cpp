#include "comm/nccl/nccl.h"

#include <time.h>

#include <algorithm>
#include <initializer_list>
#include <mutex>
#include <utility>
#include <vector>

#include "comm/inside.h"
#include "comm/nccl/cards.h"
#include "comm/nccl/launch_order.h"
#include "comm/nccl/meeting.h"
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
constexpr size_t kGroupCalls = 256;
constexpr int64_t kGroups = 16;

constexpr int64_t alignedUp(int64_t count) {
  return (count + kAligned - 1) / kAligned * kAligned;
}

// Every collective is a meeting on the control, under the description of the call, at which the ranks say where their
// buffers lie; then the control or NCCL moves the bytes. Its stream runs nothing but NCCL and the sums.
class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::shared_ptr<Communicator> control, int gpu, Computation computation)
      : Communicator(control->rank(), control->size(), control->name()),
        control_(std::move(control)),
        gpu_(gpu),
        computation_(std::move(computation)),
        sent_(static_cast<size_t>(size())),
        received_(static_cast<size_t>(size())) {
    const Call call{.operation = Operation::kSplit, .site = "a group of GPUs"};
    guarded(call, [&] { connect(call); });
  }

  ~NcclCommunicator() override {
    control_ = nullptr;  // the others learn at once that this rank has left
    Ends::all().forget(number_, rank());
    cudaSetDevice(gpu_);
    if (comm_ != nullptr) api().commDestroy(comm_);
  }

  std::function<void()> mark() override { return computation_.mark == nullptr ? nullptr : computation_.mark(); }
  void after(std::function<void()> given) override { given_ = std::move(given); }
  void progress() override { control_->progress(); }
  void abort(const std::string& reason) override { control_->abort(reason); }

 protected:
  void live(const Call& call) override { control(&Inside::live, call); }

  [[noreturn]] void fail(const std::string& code, const Call& call, const std::string& message) override {
    (control_.get()->*(&Inside::fail))(code, call, message);
    std::terminate();
  }

  void runAllGather(const Call& call, const void* send, void* receive) override {
    const auto inCall = turn(call);
    const int64_t bytes = call.count * bytesOf(call.element);
    const auto [place, records] = meet(call, placeOf(call, bytes, {send, receive}));
    if (place == Place::kHost) return onHost([&] { control(&Inside::runAllGather, call, send, receive); });
    if (place == Place::kNone) return;
    onGpu(call, [&] {
      if (size() == 1) return copy(receive, send, bytes);
      start(call, [&] {
        check(api().allGather(send, receive, static_cast<size_t>(bytes), kBytes, comm_, stream()), "an all-gather");
      });
    });
    countReceived((size() - 1) * bytes);
    countSent((size() - 1) * bytes);
  }

  void runAllGatherPieces(const Call& call, std::span<const Piece> pieces, void* receive) override {
    const auto inCall = turn(call);
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
    if (place == Place::kGpu) onGpu(call, [&] { gatherPieces(call, all, static_cast<char*>(receive)); });
  }

  void runReduceScatter(const Call& call, const float* send, float* receive) override {
    const auto inCall = turn(call);
    const auto [place, records] = meet(call, placeOf(call, call.count, {send, receive}));
    if (place == Place::kHost) return onHost([&] { control(&Inside::runReduceScatter, call, send, receive); });
    if (place == Place::kNone) return;
    onGpu(call, [&] {
      if (size() == 1) return copy(receive, send, call.count * 4);
      const Slots slots = slotsOf(call.count);
      for (int64_t begin = 0; begin < call.count; begin += slots.width) {
        const int64_t count = std::min(slots.width, call.count - begin);
        sumOfSlices(call, send + begin, call.count, receive + begin, count, slots);
        pace(call);
      }
    });
    countReceived((size() - 1) * call.count * 4);
    countSent((size() - 1) * call.count * 4);
  }

  void runReduceScatterPieces(const Call& call, float* buffer, std::span<const Share> shares) override {
    const auto inCall = turn(call);
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
    const auto inCall = turn(call);
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
        sumOfSlices(call, send + begin, slice, own, slice, slots);
        start(call, [&] {
          check(api().allGather(own, receive + begin, static_cast<size_t>(slice) * 4, kBytes, comm_, stream()),
                "spreading sums");
        });
        begin += size() * slice;
        countBoth(2 * (size() - 1) * slice * 4);
        pace(call);
      }
      while (begin < call.count) {
        const int64_t count = std::min(slots.width, call.count - begin);
        start(call, [&] {
          check(api().allGather(send + begin, slots.at, static_cast<size_t>(count) * 4, kBytes, comm_, stream()),
                "gathering addends");
        });
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
    const auto inCall = turn(call);
    const int64_t bytes = call.count * bytesOf(call.element);
    const auto [place, records] = meet(call, placeOf(call, bytes, {data}));
    if (place == Place::kHost) return onHost([&] { control(&Inside::runBroadcast, call, data); });
    if (place == Place::kNone) return;
    onGpu(call, [&] {
      if (size() == 1) return;
      start(call, [&] {
        check(api().broadcast(data, data, static_cast<size_t>(bytes), kBytes, call.root, comm_, stream()),
              "a broadcast");
      });
    });
    if (rank() == call.root) {
      countSent((size() - 1) * bytes);
    } else {
      countReceived(bytes);
    }
  }

  void runBarrier(const Call& call) override {
    const auto inCall = turn(call);
    control(&Inside::runBarrier, call);
  }

  std::unique_ptr<Communicator> runSplit(const Call& call, int colour, int key) override {
    const auto inCall = turn(call);
    std::unique_ptr<Communicator> part = control(&Inside::runSplit, call, colour, key);
    if (part == nullptr) return nullptr;
    return std::make_unique<NcclCommunicator>(std::move(part), gpu_, computation_);
  }

  // The control takes every message from one rank to the other, those on GPUs without their bytes.
  void runExchange(std::span<const Outgoing> outgoing, std::span<const Incoming> incoming, std::string_view site,
                   Matches*) override {
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
    const auto inCall = turn(call);
    std::vector<Outgoing> sent(outgoing.begin(), outgoing.end());
    std::vector<Incoming> received(incoming.begin(), incoming.end());
    std::vector<Place> places;
    for (const Incoming& m : received) places.push_back(placeOf(call, m.count, {m.data}));
    for (const Outgoing& m : sent) places.push_back(placeOf(call, m.count, {m.data}));
    const bool anyOnGpu = std::find(places.begin(), places.end(), Place::kGpu) != places.end();
    if (anyOnGpu) settle(call);
    auto place = places.begin();
    GpuMessages onGpus(*this, call);
    const auto part = [&](auto& message, int from, int to, int64_t& number) {
      const auto own = static_cast<uint64_t>(number++);
      const Place mine = *place++;
      if (!Ends::all().agree(number_, from, to, own, mine, message.count * bytesOf(message.element))) {
        refuse({from == rank() ? Operation::kSend : Operation::kReceive, message.element, message.count,
                from == rank() ? to : from, own, site},
               mine == Place::kHost ? "this end lies on the host, the other on a GPU"
                                    : "this end lies on a GPU, the other on the host");
      }
      if (mine != Place::kGpu) return onGpus.skip();
      onGpus.add({number_, static_cast<int64_t>(own), from, to}, message.data,
                 message.count * bytesOf(message.element));
      message.data = nullptr;
    };
    for (Incoming& m : received) part(m, m.from, rank(), received_[static_cast<size_t>(m.from)]);
    for (Outgoing& m : sent) part(m, rank(), m.to, sent_[static_cast<size_t>(m.to)]);
    const auto run = [&](Matches* matches) {
      onHost([&] {
        control(&Inside::runExchange, std::span<const Outgoing>(sent), std::span<const Incoming>(received), site,
                matches);
      });
    };
    if (!anyOnGpu) return run(nullptr);
    onGpu(call, [&] {
      onGpus.copyOwn();
      run(&onGpus);
    });
  }

 private:
  // What a rank says at a meeting.
  // Held by the one thread that is in a call.
  std::unique_lock<std::mutex> turn(const Call& call) {
    std::unique_lock turn(calling_, std::try_to_lock);
    if (!turn.owns_lock()) refuse(call, "another thread is in a call of this handle");
    return turn;
  }

  // Messages of one exchange, incoming ones first. Each is started when both its ranks are there, so that none waits
  // for another, as a stage's last activations and the gradients that it waits for.
  class GpuMessages final : public Matches {
   public:
    GpuMessages(NcclCommunicator& group, const Call& call) : group_(group), call_(call) {}

    void skip() { messages_.emplace_back(); }
    void add(const Launch& launch, const void* data, int64_t bytes) {
      messages_.push_back({launch, const_cast<void*>(data), bytes});
    }

    // Those of this rank to itself, in order.
    void copyOwn() {
      for (const Message& to : messages_) {
        if (to.launch.from != group_.rank() || to.launch.to != group_.rank()) continue;
        const auto from =
            std::find_if(messages_.rbegin(), messages_.rend(), [&](const Message& m) { return m.launch == to.launch; });
        group_.copy(to.data, from->data, to.bytes);
      }
    }

    void meet(size_t incoming) override {
      const Launch& launch = messages_[incoming].launch;
      if (launch.group == 0 || launch.from == launch.to) return;
      const std::vector<int>& gpus = group_.gpus_;
      LaunchOrder::all().add(launch, {gpus[static_cast<size_t>(launch.from)], gpus[static_cast<size_t>(launch.to)]});
    }

    void move() override {
      LaunchOrder& order = LaunchOrder::all();
      while (order.contains(*group_.line_, group_.number_)) {
        group_.startNext(call_, [&](const Launch& launch) {
          const auto m = std::find_if(messages_.begin(), messages_.end(),
                                      [&](const Message& own) { return own.launch == launch; });
          launch.from == group_.rank() ? group_.send(m->data, m->bytes, launch.to)
                                       : group_.receive(m->data, m->bytes, launch.from);
        });
      }
      group_.live(call_);  // a dropped group has left the line
    }

   private:
    struct Message {
      Launch launch;
      void* data = nullptr;
      int64_t bytes = 0;
    };

    NcclCommunicator& group_;
    const Call& call_;
    std::vector<Message> messages_;
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

  void connect(const Call& call) {
    gpus_ = checkCards(*control_, gpu_);
    queue_ = std::make_unique<cuda::Queue>(gpu_, 1, 0);
    stream_ = stream();  // the GPU is the thread's current one
    line_ = &LaunchOrder::all().lineOf(gpu_);
    if (rank() == 0) number_ = Ends::all().newGroup();
    control_->broadcast(&number_, sizeof number_, Element::kByte, 0, "the group's number");
    if (size() > 1) {
      const Api& api = nccl::api();
      UniqueId id{};
      if (rank() == 0) check(api.getUniqueId(&id), "making a group");
      control_->broadcast(&id, sizeof id, Element::kByte, 0, "NCCL's group");
      Config config;
      check(api.commInitRankConfig(&comm_, size(), id, rank(), &config), "joining a group");
      awaitNccl(call, "joining a group");
      meetPeers(call);
    }
  }

  // NCCL connects two ranks, in each direction, where one first sends to the other, and starts nothing of a group
  // before: ranks that connect different directions, or in another order, would wait for each other.
  void meetPeers(const Call& call) {
    char* const bytes = queue_->scratchOf<char>(size());
    start(call, [&] {
      for (int peer = 0; peer < size(); ++peer) {
        if (peer == rank()) continue;
        send(bytes + rank(), 1, peer);
        receive(bytes + peer, 1, peer);
      }
    });
    finish(call);
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
      LaunchOrder::all().drop(number_);
      if (comm_ != nullptr) api().commAbort(std::exchange(comm_, nullptr));
      if (stream_ != nullptr) cudaStreamSynchronize(stream_);
      throw;
    }
  }

  Place placeOf(const Call& call, int64_t count, std::initializer_list<const void*> buffers) {
    if (count == 0) return Place::kNone;
    // A thread that never chose would ask GPU 0, and take memory there.
    guarded(call, [&] { cuda::check(cudaSetDevice(gpu_), "choosing the GPU"); });
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
    guarded(call, given_ == nullptr ? computation_.settle : given_);
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

  template <class Item>
  std::vector<std::vector<Item>> gatherLists(const Call& call, std::span<const Item> mine,
                                             const std::vector<Record>& records) {
    return listsOf(mine, rank(), records, [&](std::span<const Item> own, int64_t before, std::vector<Item>& all) {
      constexpr auto kItem = static_cast<int64_t>(sizeof(Item));
      const Piece piece{own.data(), before * kItem, static_cast<int64_t>(own.size()) * kItem};
      control(&Inside::runAllGatherPieces, call, std::span(&piece, 1), static_cast<void*>(all.data()));
    });
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

  // Waits until ready(), or for whatever makes waiting useless.
  template <class Ready>
  void await(const Call& call, const Ready& ready) {
    const int64_t began = nowNanoseconds();
    const int64_t spinUntil = began + (spinningPays() ? kSpinNanoseconds : 0);
    int64_t lookAt = began + kLookNanoseconds;
    while (!ready()) {
      const int64_t now = nowNanoseconds();
      if (now >= lookAt) {
        lookAt = now + kLookNanoseconds;
        look(call);
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

  // What NCCL says may only follow from the cause of the world's death.
  void look(const Call& call) {
    live(call);
    if (comm_ != nullptr) check(state(), "moving the bytes");
  }

  Result state() {
    Result now = kSuccess;
    check(api().commGetAsyncError(comm_, &now), "asking NCCL how it is");
    return now;
  }

  // Until NCCL has done what it was called for: before that it takes no call, and the stream knows nothing of it.
  void awaitNccl(const Call& call, const char* what) {
    await(call, [&] {
      const Result now = state();
      if (now == kInProgress) return false;
      if (now != kSuccess) look(call);
      check(now, what);
      return true;
    });
  }

  // Waits for the stream.
  void finish(const Call& call) {
    await(call, [&] {
      const cudaError_t now = cudaStreamQuery(stream());
      if (now == cudaSuccess || now == cudaErrorNotReady) return now == cudaSuccess;
      look(call);
      cuda::check(now, "communicating");
      return true;
    });
  }

  void countBoth(int64_t bytes) {
    countReceived(bytes);
    countSent(bytes);
  }

  // --- on the GPU ----------------------------------------------------------------------------------------------------

  // What `calls` asks NCCL for, of all ranks together; returns when it is on the stream.
  template <class Calls>
  void start(const Call& call, const Calls& calls) {
    LaunchOrder::all().arrive({number_, ++launches_}, gpus_);
    startNext(call, [&](const Launch&) { calls(); });
  }

  // Waits until launches of this group are first in the GPU's line, and starts them.
  template <class Ask>
  void startNext(const Call& call, const Ask& ask) {
    std::vector<Launch> launches;  // none: the group was dropped meanwhile
    await(call, [&] {
      if (line_->isNextOf(number_)) launches = LaunchOrder::all().nextOf(*line_, number_);
      return !launches.empty();
    });
    Group group(api());
    for (const Launch& launch : launches) ask(launch);
    group.end();
    awaitNccl(call, "starting a group");
    LaunchOrder::all().leave(*line_, launches);
  }

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
  void sumOfSlices(const Call& call, const float* slices, int64_t stride, float* sum, int64_t count,
                   const Slots& slots) {
    const float* addends[kMaxRanks];
    addends[rank()] = slices + rank() * stride;
    start(call, [&] {
      for (int step = 1; step < size(); ++step) {
        const int to = (rank() + step) % size(), from = (rank() + size() - step) % size();
        float* const slot = slots.at + from * slots.width;
        addends[from] = slot;
        send(slices + to * stride, count * 4, to);
        receive(slot, count * 4, from);
      }
    });
    treeSum(*queue_, addends, size(), count, sum);
  }

  void gatherPieces(const Call& call, const std::vector<std::vector<Piece>>& all, char* to) {
    std::vector<std::pair<int, Piece>> pieces;  // with their owners
    for (int owner = 0; owner < size(); ++owner) {
      for (const Piece& piece : all[static_cast<size_t>(owner)]) {
        if (piece.bytes > 0) pieces.emplace_back(owner, piece);
      }
    }
    if (size() == 1) {
      for (const auto& [owner, piece] : pieces) copy(to + piece.offset, piece.data, piece.bytes);
      return;
    }
    for (size_t first = 0; first < pieces.size(); first += kGroupCalls) {
      start(call, [&] {
        for (size_t i = first; i < std::min(first + kGroupCalls, pieces.size()); ++i) {
          const auto& [owner, piece] = pieces[i];
          char* const at = to + piece.offset;
          const void* const from = owner == rank() ? piece.data : at;
          check(api().broadcast(from, at, static_cast<size_t>(piece.bytes), kBytes, owner, comm_, stream()), "a piece");
          owner == rank() ? countSent((size() - 1) * piece.bytes) : countReceived(piece.bytes);
        }
      });
    }
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
      sumRound(call, buffer, round, slots);
      round.clear();
      std::fill(filled.begin(), filled.end(), 0);
      pace(call);
    };
    for (const Share& share : shares) {
      for (int64_t done = 0; done < share.count;) {
        int64_t& full = filled[static_cast<size_t>(share.owner)];
        if (full == slots.width || round.size() * static_cast<size_t>(size() - 1) >= kGroupCalls) flush();
        const int64_t count = std::min(share.count - done, slots.width - full);
        round.push_back({share.offset + done, count, share.owner});
        full += alignedUp(count);
        done += count;
      }
    }
    if (!round.empty()) flush();
  }

  void sumRound(const Call& call, float* buffer, const std::vector<Share>& round, const Slots& slots) {
    int64_t place = 0;
    start(call, [&] {
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
    });
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

  std::shared_ptr<Communicator> control_;
  int gpu_;
  std::vector<int> gpus_;  // of all ranks
  Computation computation_;
  std::function<void()> given_;  // what calls wait for instead of all of it
  std::unique_ptr<cuda::Queue> queue_;
  cudaStream_t stream_ = nullptr;  // its stream, for what must not throw
  Comm comm_ = nullptr;            // null in a group of one, and after a failure
  std::mutex calling_;
  int64_t number_ = 0;                    // of the group, in this process
  int64_t launches_ = 0;                  // that all ranks make together
  LaunchOrder::Line* line_ = nullptr;     // of the GPU
  std::vector<int64_t> sent_, received_;  // messages to and from each rank
  int64_t groups_ = 0;
};

}  // namespace
}  // namespace nccl

std::unique_ptr<Communicator> overNccl(std::shared_ptr<Communicator> control, int gpu, Computation computation) {
  return std::make_unique<nccl::NcclCommunicator>(std::move(control), gpu, std::move(computation));
}

}  // namespace lockstep::comm
