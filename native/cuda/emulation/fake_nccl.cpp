#include "cuda/emulation/fake_nccl.h"

#include <cuda_runtime.h>

#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace lockstep::comm::nccl {

struct World;
struct Job;

// What ranks connect before they start anything: to send to a peer, to receive from it.
constexpr int kToPeer = 1, kFromPeer = 2;

// One rank's end. What streams have queued keeps it.
struct ncclComm {
  std::shared_ptr<World> world;
  int rank = 0, device = 0;
  uint64_t collectives = 0, groups = 0;  // called so far
  bool aborted = false, joins = true;    // joins: the other ranks have not come yet
  std::map<int, int> connected = {};     // by peer
  // A group that is on its way to its streams, and what it connects.
  std::map<cudaStream_t, std::shared_ptr<Job>> starting = {};
  std::map<int, int> connecting = {};
};

namespace {

struct Call {
  enum Kind { kGather, kBroadcast, kSend, kReceive } kind;
  const void* from = nullptr;
  void* to = nullptr;
  size_t bytes = 0;
  int peer = -1;  // a broadcast's root, a message's other end
};

struct Message {
  const void* from;
  size_t bytes;
  bool taken = false;
};

struct Collective {
  std::vector<const void*> from;
  Call first{};
  size_t arrived = 0, finished = 0;
};

// A call on its way.
struct Part {
  Call call;
  uint64_t number = 0;  // of a collective
  std::shared_ptr<Message> message;
  bool copied = false, done = false;
};

void copy(void* to, const void* from, size_t bytes) {
  const emulated::DeviceAccess access;
  if (to != from) std::memcpy(to, from, bytes);
}

}  // namespace

// Guarded by emulated::machine.mutex, which whatever a stream runs holds.
struct World {
  explicit World(int ranks) : size(static_cast<size_t>(ranks)) {}

  size_t size;
  std::vector<int> devices;
  bool broken = false, differ = false, truncated = false, stuck = false;
  std::map<std::pair<int, int>, int> asked;  // by rank and peer: what it last wanted to connect
  std::map<uint64_t, Collective> collectives;
  std::map<std::pair<int, int>, std::deque<std::shared_ptr<Message>>> channels;  // by sender and receiver

  void begin(int rank, Part& part) {
    const Call& call = part.call;
    if (call.kind == Call::kSend) {
      part.message = std::make_shared<Message>(Message{call.from, call.bytes});
      channels[{rank, call.peer}].push_back(part.message);
    }
    if (call.kind == Call::kSend || call.kind == Call::kReceive) return;
    Collective& collective = collectives[part.number];
    if (collective.arrived++ == 0) {
      collective.first = call;
      collective.from.resize(size);
    }
    const Call& first = collective.first;
    differ = differ || first.kind != call.kind || first.bytes != call.bytes || first.peer != call.peer;
    collective.from[static_cast<size_t>(rank)] = call.from;
  }

  void advance(int rank, Part& part) {
    const Call& call = part.call;
    if (call.kind == Call::kSend) {
      part.done = part.message->taken;
    } else if (call.kind == Call::kReceive) {
      auto& channel = channels[{call.peer, rank}];
      if (channel.empty()) return;
      differ = differ || channel.front()->bytes != call.bytes;
      if (differ) return;
      copy(call.to, channel.front()->from, call.bytes);
      channel.front()->taken = part.done = true;
      channel.pop_front();
    } else {
      Collective& collective = collectives[part.number];
      if (collective.arrived == size && !part.copied) {
        for (size_t r = 0; call.kind == Call::kGather && r < size; ++r)
          copy(static_cast<char*>(call.to) + r * call.bytes, collective.from[r], call.bytes);
        if (call.kind == Call::kBroadcast) copy(call.to, collective.from[static_cast<size_t>(call.peer)], call.bytes);
        part.copied = true;
        ++collective.finished;
      }
      part.done = collective.finished == size;
    }
  }
};

// By GPU: what was started there and is not done, in that order.
std::map<int, std::deque<Job*>> lines;
constexpr auto kPatience = std::chrono::seconds(10);

// What one group has queued on one stream. A GPU has room for one at a time: of two communicators that start in
// different orders on two GPUs, each waits for the other.
struct Job {
  std::shared_ptr<ncclComm> comm;
  bool first;  // of its communicator
  std::vector<Part> parts = {};
  bool begun = false;
  std::chrono::steady_clock::time_point at = {};

