#include "communicator_on_gpus.h"

#include <cuda_runtime.h>

#include <cstdlib>
#include <exception>
#include <utility>
#include <vector>

#include "comm/inside.h"
#include "comm/nccl/nccl.h"
#include "cuda/queue.h"

namespace lockstep::contracts {
namespace {

using comm::bytesOf;
using comm::Call;
using comm::Communicator;
using comm::Incoming;
using comm::Inside;
using comm::Matches;
using comm::Outgoing;
using comm::Piece;
using comm::Share;

constexpr int64_t kMostBytes = int64_t{1} << 30;  // of a buffer on a GPU; a larger one is sparse

// Device memory that stands for a buffer of the host, as well aligned. Copies in are not waited for: the communicator
// has to.
class Mirror {
 public:
  Mirror(cuda::Queue& queue, const void* host, int64_t bytes)
      : queue_(queue), bytes_(static_cast<size_t>(bytes)), shift_(reinterpret_cast<uintptr_t>(host) % 16) {
    if (bytes > 0) cuda::check(cudaMalloc(&memory_, shift_ + bytes_), "a buffer");
    if (bytes > 0) cuda::check(cudaMemcpyAsync(at(), host, bytes_, cudaMemcpyHostToDevice, queue.stream()), "a copy");
  }
  ~Mirror() {
    cudaStreamSynchronize(queue_.stream());
    cudaFree(memory_);
  }
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;

  char* at() const { return bytes_ == 0 ? nullptr : static_cast<char*>(memory_) + shift_; }
  void back(void* host) const {
    if (bytes_ > 0) queue_.toHost(host, at(), bytes_);
  }

 private:
  cuda::Queue& queue_;
  size_t bytes_, shift_;
  void* memory_ = nullptr;
};

float* floats(char* at) {
  return reinterpret_cast<float*>(at);
}

class OnGpus final : public Communicator {
 public:
  OnGpus(std::unique_ptr<Communicator> inner, std::shared_ptr<cuda::Queue> queue)
      : Communicator(inner->rank(), inner->size(), inner->name()), queue_(std::move(queue)), inner_(std::move(inner)) {}

  void progress() override { inner_->progress(); }
  void abort(const std::string& reason) override { inner_->abort(reason); }

 protected:
  [[noreturn]] void fail(const std::string& code, const Call& call, const std::string& message) override {
    (inner_.get()->*(&Inside::fail))(code, call, message);
    std::terminate();
  }

  void runAllGather(const Call& call, const void* send, void* receive) override {
    if (staysOnHost(call)) return run(&Inside::runAllGather, call, send, receive);
    const int64_t bytes = call.count * bytesOf(call.element);
    const Mirror all(*queue_, receive, size() * bytes);
    const bool inPlace = send == static_cast<char*>(receive) + rank() * bytes;
    const Mirror own(*queue_, send, inPlace ? 0 : bytes);
    run(&Inside::runAllGather, call, inPlace ? all.at() + rank() * bytes : own.at(), all.at());
    all.back(receive);
  }

  void runAllGatherPieces(const Call& call, std::span<const Piece> pieces, void* receive) override {
    if (staysOnHost(call)) return run(&Inside::runAllGatherPieces, call, pieces, receive);
    const Mirror all(*queue_, receive, call.count);
    std::vector<std::unique_ptr<Mirror>> mirrors;
    std::vector<Piece> moved(pieces.begin(), pieces.end());
    for (Piece& piece : moved) {
      if (piece.data == static_cast<char*>(receive) + piece.offset) {
        piece.data = all.at() + piece.offset;
      } else {
        mirrors.push_back(std::make_unique<Mirror>(*queue_, piece.data, piece.bytes));
        piece.data = mirrors.back()->at();
      }
    }
    run(&Inside::runAllGatherPieces, call, std::span<const Piece>(moved), all.at());
    all.back(receive);
  }

  void runReduceScatter(const Call& call, const float* send, float* receive) override {
    if (staysOnHost(call)) return run(&Inside::runReduceScatter, call, send, receive);
    const Mirror all(*queue_, send, size() * call.count * 4);
    const bool inPlace = receive == send + rank() * call.count;
    const Mirror own(*queue_, receive, inPlace ? 0 : call.count * 4);
    char* const to = inPlace ? all.at() + rank() * call.count * 4 : own.at();
    run(&Inside::runReduceScatter, call, floats(all.at()), floats(to));
    if (call.count > 0) queue_->toHost(receive, to, static_cast<size_t>(call.count) * 4);
  }

