#include "model/parameters.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/error.h"

namespace lockstep::model {

using kernels::kPanel;
using kernels::Part;
using kernels::Split;

namespace {

size_t bytes(int64_t elements, DType dtype) {
  return static_cast<size_t>(elements) * bytesOf(dtype);
}

// Calls visit(index, column) for every element of row `row` of a packed matrix that lies in `part`: where it is in the
// given element order.
template <class Visit>
void eachElement(const Part& part, int64_t row, DType order, const Visit& visit) {
  const int64_t n = (row - part.outBegin) % kPanel, panel = (row - part.outBegin) / kPanel;
  const int64_t width = part.panelWidth(panel), base = part.panelOffset(panel);
  for (int64_t k = 0; k < part.in; ++k) {
    visit(order == DType::kFloat32 ? base + k * width + n : base + k / 2 * 2 * width + 2 * n + k % 2, part.inBegin + k);
  }
}

// Some stored elements where the host can touch them: in place, or as a copy that giveBack() writes.
class Reached {
 public:
  Reached(const Stored& from, int64_t begin, int64_t end)
      : begin_(std::clamp(begin, from.begin, from.end)), end_(std::clamp(end, begin_, from.end)), dtype_(from.dtype) {
    data_ = static_cast<char*>(from.data) + bytes(begin_ - from.begin, dtype_);
    if (from.memory->isHost()) return;
    memory_ = from.memory;
    device_ = data_;
    copy_.resize(bytes(end_ - begin_, dtype_));
    data_ = copy_.data();
    if (!copy_.empty()) memory_->toHost(data_, device_, copy_.size());
  }

  // Zero, and nothing is written, of elements that are not stored here.
  float read(int64_t i) const {
    if (i < begin_ || i >= end_) return 0.0f;
    if (dtype_ == DType::kFloat32) return reinterpret_cast<const float*>(data_)[i - begin_];
    return toFloat(reinterpret_cast<const BFloat16*>(data_)[i - begin_]);
  }
  void write(int64_t i, float value) {
    if (i < begin_ || i >= end_) return;
    if (dtype_ == DType::kFloat32) {
      reinterpret_cast<float*>(data_)[i - begin_] = value;
    } else {
      reinterpret_cast<BFloat16*>(data_)[i - begin_] = toBFloat16(value);
    }
  }
  void giveBack() const {
    if (memory_ != nullptr && !copy_.empty()) memory_->fromHost(device_, copy_.data(), copy_.size());
  }

 private:
  int64_t begin_, end_;
  DType dtype_;
  char* data_;
  Memory* memory_ = nullptr;
  char* device_ = nullptr;
  std::vector<char> copy_;
};

// Calls visit(reached, index, row, column) for every element of rows row .. row + count - 1 of a tensor, then
// done(reached), for each run of memory that has some of them.
template <class Visit, class Done>
void eachRun(const TensorSpec& t, const Stored& stored, int64_t row, int64_t count, const Visit& visit,
             const Done& done) {
  const int64_t in = t.layout.in;
  if (!t.matrix) {
    Reached reached(stored, row * in, (row + count) * in);
    for (int64_t r = row; r < row + count; ++r) {
      for (int64_t k = 0; k < in; ++k) visit(reached, r * in + k, r, k);
    }
    return done(reached);
  }
  for (const Part& part : t.layout.parts) {
    const int64_t first = std::max(row, part.outBegin), last = std::min(row + count, part.outBegin + part.out);
    if (first >= last) continue;
    const int64_t panel = (first - part.outBegin) / kPanel, lastPanel = (last - 1 - part.outBegin) / kPanel;
    const int64_t end = part.panelOffset(lastPanel) + part.panelWidth(lastPanel) * part.inPadded();
    Reached reached(stored, part.panelOffset(panel), end);
    for (int64_t r = first; r < last; ++r) {
      eachElement(part, r, stored.dtype, [&](int64_t i, int64_t k) { visit(reached, i, r, k); });
    }
    done(reached);
  }
}

// Elements begin .. end - 1 of a packed matrix as a layout of their own. Both lie between pairs of rows of a panel.
kernels::WeightLayout pieceLayout(const kernels::WeightLayout& layout, int64_t begin, int64_t end) {
  kernels::WeightLayout piece{0, 0, Split::kOut, {}, end - begin};
  for (const Part& part : layout.parts) {
    for (int64_t panel = 0; panel < part.panels(); ++panel) {
      const int64_t width = part.panelWidth(panel), first = part.panelOffset(panel);
      const int64_t from = std::max(begin, first), to = std::min(end, first + width * part.inPadded());
      if (from < to) piece.parts.push_back({0, width, 0, (to - from) / width, from - begin});
    }
  }
  return piece;
}

// The sum of addends by a balanced tree over neighbours.
double treeSum(std::vector<double> addends) {
  if (addends.empty()) return 0;
  for (size_t width = 1; width < addends.size(); width *= 2) {
    for (size_t i = 0; i + width < addends.size(); i += 2 * width) addends[i] += addends[i + width];
  }
  return addends[0];
}

// Every rank's doubles, [ranks][count].
std::vector<double> gatherDoubles(comm::Communicator& group, const std::vector<double>& own, const char* site) {
  std::vector<double> all(own.size() * static_cast<size_t>(group.size()));
  group.allGather(own.data(), all.data(), static_cast<int64_t>(own.size() * sizeof(double)), comm::Element::kByte,
                  site);
  return all;
}

}  // namespace

kernels::QkvLayout Shape::qkv(int64_t layer) const {
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(headWidth)));
  return {{heads, keyValueHeads, headWidth, windows[static_cast<size_t>(layer)], parts, scale}};
}