  void enqueue() {
    lines[comm->device].push_back(this);
    at = std::chrono::steady_clock::now();
  }
  ~Job() { std::erase(lines[comm->device], this); }

  bool step() {
    const bool done = advance();
    if (done) std::erase(lines[comm->device], this);
    return done;
  }

  bool advance() {
    World& world = *comm->world;
    if (comm->aborted) return true;
    if (std::chrono::steady_clock::now() - at > kPatience) world.stuck = true;
    if (lines[comm->device].front() != this) return false;
    if (world.broken || world.differ || (!first && emulated::fault("nccl-later"))) return false;
    for (Part& part : parts) {
      if (!begun) world.begin(comm->rank, part);
    }
    begun = true;
    bool done = true;
    for (Part& part : parts) {
      if (!part.done && !world.differ) world.advance(comm->rank, part);
      done = done && part.done;
    }
    return done;
  }
};

namespace {

struct Queued {
  Comm comm;
  cudaStream_t stream;
  Call call;
};
thread_local std::vector<Queued> group;
thread_local int depth = 0;

std::map<uint64_t, std::shared_ptr<World>> worlds;  // that not all ranks have joined
std::map<Comm, std::shared_ptr<ncclComm>> comms;

// Whether this is the rank that a fault is injected into, which has started as many groups.
bool fails(Comm comm, const char* fault, uint64_t groups) {
  return comm->rank == 1 && comm->groups >= groups && emulated::fault(fault);
}

// What NCCL's threads do beside the rank; here when the rank asks how they are. A group starts when all that it
// connects is wanted by the peers as well.
void advance(ncclComm& comm) {
  World& world = *comm.world;
  comm.joins = comm.joins && world.devices.size() < world.size;
  if (comm.joins || comm.starting.empty()) return;
  for (const auto& [peer, sides] : comm.connecting) {
    const int wanted = (sides & kToPeer ? kFromPeer : 0) | (sides & kFromPeer ? kToPeer : 0);
    const int found = world.asked[{peer, comm.rank}];
    if ((found & wanted) != wanted) return;
    world.truncated = world.truncated || found != wanted;
  }
  if (world.truncated) return;
  for (const auto& [peer, sides] : std::exchange(comm.connecting, {})) comm.connected[peer] |= sides;
  for (const auto& [stream, job] : std::exchange(comm.starting, {})) {
    job->enqueue();
    emulated::enqueue_until(stream, [job] { return job->step(); });
  }
}

// A communicator takes no call while it is on its way to another.
Result stateOf(const ncclComm& comm) {
  if (comm.world->truncated || comm.world->stuck) return kInternalError;
  return comm.joins || !comm.starting.empty() ? kInProgress : kSuccess;
}

Result groupStart() {
  ++depth;
  return kSuccess;
}

Result groupEnd() {
  if (depth == 0) return kInvalidUsage;
  if (--depth > 0) return kSuccess;
  const std::lock_guard lock(emulated::machine.mutex);
  Result result = kSuccess;
  for (const Queued& queued : std::exchange(group, {})) {
    ncclComm& comm = *queued.comm;
    const Call& call = queued.call;
    auto& job = comm.starting[queued.stream];
    if (job == nullptr) job = std::make_shared<Job>(Job{comms.at(queued.comm), comm.groups++ == 0});
    const bool collective = call.kind == Call::kGather || call.kind == Call::kBroadcast;
    job->parts.push_back({call, collective ? comm.collectives++ : 0, nullptr});
    const int side = call.kind == Call::kSend ? kToPeer : call.kind == Call::kReceive ? kFromPeer : 0;
    if (side != 0 && (comm.connected[call.peer] & side) == 0) comm.connecting[call.peer] |= side;
    for (const auto& [peer, sides] : comm.connecting) comm.world->asked[{comm.rank, peer}] = sides;
    result = kInProgress;
  }
  return result;
}

Result queue(Comm comm, cudaStream_t stream, const Call& call) {
  if (fails(comm, "nccl-call", 1)) return kSystemError;
  {
    const std::lock_guard lock(emulated::machine.mutex);
    if (stateOf(*comm) != kSuccess) return kInvalidArgument;
  }
  const int size = static_cast<int>(comm->world->size);
  if (call.kind != Call::kGather && (call.peer < 0 || call.peer >= size)) return kInvalidArgument;
  groupStart();
  group.push_back({comm, stream, call});
  return groupEnd();
}

Result getUniqueId(UniqueId* id) {
  static uint64_t ids = 0;
  const std::lock_guard lock(emulated::machine.mutex);
  *id = {};
  ++ids;
  std::memcpy(id->bytes, &ids, sizeof ids);
  return kSuccess;
}

Result commInitRankConfig(Comm* comm, int ranks, UniqueId id, int rank, Config* config) {
  if (config->size != sizeof *config || config->magic != Config().magic || config->blocking != 0)
    return kInvalidArgument;
  if (rank == 1 && emulated::fault("nccl-init")) return kSystemError;
  uint64_t number = 0;
  std::memcpy(&number, id.bytes, sizeof number);
  const std::lock_guard lock(emulated::machine.mutex);
  auto& world = worlds[number];
  if (world == nullptr) world = std::make_shared<World>(ranks);
  if (static_cast<size_t>(ranks) != world->size || rank < 0 || rank >= ranks) return kInvalidArgument;
  for (const int device : world->devices) {
    if (device == emulated::device) return kInvalidUsage;  // one GPU, one rank
  }
  world->devices.push_back(emulated::device);
  auto made = std::make_shared<ncclComm>(ncclComm{world, rank, emulated::device});
  if (world->devices.size() == world->size) worlds.erase(number);
  *comm = made.get();
  comms[*comm] = std::move(made);
  return kInProgress;
}

Result commDestroy(Comm comm) {
  const std::lock_guard lock(emulated::machine.mutex);
  return comms.erase(comm) == 1 ? kSuccess : kInvalidArgument;
}

Result commAbort(Comm comm) {
  const std::lock_guard lock(emulated::machine.mutex);
  if (!comms.contains(comm)) return kInvalidArgument;
  comm->aborted = comm->world->broken = true;
  comm->starting.clear();
  return commDestroy(comm);
}

Result commGetAsyncError(Comm comm, Result* error) {
  const std::lock_guard lock(emulated::machine.mutex);
  advance(*comm);
  *error = fails(comm, "nccl-later", 2) ? kSystemError : comm->world->differ ? kInvalidUsage : stateOf(*comm);
  return kSuccess;
}

const char* getErrorString(Result result) {
  return result == kSystemError       ? "unhandled system error"
         : result == kInvalidUsage    ? "invalid usage"
         : result == kInternalError   ? "internal error"
         : result == kInvalidArgument ? "invalid argument"
         : result == kSuccess         ? "no error"
                                      : "unhandled cuda error";
}

}  // namespace

