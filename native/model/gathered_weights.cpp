#include "model/gathered_weights.h"

#include <string>
#include <utility>

namespace lockstep::model {

namespace {

constexpr int64_t kAlignment = 64;

}  // namespace

GatheredWeights::GatheredWeights(const Spec& spec, const Parallel& parallel, Parameters& parameters)
    : spec_(spec), parallel_(parallel), parameters_(parameters), tickets_(spec.units.size()) {}

void GatheredWeights::walkForward(const Workspace& buffers) {
  if (spec_.zero < 3) return;
  buffers_ = buffers;
  step_ = 1;
  tickets_.assign(tickets_.size(), 0);
}

void GatheredWeights::walkBackward() {
  if (spec_.zero >= 3) step_ = -1;
}

void GatheredWeights::enter(size_t unit) {
  if (step_ == 0) return;
  gather(unit);
  if (tickets_[unit] != 0) parallel_.background->wait(tickets_[unit]);
  put(unit);
  const size_t next = unit + static_cast<size_t>(step_);
  if (spec_.overlap && next > 0 && next < tickets_.size()) gather(next);
}

void GatheredWeights::gatherAll(const Workspace& buffers) {
  if (spec_.zero < 3) return;
  buffers_ = buffers;
  step_ = 0;
  tickets_.assign(tickets_.size(), 0);
  for (size_t unit = 0; unit < tickets_.size(); ++unit) {
    gather(unit);
    put(unit);
  }
  parallel_.background->drain();
}

// Neighbours lie at the two ends of the buffers, so that units with an even (odd) number are in each other's place.
void GatheredWeights::gather(size_t unit) {
  if (tickets_[unit] != 0) return;
  for (size_t other = unit % 2; other < tickets_.size(); other += 2) tickets_[other] = 0;
  std::vector<comm::Piece> pieces;
  int64_t bytes = 0;
  for (const int64_t tensor : tensorsOf(unit)) {
    const Parameters::HeldWeights held = parameters_.heldWeights(tensor);
    pieces.push_back({held.data, bytes + held.begin, held.count});
    bytes += kernels::roundUp(held.whole, kAlignment);
  }
  if (bytes == 0) return;
  void* whole = buffers_.take("weights", static_cast<int64_t>(unit), bytes);
  tickets_[unit] = parallel_.background->submit([pieces = std::move(pieces), whole, bytes, unit](auto& group) {
    group.allGatherPieces(pieces, whole, bytes, "weights of unit " + std::to_string(unit));
  });
}

void GatheredWeights::put(size_t unit) {
  if (tickets_[unit] == 0) return;
  auto* whole = static_cast<char*>(buffers_.take("weights", static_cast<int64_t>(unit), 0));
  for (const int64_t tensor : tensorsOf(unit)) {
    parameters_.putWeights(tensor, whole);
    whole += kernels::roundUp(parameters_.heldWeights(tensor).whole, kAlignment);
  }
}

// All at once, a tied embedding serves both ends.
const std::vector<int64_t>& GatheredWeights::tensorsOf(size_t unit) const {
  return step_ == 0 ? spec_.units[unit].tensors : spec_.units[unit].weights;
}

}  // namespace lockstep::model
