#include "model/gradient_buckets.h"

#include <algorithm>
#include <string>
#include <utility>

namespace lockstep::model {

namespace {

constexpr int64_t kAlignment = 64;

int64_t bytesOf(const TensorSpec& t) {
  return kernels::roundUp(t.layout.elements * static_cast<int64_t>(sizeof(float)), kAlignment);
}

// A piece of a bucket and where the rank keeps it.
struct Keeping {
  const char* from;
  char* to;
  size_t bytes;
};

}  // namespace

GradientBuckets::GradientBuckets(const Spec& spec, const Parallel& parallel, Parameters& parameters, Queue& queue)
    : spec_(spec), parallel_(parallel), parameters_(parameters), queue_(queue), open_(spec.units.size()) {
  if (!spec.units.empty()) tickets_.resize(bucketOf(0) + 1);
}

void GradientBuckets::begin(const Workspace& buffers, bool last) {
  buffers_ = buffers;
  last_ = last;
}

void GradientBuckets::enter(size_t unit) {
  if (spec_.zero < 2) return;
  // The place of a bucket is that of the last but one.
  if (firstOfBucket(unit) && bucketOf(unit) >= 2) parallel_.background->wait(tickets_[bucketOf(unit) - 2]);
  put(unit);
}

// Accumulators of zeros; of a tied embedding the projection's with the last unit, the lookup's with the first.
void GradientBuckets::put(size_t unit) {
  const Unit& u = spec_.units[unit];
  const auto zeros = [&](const char* name, int64_t index, int64_t bytes) {
    void* memory = buffers_.take(name, index, bytes);
    queue_.fill(memory, 0, static_cast<size_t>(bytes));
    return static_cast<float*>(memory);
  };
  int64_t bytes = 0;
  for (const int64_t tensor : u.tensors) bytes += bytesOf(parameters_.spec(tensor));
  float* next = bytes == 0 ? nullptr : zeros("gradients", static_cast<int64_t>(unit), bytes);
  for (const int64_t tensor : u.tensors) {
    parameters_.putGradient(tensor, 0, next);
    next += bytesOf(parameters_.spec(tensor)) / static_cast<int64_t>(sizeof(float));
  }
  for (const int64_t tensor : u.weights) {
    const int64_t size = bytesOf(parameters_.spec(tensor));
    const bool own = std::find(u.tensors.begin(), u.tensors.end(), tensor) != u.tensors.end();
    if (!own && size > 0) parameters_.putGradient(tensor, 1, zeros("secondGradient", kAbsent, size));
  }
}

void GradientBuckets::leave(size_t unit) {
  if (last_) complete(unit);
}

void GradientBuckets::end() {
  if (spec_.zero >= 2) parallel_.background->drain();
}

void GradientBuckets::finish() {
  // From stage 2 on, what no backward has left is zero.
  while (open_ > 0 && spec_.zero < 2) complete(open_ - 1);
  if (parallel_.background != nullptr) parallel_.background->drain();
}

void GradientBuckets::clear() {
  open_ = spec_.units.size();
  if (parallel_.background != nullptr) parallel_.background->drain();
}

void GradientBuckets::complete(size_t unit) {
  open_ = unit;
  for (const int64_t tensor : spec_.units[unit].tensors) parameters_.joinAccumulators(queue_, tensor);
  if (parallel_.background != nullptr && lastOfBucket(unit)) reduce(unit);
}

// The bucket that begins with this unit: its accumulators follow each other in memory.
void GradientBuckets::reduce(size_t lowest) {
  std::vector<int64_t> tensors;
  for (size_t unit = lowest; unit < spec_.units.size() && bucketOf(unit) == bucketOf(lowest); ++unit) {
    const std::vector<int64_t>& own = spec_.units[unit].tensors;
    tensors.insert(tensors.end(), own.begin(), own.end());
  }
  const auto accumulator = [&](int64_t tensor) { return parameters_.gradient(parameters_.spec(tensor).name).data; };
  std::erase_if(tensors, [&](int64_t tensor) { return parameters_.spec(tensor).layout.elements == 0; });
  if (tensors.empty()) return;
  float* const base = accumulator(tensors.front());
  const int64_t count = accumulator(tensors.back()) - base + parameters_.spec(tensors.back()).layout.elements;
  std::vector<comm::Share> shares;
  std::vector<Keeping> keeping;
  for (const int64_t tensor : tensors) {
    const std::vector<int64_t>& pieces = parameters_.spec(tensor).pieces;
    float* const whole = accumulator(tensor);
    for (size_t rank = 0; rank + 1 < pieces.size(); ++rank) {
      shares.push_back({whole - base + pieces[rank], pieces[rank + 1] - pieces[rank], static_cast<int>(rank)});
    }
    if (spec_.zero < 2) continue;
    const int64_t begin = pieces[static_cast<size_t>(spec_.dataRank)];
    const int64_t end = pieces[static_cast<size_t>(spec_.dataRank) + 1];
    keeping.push_back({reinterpret_cast<const char*>(whole + begin),
                       reinterpret_cast<char*>(parameters_.heldGradient(tensor)),
                       static_cast<size_t>(end - begin) * sizeof(float)});
  }
  const size_t bucket = bucketOf(lowest);
  const std::string site = "gradients of bucket " + std::to_string(bucket);
  comm::Background& background = *parallel_.background;
  if (spec_.zero == 0) {
    tickets_[bucket] = background.submit([=](auto& group) { group.allReduce(base, base, count, site); });
  } else {
    tickets_[bucket] = background.submit([=, shares = std::move(shares), keeping = std::move(keeping),
                                          &memory = parameters_.gradients().memory()](auto& group) {
      group.reduceScatterPieces(base, count, shares, site);
      for (const Keeping& piece : keeping) memory.copy(piece.to, piece.from, piece.bytes);
    });
  }
  if (!spec_.overlap) background.wait(tickets_[bucket]);
}

}  // namespace lockstep::model
