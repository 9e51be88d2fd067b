#include "comm/communicator.h"

#include <algorithm>
#include <exception>
#include <utility>
#include <vector>

#include "core/range.h"
#include "core/work_clock.h"

namespace lockstep::comm {

namespace {

const char* nameOf(Operation operation) {
  switch (operation) {
    case Operation::kAllGather:
      return "all-gather";
    case Operation::kAllGatherPieces:
      return "all-gather of pieces";
    case Operation::kReduceScatter:
      return "reduce-scatter";
    case Operation::kReduceScatterPieces:
      return "reduce-scatter of pieces";
    case Operation::kAllReduce:
      return "all-reduce";
    case Operation::kBroadcast:
      return "broadcast";
    case Operation::kBarrier:
      return "barrier";
    case Operation::kSplit:
      return "split";
    case Operation::kSend:
      return "send";
    case Operation::kReceive:
      return "receive";
  }
  return "?";
}

const char* nameOf(Element element) {
  return element == Element::kByte ? "bytes" : element == Element::kBFloat16 ? "bfloat16" : "float32";
}

const char* prepositionOf(Operation operation) {
  return operation == Operation::kSend ? " to rank " : " from rank ";
}

// A call's life, for the clock of its rank and for profilers.
struct Communicating {
  Communicating(const char* operation, std::string_view site)
      : range(std::string(operation) + " " + std::string(site)) {}
  explicit Communicating(const Call& call) : Communicating(nameOf(call.operation), call.site) {}
  const WorkClock::Span span{&WorkTimes::communicating};
  const Range range;
};

}  // namespace

std::string describe(const Call& call) {
  std::string text = std::string(nameOf(call.operation)) + " " + std::to_string(call.sequence);
  if (call.operation != Operation::kBarrier && call.operation != Operation::kSplit) {
    text += " of " + std::to_string(call.count) + " " + nameOf(call.element);
  }
  if (call.root >= 0) text += prepositionOf(call.operation) + std::to_string(call.root);
  return text + " at '" + std::string(call.site) + "'";
}

Communicator::Communicator(int rank, int size, std::string name) : rank_(rank), size_(size), name_(std::move(name)) {}

Traffic Communicator::traffic() const {
  return {receivedBytes_.load(std::memory_order_relaxed), sentBytes_.load(std::memory_order_relaxed)};
}

void Communicator::refuse(const Call& call, const std::string& message) {
  fail("COLLECTIVE_ARGUMENT", call, message);
  std::terminate();
}

Call Communicator::next(Operation operation, Element element, int64_t count, int root, std::string_view site) {
  const Call call{operation, element, count, root, sequence_++, site};
  if (count < 0) refuse(call, "the count is negative");
  return call;
}

void Communicator::checkPeer(const Call& call) {
  if (call.root < 0 || call.root >= size_) {
    refuse(call, "expected a rank of 0.." + std::to_string(size_ - 1) + ", got " + std::to_string(call.root));
  }
}

void Communicator::checkApart(const Call& call, const void* a, int64_t aBytes, const void* b, int64_t bBytes) {
  const auto first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
  if (aBytes > 0 && bBytes > 0 && first < second + static_cast<uintptr_t>(bBytes) &&
      second < first + static_cast<uintptr_t>(aBytes)) {
    refuse(call, "its buffers overlap other than in place");
  }
}

void Communicator::allGather(const void* send, void* receive, int64_t count, Element element, std::string_view site) {
  const Call call = next(Operation::kAllGather, element, count, -1, site);
  const int64_t bytes = count * bytesOf(element);
  if (send != static_cast<char*>(receive) + rank_ * bytes) checkApart(call, send, bytes, receive, size_ * bytes);
  const Communicating communicating(call);
  runAllGather(call, send, receive);
}

void Communicator::allGatherPieces(std::span<const Piece> pieces, void* receive, int64_t receiveBytes,
                                   std::string_view site) {
  const Call call = next(Operation::kAllGatherPieces, Element::kByte, receiveBytes, -1, site);
  for (const Piece& piece : pieces) {
    if (piece.bytes < 0 || piece.offset < 0 || piece.offset > receiveBytes - piece.bytes) {
      refuse(call, "a piece of " + std::to_string(piece.bytes) + " bytes at offset " + std::to_string(piece.offset) +
                       " lies outside of the " + std::to_string(receiveBytes) + " bytes");
    }
    if (piece.data != static_cast<char*>(receive) + piece.offset) {
      checkApart(call, piece.data, piece.bytes, receive, receiveBytes);
    }
  }
  const Communicating communicating(call);
  runAllGatherPieces(call, pieces, receive);
}

void Communicator::reduceScatter(const float* send, float* receive, int64_t count, std::string_view site) {
  const Call call = next(Operation::kReduceScatter, Element::kFloat32, count, -1, site);
  if (receive != send + rank_ * count) checkApart(call, send, size_ * count * 4, receive, count * 4);
  const Communicating communicating(call);
  runReduceScatter(call, send, receive);
}

void Communicator::checkShares(const Call& call, std::span<const Share> shares) {
  const auto text = [](const Share& share) {
    return "share of " + std::to_string(share.count) + " elements at offset " + std::to_string(share.offset) +
           " for rank " + std::to_string(share.owner);
  };
  std::vector<Share> inOrder;
  for (const Share& share : shares) {
    if (share.count < 0 || share.offset < 0 || share.offset > call.count - share.count) {
      refuse(call, "the " + text(share) + " lies outside of the " + std::to_string(call.count) + " elements");
    }
    if (share.owner < 0 || share.owner >= size_) {
      refuse(call, "the " + text(share) + ": expected a rank of 0.." + std::to_string(size_ - 1));
    }
    if (share.count > 0) inOrder.push_back(share);
  }
  std::sort(inOrder.begin(), inOrder.end(), [](const Share& a, const Share& b) { return a.offset < b.offset; });
  for (size_t i = 1; i < inOrder.size(); ++i) {
    const Share &a = inOrder[i - 1], &b = inOrder[i];
    if (b.offset < a.offset + a.count) refuse(call, "the " + text(a) + " and the " + text(b) + " overlap");
  }
}

void Communicator::reduceScatterPieces(float* buffer, int64_t count, std::span<const Share> shares,
                                       std::string_view site) {
  const Call call = next(Operation::kReduceScatterPieces, Element::kFloat32, count, -1, site);
  checkShares(call, shares);
  const Communicating communicating(call);
  runReduceScatterPieces(call, buffer, shares);
}

void Communicator::allReduce(const float* send, float* receive, int64_t count, std::string_view site) {
  const Call call = next(Operation::kAllReduce, Element::kFloat32, count, -1, site);
  if (send != receive) checkApart(call, send, count * 4, receive, count * 4);
  const Communicating communicating(call);
  runAllReduce(call, send, receive);
}

void Communicator::broadcast(void* data, int64_t count, Element element, int root, std::string_view site) {
  const Call call = next(Operation::kBroadcast, element, count, root, site);
  checkPeer(call);
  const Communicating communicating(call);
  runBroadcast(call, data);
}

void Communicator::barrier(std::string_view site) {
  const Call call = next(Operation::kBarrier, Element::kByte, 0, -1, site);
  const Communicating communicating(call);
  runBarrier(call);
}

std::unique_ptr<Communicator> Communicator::split(int colour, int key, std::string_view site) {
  const Call call = next(Operation::kSplit, Element::kByte, 0, -1, site);
  const Communicating communicating(call);
  return runSplit(call, colour, key);
}

void Communicator::send(const void* data, int64_t count, Element element, int to, std::string_view site) {
  const Outgoing message{to, data, count, element};
  exchange({&message, 1}, {}, site);
}

void Communicator::receive(void* data, int64_t count, Element element, int from, std::string_view site) {
  const Incoming message{from, data, count, element};
  exchange({}, {&message, 1}, site);
}

void Communicator::exchange(std::span<const Outgoing> outgoing, std::span<const Incoming> incoming,
                            std::string_view site) {
  int64_t toItself = 0;
  for (const Outgoing& message : outgoing) {
    const Call call{Operation::kSend, message.element, message.count, message.to, 0, site};
    checkPeer(call);
    if (message.count < 0) refuse(call, "the count is negative");
    toItself += message.to == rank_ ? 1 : 0;
  }
  for (const Incoming& message : incoming) {
    const Call call{Operation::kReceive, message.element, message.count, message.from, 0, site};
    checkPeer(call);
    if (message.count < 0) refuse(call, "the count is negative");
    toItself -= message.from == rank_ ? 1 : 0;
  }
  if (toItself != 0) {
    refuse({Operation::kSend, Element::kByte, 0, rank_, 0, site}, "a rank must receive what it sends to itself");
  }
  const Communicating communicating("exchange", site);
  runExchange(outgoing, incoming, site, nullptr);
}

}  // namespace lockstep::comm