  void runReduceScatterPieces(const Call& call, float* buffer, std::span<const Share> shares) override {
    if (staysOnHost(call)) return run(&Inside::runReduceScatterPieces, call, buffer, shares);
    const Mirror all(*queue_, buffer, call.count * 4);
    run(&Inside::runReduceScatterPieces, call, floats(all.at()), shares);
    all.back(buffer);
  }

  void runAllReduce(const Call& call, const float* send, float* receive) override {
    if (staysOnHost(call)) return run(&Inside::runAllReduce, call, send, receive);
    const Mirror to(*queue_, receive, call.count * 4), from(*queue_, send, send == receive ? 0 : call.count * 4);
    run(&Inside::runAllReduce, call, floats(send == receive ? to.at() : from.at()), floats(to.at()));
    to.back(receive);
  }

  void runBroadcast(const Call& call, void* data) override {
    if (staysOnHost(call)) return run(&Inside::runBroadcast, call, data);
    const Mirror mirror(*queue_, data, call.count * bytesOf(call.element));
    run(&Inside::runBroadcast, call, mirror.at());
    mirror.back(data);
  }

  void runBarrier(const Call& call) override { run(&Inside::runBarrier, call); }

  std::unique_ptr<Communicator> runSplit(const Call& call, int colour, int key) override {
    std::unique_ptr<Communicator> part = (inner_.get()->*(&Inside::runSplit))(call, colour, key);
    return part == nullptr ? nullptr : std::make_unique<OnGpus>(std::move(part), queue_);
  }

  void live(const Call& call) override { (inner_.get()->*(&Inside::live))(call); }

  void runExchange(std::span<const Outgoing> outgoing, std::span<const Incoming> incoming, std::string_view site,
                   Matches* matches) override {
    std::vector<std::unique_ptr<Mirror>> mirrors;
    const auto moved = [&](auto& message) {
      if (message.count % 4 == 3) return;  // stays on the host, at both ends
      mirrors.push_back(std::make_unique<Mirror>(*queue_, message.data, message.count * bytesOf(message.element)));
      message.data = mirrors.back()->at();
    };
    std::vector<Outgoing> sent(outgoing.begin(), outgoing.end());
    std::vector<Incoming> received(incoming.begin(), incoming.end());
    for (Outgoing& message : sent) moved(message);
    for (Incoming& message : received) moved(message);
    run(&Inside::runExchange, std::span<const Outgoing>(sent), std::span<const Incoming>(received), site, matches);
    for (size_t i = 0; i < received.size(); ++i) {
      const Incoming& message = received[i];
      const auto bytes = static_cast<size_t>(message.count * bytesOf(message.element));
      if (message.data != incoming[i].data && bytes > 0) queue_->toHost(incoming[i].data, message.data, bytes);
    }
  }

 private:
  static bool staysOnHost(const Call& call) {
    return call.sequence % 4 == 3 || call.count * bytesOf(call.element) > kMostBytes;
  }

  template <class... P, class... A>
  void run(void (Communicator::*call)(P...), A&&... arguments) {
    const comm::Traffic before = inner_->traffic();
    (inner_.get()->*call)(std::forward<A>(arguments)...);
    const comm::Traffic after = inner_->traffic();
    countReceived(after.receivedBytes - before.receivedBytes);
    countSent(after.sentBytes - before.sentBytes);
  }

  std::shared_ptr<cuda::Queue> queue_;
  std::unique_ptr<Communicator> inner_;
};

}  // namespace

std::unique_ptr<Communicator> onGpus(std::unique_ptr<Communicator> control) {
  const int gpu = control->rank();
  auto queue = std::make_shared<cuda::Queue>(gpu, 1, 0);
  auto inner = comm::overNccl(std::move(control), gpu, {[queue] { queue->synchronize(); }});
  return std::make_unique<OnGpus>(std::move(inner), std::move(queue));
}

}  // namespace lockstep::contracts