kernels::WeightLayout vectorLayout(int64_t out, int64_t in, const std::vector<int64_t>& sizes) {
  kernels::WeightLayout layout{out, in, Split::kOut, {}, 0};
  for (const int64_t size : sizes) {
    layout.parts.push_back({layout.elements / in, size, 0, in, layout.elements});
    layout.elements += size * in;
  }
  return layout;
}

Parameters::Parameters(const Spec& spec, const Parallel& parallel, const kernels::Kernels& kernels, Queue& queue,
                       Memory& memory, MemorySpace& space, std::shared_ptr<Arena> weights)
    : spec_(spec),
      parallel_(parallel),
      kernels_(kernels),
      queue_(queue),
      shared_(weights != nullptr
                  ? std::move(weights)
                  : std::make_shared<Arena>("weights", static_cast<size_t>(spec.weightsBytes), &space, memory)),
      weights_(*shared_),
      gradients_("gradients", static_cast<size_t>(spec.gradientBytes), &space, memory),
      optimizer_("optimizer", static_cast<size_t>(spec.optimizerBytes), &space, memory),
      wholeWeights_(spec.tensors.size()),
      wholeGradients_(spec.tensors.size()) {
  for (size_t i = 0; i < spec.tensors.size(); ++i) {
    const TensorSpec& t = spec.tensors[i];
    index_[t.name] = i;
    held_.push_back(held(t));
    const int64_t kept = held_.back().end - held_.back().begin;
    heldWeights(static_cast<int64_t>(i));
    for (const int64_t offset : {t.master, t.moment1, t.moment2}) {
      if (offset != kAbsent) floats(optimizer_, t, offset, kept);
    }
    for (const int64_t offset : {t.gradient, t.gradient2}) {
      if (offset != kAbsent) floats(gradients_, t, offset, spec.zero < 2 ? t.layout.elements : kept);
    }
  }
}

int64_t Parameters::find(const std::string& name) const {
  const auto found = index_.find(name);
  if (found == index_.end()) throw Error("MODEL_TENSOR_UNKNOWN", "the model has no tensor '" + name + "'");
  return static_cast<int64_t>(found->second);
}

const TensorSpec& Parameters::tensor(const std::string& name) const {
  return spec_.tensors[static_cast<size_t>(find(name))];
}

Parameters::Held Parameters::held(const TensorSpec& t) const {
  if (spec_.zero == 0 || spec_.dataRanks == 1) return {0, t.layout.elements, t.layout};
  const int64_t begin = t.pieces[static_cast<size_t>(spec_.dataRank)];
  const int64_t end = t.pieces[static_cast<size_t>(spec_.dataRank) + 1];
  return {begin, end, t.matrix ? pieceLayout(t.layout, begin, end) : kernels::WeightLayout{}};
}