Library fakeLibrary() {
  Library made;
  if (emulated::fault("no-nccl")) {
    made.code = "NCCL_UNAVAILABLE";
    made.status.problem = "there is no NCCL here (injected); install it";
    return made;
  }
  made.status = {"emulated", "2.27.3", ""};
  made.api = {
      .getVersion = [](int* version) -> Result { return *version = 22703, kSuccess; },
      .getUniqueId = getUniqueId,
      .commInitRankConfig = commInitRankConfig,
      .commDestroy = commDestroy,
      .commAbort = commAbort,
      .commGetAsyncError = commGetAsyncError,
      .getErrorString = getErrorString,
      .allGather =
          [](const void* send, void* receive, size_t count, Type, Comm comm, cudaStream_t stream) {
            return queue(comm, stream, {Call::kGather, send, receive, count});
          },
      .broadcast =
          [](const void* send, void* receive, size_t count, Type, int root, Comm comm, cudaStream_t stream) {
            return queue(comm, stream, {Call::kBroadcast, send, receive, count, root});
          },
      .send =
          [](const void* data, size_t count, Type, int to, Comm comm, cudaStream_t stream) {
            return queue(comm, stream, {Call::kSend, data, nullptr, count, to});
          },
      .receive =
          [](void* data, size_t count, Type, int from, Comm comm, cudaStream_t stream) {
            return queue(comm, stream, {Call::kReceive, nullptr, data, count, from});
          },
      .groupStart = groupStart,
      .groupEnd = groupEnd,
  };
  return made;
}

}  // namespace lockstep::comm::nccl
