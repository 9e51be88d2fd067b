#include "transfer/slices.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/range.h"

namespace lockstep::transfer {

namespace {

using comm::Element;

// 128 bytes are one step of 16 lanes of 64 bits.
using Lanes = uint64_t __attribute__((vector_size(32)));
constexpr int kVectors = 4, kRotation = 29, kShift = 7;
constexpr int64_t kStep = kVectors * sizeof(Lanes);

double secondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Each step is one-to-one in the state and in the data, so that no single change is lost: rotation, and h + (h << 7) =
// 129 h, which has an inverse.
class Sum {
 public:
  void add(const char* data, int64_t bytes) {
    Lanes state[kVectors];
    std::memcpy(state, state_, sizeof state);
    for (; bytes >= kStep; data += kStep, bytes -= kStep) {
      Lanes words[kVectors];
      std::memcpy(words, data, kStep);
      for (int v = 0; v < kVectors; ++v) state[v] = mix(state[v] ^ words[v]);
    }
    if (bytes > 0) {
      Lanes words[kVectors] = {};
      std::memcpy(words, data, static_cast<size_t>(bytes));
      for (int v = 0; v < kVectors; ++v) state[v] = mix(state[v] ^ words[v]);
    }
    std::memcpy(state_, state, sizeof state);
  }
  uint64_t value() const {
    uint64_t sum = 0;
    for (const Lanes& vector : state_) {
      for (int lane = 0; lane < 4; ++lane) {
        sum = (sum ^ vector[lane]) * 0x9e3779b97f4a7c15u;
        sum ^= sum >> 32;
      }
    }
    return sum;
  }

 private:
  static Lanes mix(Lanes h) {
    h = h << kRotation | h >> (64 - kRotation);
    return h + (h << kShift);
  }