float* Parameters::floats(Arena& arena, const TensorSpec& t, int64_t offset, int64_t count) const {
  return static_cast<float*>(arena.at(static_cast<size_t>(offset), bytes(count, DType::kFloat32), t.name.c_str()));
}

// The whole compute weights: bfloat16 of a matrix where that is the dtype.
void* Parameters::compute(const TensorSpec& t) const {
  if (spec_.zero < 3) {
    const DType dtype = t.matrix ? spec_.dtype : DType::kFloat32;
    return weights_.at(static_cast<size_t>(t.weights), bytes(t.layout.elements, dtype), t.name.c_str());
  }
  void* whole = wholeWeights_[static_cast<size_t>(find(t.name))];
  if (whole == nullptr && t.layout.elements > 0)
    throw Error("MEMORY_PLAN", "the weights of '" + t.name + "' are used before they are gathered");
  return whole;
}

Parameters::HeldWeights Parameters::heldWeights(int64_t tensor) const {
  const TensorSpec& t = spec(tensor);
  const Held& h = held_[static_cast<size_t>(tensor)];
  const auto size = static_cast<int64_t>(bytesOf(t.matrix ? spec_.dtype : DType::kFloat32));
  const int64_t begin = h.begin * size, count = (h.end - h.begin) * size, whole = t.layout.elements * size;
  const auto at = [&](int64_t bytes) {
    return static_cast<char*>(weights_.at(static_cast<size_t>(t.weights), static_cast<size_t>(bytes), t.name.c_str()));
  };
  return {spec_.zero < 3 ? at(whole) + begin : at(count), begin, count, whole};
}

kernels::Weight Parameters::weight(const std::string& name) const {
  const TensorSpec& t = tensor(name);
  return {&t.layout, compute(t), spec_.dtype};
}

const float* Parameters::vector(const std::string& name) const {
  return has(name) ? static_cast<const float*>(compute(tensor(name))) : nullptr;
}

kernels::WeightGradient Parameters::gradient(const std::string& name, int copy) const {
  const int64_t index = find(name);
  const TensorSpec& t = spec(index);
  if (spec_.zero >= 2) return {&t.layout, wholeGradients_[static_cast<size_t>(index)][static_cast<size_t>(copy)]};
  return {&t.layout, floats(gradients_, t, copy == 0 ? t.gradient : t.gradient2, t.layout.elements)};
}

float* Parameters::vectorGradient(const std::string& name) const {
  return has(name) ? gradient(name).data : nullptr;
}

void Parameters::joinAccumulators(Queue& queue, int64_t tensor) {
  const TensorSpec& t = spec(tensor);
  const bool two = spec_.zero < 2 ? t.gradient2 != kAbsent : wholeGradients_[static_cast<size_t>(tensor)][1] != nullptr;
  if (two) kernels_.accumulate(queue, t.layout.elements, gradient(t.name, 1).data, gradient(t.name).data);
}

Stored Parameters::stored(int64_t index, Space space) const {
  const TensorSpec& t = spec(index);
  const Held& h = held_[static_cast<size_t>(index)];
  const int64_t kept = h.end - h.begin;
  if (space == Space::kWeights) {
    if (t.master != kAbsent)
      return {floats(optimizer_, t, t.master, kept), DType::kFloat32, h.begin, h.end, &optimizer_.memory()};
    const DType dtype = t.matrix ? spec_.dtype : DType::kFloat32;
    if (spec_.zero < 3) return {compute(t), dtype, 0, t.layout.elements, &weights_.memory()};
    return {heldWeights(index).data, dtype, h.begin, h.end, &weights_.memory()};
  }
  const int64_t offset = space == Space::kMoment1 ? t.moment1 : space == Space::kMoment2 ? t.moment2 : t.gradient;
  if (offset == kAbsent)
    throw Error("MODEL_NOT_TRAINED", "tensor '" + t.name + "' has no such state: the model was loaded for inference");
  if (space == Space::kGradients && spec_.zero < 2)
    return {floats(gradients_, t, offset, t.layout.elements) + h.begin, DType::kFloat32, h.begin, h.end,
            &gradients_.memory()};
  Arena& arena = space == Space::kGradients ? gradients_ : optimizer_;
  return {floats(arena, t, offset, kept), DType::kFloat32, h.begin, h.end, &arena.memory()};
}

bool Parameters::saves(int64_t tensor, Space space) const {
  const bool whole =
      space == Space::kGradients || (space == Space::kWeights && spec(tensor).master == kAbsent && spec_.zero < 3);
  const bool pieces = spec_.zero > 0 && !whole;
  return pieces || spec_.dataRank == 0;
}

std::vector<Block> Parameters::blocks(const TensorSpec& t, const Stored& stored, int64_t row, int64_t count) {
  const int64_t in = t.layout.in;
  if (stored.end - stored.begin == t.layout.elements) return {{row, count, 0, in}};
  std::vector<Block> blocks;
  const auto add = [&](int64_t first, int64_t rows, int64_t column, int64_t columns) {
    if (rows > 0 && columns > 0) blocks.push_back({first, rows, column, columns});
  };
  if (!t.matrix) {
    for (int64_t r = row; r < row + count; ++r) {
      const int64_t begin = std::clamp(stored.begin - r * in, int64_t{0}, in);
      add(r, 1, begin, std::clamp(stored.end - r * in, int64_t{0}, in) - begin);
    }
    return blocks;
  }
  for (const Part& part : t.layout.parts) {
    for (int64_t panel = 0; panel < part.panels(); ++panel) {
      const int64_t width = part.panelWidth(panel), base = part.panelOffset(panel);
      const int64_t begin = std::clamp((stored.begin - base) / width, int64_t{0}, part.in);
      const int64_t end = std::clamp((stored.end - base) / width, int64_t{0}, part.in);
      const int64_t first = part.outBegin + panel * kPanel, last = std::min(first + kPanel, part.outBegin + part.out);
      const int64_t from = std::max(row, first);
      add(from, std::min(row + count, last) - from, part.inBegin + begin, end - begin);
    }
  }
  return blocks;
}

void Parameters::writeRows(int64_t index, Space space, int64_t row, int64_t count, const float* data) {
  const TensorSpec& t = spec(index);
  if (space == Space::kGradients) touchGradients();
  settle();
  eachRun(
      t, stored(index, space), row, count,
      [&](Reached& to, int64_t i, int64_t r, int64_t k) { to.write(i, data[(r - row) * t.layout.in + k]); },
      [](const Reached& to) { to.giveBack(); });
}

void Parameters::readRows(int64_t index, Space space, int64_t row, int64_t count, float* data) const {
  const TensorSpec& t = spec(index);
  settle();
  unpack(t, stored(index, space), row, count, data);
  if (space != Space::kGradients || t.gradient2 == kAbsent) return;
  const Stored second{floats(gradients_, t, t.gradient2, t.layout.elements), DType::kFloat32, 0, t.layout.elements,
                      &gradients_.memory()};
  eachRun(
      t, second, row, count,
      [&](Reached& from, int64_t i, int64_t r, int64_t k) { data[(r - row) * t.layout.in + k] += from.read(i); },
      [](const Reached&) {});
}

void Parameters::unpack(const TensorSpec& t, const Stored& stored, int64_t row, int64_t count, float* data) {
  eachRun(
      t, stored, row, count,
      [&](Reached& from, int64_t i, int64_t r, int64_t k) { data[(r - row) * t.layout.in + k] = from.read(i); },
      [](const Reached&) {});
}

void Parameters::publish(Queue& queue) {
  for (size_t i = 0; i < spec_.tensors.size(); ++i) {
    const TensorSpec& t = spec_.tensors[i];
    if (!t.matrix || t.master == kAbsent) continue;
    const Stored master = stored(static_cast<int64_t>(i), Space::kWeights);
    kernels_.publish(queue, held_[i].layout, static_cast<const float*>(master.data),
                     heldWeights(static_cast<int64_t>(i)).data);
  }
  gatherWeights();
}