  Lanes state_[kVectors] = {{1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10, 11, 12}, {13, 14, 15, 16}};
};

std::string hexadecimal(uint64_t sum) {
  std::string text(16, '0');
  for (size_t i = 16; i-- > 0; sum >>= 4) text[i] = "0123456789abcdef"[sum & 15];
  return text;
}

bool sameMove(const Slice& a, const Slice& b) {
  return a.tensor == b.tensor && a.sourceOffset == b.sourceOffset && a.destinationOffset == b.destinationOffset &&
         a.bytes == b.bytes && a.count == 1 && b.count == 1;
}

// b goes on where a ends, on both sides.
bool continues(const Slice& a, const Slice& b) {
  return a.count == 1 && b.count == 1 && a.sourceEnd() == b.sourceOffset && a.destinationEnd() == b.destinationOffset;
}

void copyRuns(Queue& queue, const char* from, int64_t fromStride, char* to, int64_t toStride, int64_t bytes,
              int64_t count) {
  queue.copyRows(to, static_cast<size_t>(toStride), from, static_cast<size_t>(fromStride), static_cast<size_t>(bytes),
                 count);
}

}  // namespace

uint64_t checksum(const char* data, int64_t bytes, int64_t count, int64_t stride) {
  Sum sum;
  for (int64_t i = 0; i < count; ++i) sum.add(data + i * stride, bytes);
  return sum.value();
}

Transfer::Transfer(std::shared_ptr<comm::Communicator> communicator, std::shared_ptr<Arena> source,
                   std::shared_ptr<Arena> destination, std::vector<Slice> slices, std::vector<int> ranks)
    : communicator_(std::move(communicator)),
      source_(std::move(source)),
      destination_(std::move(destination)),
      slices_(std::move(slices)),
      ranks_(std::move(ranks)) {
  if (communicator_ != nullptr) rank_ = communicator_->rank(), size_ = communicator_->size();
  validate();
  gathers_ = size_ > 1 && isGather();
  sent_ = sentBy(rank_);
  std::vector<std::vector<size_t>> sent;
  for (int r = 0; r < size_; ++r) {
    sent.push_back(sentBy(r));
    mostSent_ = std::max(mostSent_, sent.back().size());
  }
  std::vector<size_t> next(static_cast<size_t>(size_), 0);
  for (size_t i = 0; i < slices_.size(); ++i) {
    const Slice& slice = slices_[i];
    gatheredEnd_ = std::max(gatheredEnd_, slice.destinationEnd());
    if (slice.from == rank_) sourceEnd_ = std::max(sourceEnd_, slice.sourceEnd());
    if (slice.to == rank_) destinationEnd_ = std::max(destinationEnd_, slice.destinationEnd());
    if (slice.from == slice.to) continue;
    const auto from = static_cast<size_t>(slice.from);
    if (slice.to == rank_) {
      // Of an all-gather the k-th slice to this rank is the k-th that is sent; else places count all that is sent.
      const size_t place =
          gathers_ ? next[from]++
                   : static_cast<size_t>(std::find(sent[from].begin(), sent[from].end(), i) - sent[from].begin());
      incoming_.push_back({i, place});
    }
  }
}

void Transfer::validate() const {
  if (static_cast<int>(ranks_.size()) != size_)
    throw Error("TRANSFER_PLAN", "a transfer of " + std::to_string(size_) + " ranks names " +
                                     std::to_string(ranks_.size()) + "; expected one name for each");
  for (const Slice& s : slices_) {
    const bool inside = s.from >= 0 && s.from < size_ && s.to >= 0 && s.to < size_;
    if (inside && s.bytes > 0 && s.count > 0 && s.sourceOffset >= 0 && s.destinationOffset >= 0 &&
        s.sourceStride >= 0 && s.destinationStride >= 0)
      continue;
    throw Error("TRANSFER_PLAN", "a slice of tensor '" + s.tensor + "' from rank " + std::to_string(s.from) +
                                     " to rank " + std::to_string(s.to) + " of " + std::to_string(size_) +
                                     ": expected ranks of the group, and lengths and offsets that exist");
  }
}

std::vector<size_t> Transfer::between(int from, int to) const {
  std::vector<size_t> found;
  for (size_t i = 0; i < slices_.size(); ++i) {
    if (slices_[i].from == from && slices_[i].to == to) found.push_back(i);
  }
  return found;
}

// Every rank decides this alone, from the same list.
bool Transfer::isGather() const {
  const bool inPlace = source_ == destination_;
  for (int from = 0; from < size_; ++from) {
    const std::vector<size_t> model = between(from, from == 0 ? 1 : 0);
    for (int to = 0; to < size_; ++to) {
      const std::vector<size_t> list = between(from, to);
      if (from == to && inPlace) {
        const auto stays = [&](size_t i) { return slices_[i].sourceOffset == slices_[i].destinationOffset; };
        if (!list.empty() || !std::all_of(model.begin(), model.end(), stays)) return false;
        continue;
      }
      const auto same = [&](size_t a, size_t b) { return sameMove(slices_[a], slices_[b]); };
      if (list.size() != model.size() || !std::equal(list.begin(), list.end(), model.begin(), same)) return false;
    }
  }
  return true;
}

// What a rank sends, once each: an all-gather sends the same to all.
std::vector<size_t> Transfer::sentBy(int rank) const {
  if (size_ == 1) return {};
  if (gathers_) return between(rank, rank == 0 ? 1 : 0);
  std::vector<size_t> sent;
  for (size_t i = 0; i < slices_.size(); ++i) {
    if (slices_[i].from == rank && slices_[i].to != rank) sent.push_back(i);
  }
  return sent;
}

char* Transfer::source() const {
  return static_cast<char*>(source_->at(0, static_cast<size_t>(sourceEnd_), "what a transfer sends"));
}

char* Transfer::destination() const {
  return static_cast<char*>(destination_->at(0, static_cast<size_t>(destinationEnd_), "what a transfer brings"));
}

TransferResult Transfer::run(Queue& queue, bool check) {
  const Range range("transition");
  TransferResult result;
  sums_.clear();
  try {
    if (check && communicator_ != nullptr) {
      runChecked(queue, result);
    } else {
      move(queue, result);
    }
  } catch (const std::exception& error) {
    if (communicator_ != nullptr) communicator_->abort(error.what());
    throw;
  }
  return result;
}

std::vector<uint64_t> Transfer::sumsOfSent(Queue& queue) const {
  return sumsOf(queue, *source_, source(), sent_, true);
}

std::vector<uint64_t> Transfer::sumsOf(Queue& queue, Arena& arena, const char* base, const std::vector<size_t>& slices,
                                       bool source) const {
  queue.synchronize();
  Memory& memory = arena.memory();
  std::vector<uint64_t> sums(slices.size());
  queue.pool().forEach(static_cast<int64_t>(slices.size()), [&](int64_t i, int) {
    const Slice& s = slices_[slices[static_cast<size_t>(i)]];
    const char* data = base + (source ? s.sourceOffset : s.destinationOffset);
    const int64_t stride = source ? s.sourceStride : s.destinationStride;
    std::vector<char> copy;
    if (!memory.isHost()) {
      copy.resize(static_cast<size_t>((s.count - 1) * stride + s.bytes));
      memory.toHost(copy.data(), data, copy.size());
      data = copy.data();
    }
    sums[static_cast<size_t>(i)] = checksum(data, s.bytes, s.count, stride);
  });
  return sums;
}

void Transfer::runChecked(Queue& queue, TransferResult& result) {
  auto start = std::chrono::steady_clock::now();
  std::vector<uint64_t> own = sumsOfSent(queue), all(static_cast<size_t>(size_) * mostSent_);
  own.resize(mostSent_);
  communicator_->allGather(own.data(), all.data(), static_cast<int64_t>(mostSent_ * sizeof(uint64_t)), Element::kByte,
                           "checksums");
  result.checkSeconds = secondsSince(start);
  move(queue, result);
  start = std::chrono::steady_clock::now();
  std::vector<size_t> received;
  for (const Incoming& in : incoming_) received.push_back(in.slice);
  const std::vector<uint64_t> arrived = sumsOf(queue, *destination_, destination(), received, false);
  for (size_t i = 0; i < incoming_.size(); ++i) {
    const Slice& s = slices_[incoming_[i].slice];
    const uint64_t sent = all[static_cast<size_t>(s.from) * mostSent_ + incoming_[i].place];
    if (arrived[i] == sent) continue;
    throw Error("WEIGHTS_DIFFER", "rank " + std::to_string(ranks_[static_cast<size_t>(rank_)]) + ": tensor '" +
                                      s.tensor + "' of rank " + std::to_string(ranks_[static_cast<size_t>(s.from)]) +
                                      " arrived changed: expected checksum " + hexadecimal(sent) + ", received " +
                                      hexadecimal(arrived[i]) + "; run again, and check the memory of the machine");
  }
  own.resize(sent_.size());
  sums_ = std::move(own);
  result.checkSeconds += secondsSince(start);
}

void Transfer::verify(Queue& queue) const {
  if (sums_.empty()) return;
  const std::vector<uint64_t> now = sumsOfSent(queue);
  for (size_t i = 0; i < now.size(); ++i) {
    if (now[i] == sums_[i]) continue;
    throw Error("WEIGHTS_CHANGED", "rank " + std::to_string(ranks_[static_cast<size_t>(rank_)]) + ": tensor '" +
                                       slices_[sent_[i]].tensor +
                                       "' changed while the model was in its generation layout: expected checksum " +
                                       hexadecimal(sums_[i]) + ", received " + hexadecimal(now[i]) +
                                       "; update weights only after the way back");
  }
}

void Transfer::move(Queue& queue, TransferResult& result) {
  const auto start = std::chrono::steady_clock::now();
  const comm::Traffic before = communicator_ == nullptr ? comm::Traffic{} : communicator_->traffic();
  if (gathers_) {
    gather();
  } else {
    copyLocal(queue);
    if (communicator_ != nullptr) exchange(queue);
  }
  queue.synchronize();
  if (communicator_ != nullptr) {
    const comm::Traffic after = communicator_->traffic();
    result.receivedBytes = after.receivedBytes - before.receivedBytes;
    result.sentBytes = after.sentBytes - before.sentBytes;
  }
  result.moveSeconds = secondsSince(start);
}

void Transfer::gather() {
  const char* const from = source();
  std::vector<comm::Piece> pieces;
  for (size_t i = 0; i < sent_.size(); ++i) {
    const Slice& slice = slices_[sent_[i]];
    if (i > 0 && continues(slices_[sent_[i - 1]], slice)) {
      pieces.back().bytes += slice.bytes;
    } else {
      pieces.push_back({from + slice.sourceOffset, slice.destinationOffset, slice.bytes});
    }
  }
  communicator_->allGatherPieces(pieces, destination_->at(0, static_cast<size_t>(gatheredEnd_), "gathered weights"),
                                 gatheredEnd_, "weights");
}

void Transfer::copyLocal(Queue& queue) {
  for (const Slice& s : slices_) {
    if (s.from != rank_ || s.to != rank_) continue;
    copyRuns(queue, source() + s.sourceOffset, s.sourceStride, destination() + s.destinationOffset, s.destinationStride,
             s.bytes, s.count);
  }
}

// Slices of several runs are packed on one side and unpacked on the other.
void Transfer::exchange(Queue& queue) {
  const auto isPacked = [&](const Slice& s, int end) { return s.from != s.to && end == rank_ && s.count > 1; };
  const auto room = [](const Slice& s) { return (static_cast<size_t>(s.total()) + 255) / 256 * 256; };
  size_t sending = 0, receiving = 0;
  for (const Slice& s : slices_) {
    sending += isPacked(s, s.from) ? room(s) : 0;
    receiving += isPacked(s, s.to) ? room(s) : 0;
  }
  Arena sent("packed slices", sending, nullptr, sending > 0 ? source_->memory() : hostMemory());
  Arena received("packed slices", receiving, nullptr, receiving > 0 ? destination_->memory() : hostMemory());
  char *nextSent = sent.data(), *nextReceived = received.data();
  std::vector<comm::Outgoing> outgoing;
  std::vector<comm::Incoming> incoming;
  std::vector<std::pair<const Slice*, const char*>> unpack;
  for (const Slice& s : slices_) {
    if (s.from == s.to) continue;
    if (s.from == rank_) {
      const char* data = source() + s.sourceOffset;
      if (s.count > 1) {
        copyRuns(queue, data, s.sourceStride, nextSent, s.bytes, s.bytes, s.count);
        data = nextSent;
        nextSent += room(s);
      }
      outgoing.push_back({s.to, data, s.total(), Element::kByte});
    } else if (s.to == rank_) {
      char* data = destination() + s.destinationOffset;
      if (s.count > 1) {
        data = nextReceived;
        nextReceived += room(s);
        unpack.emplace_back(&s, data);
      }
      incoming.push_back({s.from, data, s.total(), Element::kByte});
    }
  }
  queue.synchronize();
  communicator_->exchange(outgoing, incoming, "slices");
  for (const auto& [s, data] : unpack) {
    copyRuns(queue, data, s->bytes, destination() + s->destinationOffset, s->destinationStride, s->bytes, s->count);
  }
  queue.synchronize();  // before `received` goes
}

}  // namespace lockstep::transfer