// In stages 1 and 2 every rank has renewed its pieces of the compute weights.
void Parameters::gatherWeights() {
  if (spec_.zero == 0 || spec_.zero >= 3) return;
  auto* base = static_cast<char*>(weights_.at(0, weights_.planned(), "weights"));
  std::vector<comm::Piece> pieces;
  for (size_t i = 0; i < spec_.tensors.size(); ++i) {
    const HeldWeights held = heldWeights(static_cast<int64_t>(i));
    pieces.push_back({held.data, spec_.tensors[i].weights + held.begin, held.count});
  }
  parallel_.data->allGatherPieces(pieces, base, static_cast<int64_t>(weights_.planned()), "weights");
}

// The rows that other ranks hold too, summed over them.
void Parameters::sumShared(const TensorSpec& t) {
  comm::Communicator* group = t.summed == Summed::kTensor     ? parallel_.tensor.get()
                              : t.summed == Summed::kKeyValue ? parallel_.keyValue.get()
                              : t.summed == Summed::kEnds     ? parallel_.ends.get()
                                                              : nullptr;
  if (group == nullptr) return;
  if (t.summedBegin == 0 && t.summedEnd == t.layout.out) {
    const Stored own = stored(find(t.name), Space::kGradients);
    auto* const data = static_cast<float*>(own.data);
    return group->allReduce(data, data, own.end - own.begin, t.name);
  }
  const int64_t index = find(t.name), rows = t.summedEnd - t.summedBegin;
  std::vector<float> some(static_cast<size_t>(rows * t.layout.in));
  readRows(index, Space::kGradients, t.summedBegin, rows, some.data());
  group->allReduce(some.data(), some.data(), rows * t.layout.in, t.name);
  writeRows(index, Space::kGradients, t.summedBegin, rows, some.data());
}

// Appends the parts that the rank has, of each data-parallel rank's piece its own, whose squares are to be summed.
void Parameters::addRuns(Queue& queue, const TensorSpec& t, GradientRuns& gradient) const {
  const Stored own = stored(find(t.name), Space::kGradients);
  const float* const data = static_cast<const float*>(own.data) - own.begin;
  int64_t begin = 0, end = t.layout.elements;
  if (spec_.dataRanks > 1) {
    begin = t.pieces[static_cast<size_t>(spec_.dataRank)];
    end = t.pieces[static_cast<size_t>(spec_.dataRank) + 1];
  }
  const auto add = [&](int64_t first, int64_t last) {
    first = std::max(first, begin);
    last = std::min(last, end);
    gradient.runs.push_back({data + first, std::max<int64_t>(0, last - first)});
  };
  for (const Part& part : t.layout.parts) {
    const bool copies = t.summed == Summed::kKeyValue && !t.owner && &part == t.layout.parts.data();
    if (!t.matrix || !copies || spec_.dataRanks > 1) {
      const int64_t vectorRows = copies ? t.summedBegin : part.out;
      add(part.offset, part.offset + (t.matrix ? part.elements() : vectorRows * t.layout.in));
      continue;
    }
    // Copied rows lie behind the part's own, which alone are packed as they are where nothing is copied.
    const auto own = kernels::WeightLayout::make(t.summedBegin, t.layout.in, Split::kNone, {t.summedBegin});
    std::vector<float> packed(static_cast<size_t>(own.elements)), row(static_cast<size_t>(t.layout.in));
    for (int64_t r = 0; r < t.summedBegin; ++r) {
      readRows(find(t.name), Space::kGradients, r, 1, row.data());
      eachElement(own.parts.front(), r, DType::kFloat32,
                  [&](int64_t i, int64_t k) { packed[static_cast<size_t>(i)] = row[static_cast<size_t>(k)]; });
    }
    const size_t size = packed.size() * sizeof(float);
    auto copy = std::make_unique<Arena>("rows that are copied", size, nullptr, gradients_.memory());
    queue.fromHost(copy->data(), packed.data(), size);
    gradient.runs.push_back({reinterpret_cast<const float*>(copy->data()), own.elements});
    gradient.copies.push_back(std::move(copy));
  }
}

double Parameters::finishGradients(Queue& queue) {
  GradientRuns gradient;
  for (const TensorSpec& t : spec_.tensors) {
    if (t.summed != Summed::kKeyValue) sumShared(t);
    addRuns(queue, t, gradient);
  }
  std::vector<double> sums(gradient.runs.size());
  kernels_.sumsOfSquares(queue, gradient.runs.data(), static_cast<int64_t>(sums.size()), sums.data());
  for (const TensorSpec& t : spec_.tensors) {
    if (t.summed == Summed::kKeyValue) sumShared(t);
  }
  return globalNorm(std::move(sums));
}

// From the rank's sums of squares, part by part: a tree over pieces, a tree over the parts of all ranks, then one chain
// over the tensors in the order of the whole table, stage after stage.
double Parameters::globalNorm(std::vector<double> sums) {
  if (parallel_.data != nullptr) {
    const std::vector<double> all = gatherDoubles(*parallel_.data, sums, "norm");
    for (size_t i = 0; i < sums.size(); ++i) {
      std::vector<double> pieces;
      for (size_t at = i; at < all.size(); at += sums.size()) pieces.push_back(all[at]);
      sums[i] = treeSum(std::move(pieces));
    }
  }
  const size_t mine = sums.size();
  const size_t rank = parallel_.tensor == nullptr ? 0 : static_cast<size_t>(parallel_.tensor->rank());
  const std::vector<double> all =
      parallel_.tensor == nullptr ? std::move(sums) : gatherDoubles(*parallel_.tensor, sums, "norm");
  comm::Communicator* pipeline = parallel_.pipeline.get();
  double total = 0;
  if (!parallel_.firstStage())
    pipeline->receive(&total, sizeof total, comm::Element::kByte, pipeline->rank() - 1, "norm");
  size_t at = 0;
  for (const TensorSpec& t : spec_.tensors) {
    const size_t parts = t.layout.parts.size();
    std::vector<double> addends;
    for (size_t r = 0; r * mine < all.size(); ++r) {
      if (!t.cut && r != rank) continue;
      const auto first = all.begin() + static_cast<std::ptrdiff_t>(r * mine + at);
      addends.insert(addends.end(), first, first + static_cast<std::ptrdiff_t>(parts));
    }
    at += parts;
    if (t.summed != Summed::kEnds || t.owner) total += treeSum(std::move(addends));
  }
  if (pipeline != nullptr) {
    const int last = pipeline->size() - 1;
    if (pipeline->rank() < last)
      pipeline->send(&total, sizeof total, comm::Element::kByte, pipeline->rank() + 1, "norm");
    pipeline->broadcast(&total, sizeof total, comm::Element::kByte, last, "norm");
  }
  return std::sqrt(total);
}

void Parameters::step(Queue& queue, const StepOptions& o, double norm) {
  const double scale = o.clipNorm > 0 ? std::min(1.0, o.clipNorm / (norm + 1e-6)) : 1.0;
  const double n = static_cast<double>(o.step);
  for (size_t i = 0; i < spec_.tensors.size(); ++i) {
    const TensorSpec& t = spec_.tensors[i];
    const Held& h = held_[i];
    const kernels::AdamW settings{
        o.learningRate,           o.beta1, o.beta2, o.epsilon, t.decay ? o.weightDecay : 0.0, 1 - std::pow(o.beta1, n),
        1 - std::pow(o.beta2, n), scale};
    const bool published = t.matrix && t.master != kAbsent;
    const auto state = [&](Space space) { return static_cast<float*>(stored(static_cast<int64_t>(i), space).data); };
    char* const weights = heldWeights(static_cast<int64_t>(i)).data;
    float* parameter = published ? state(Space::kWeights) : reinterpret_cast<float*>(weights);
    kernels_.adamw(queue, settings, h.end - h.begin, parameter, state(Space::kMoment1), state(Space::kMoment2),
                   state(Space::kGradients), published ? &h.layout : nullptr, published ? weights : nullptr);
  }
  gatherWeights();
  if (spec_.zero == 1) clearGradients();  // others' pieces too
  gradientsLive_ = false;
}

void Parameters::clearGradients() {
  if (gradients_.planned() > 0)
    queue_.fill(gradients_.at(0, gradients_.planned(), "gradients"), 0, gradients_.planned());
  gradientsLive_ = false;
}

}  // namespace lockstep::model
