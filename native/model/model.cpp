#include "model/model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/range.h"
#include "core/work_clock.h"

namespace lockstep::model {

namespace {

Error interrupted() {
  return {"NO_FORWARD",
          "backward needs a forward with `keep` before it and no other call of its device between: the activations lie "
          "in the workspace that the next call uses"};
}

Error notFinite(int64_t step) {
  return {"GRADIENT_NOT_FINITE", "the gradient norm of step " + std::to_string(step) +
                                     " is not finite; nothing was updated, the gradient was dropped. Lower "
                                     "optimizer.learningRate or look for bad rows in the data"};
}

// Gradients per row, zero on padding rows and where nothing was predicted: of log-probs, entropies, values.
std::array<std::vector<float>, 3> spreadGradients(const Batch& batch, const BackwardPass& given) {
  const auto spread = [&](const std::vector<float>& packed) {
    std::vector<float> rows;
    if (packed.empty()) return rows;
    rows.assign(static_cast<size_t>(batch.rows()), 0.0f);
    const float* from = packed.data();
    for (int64_t b = 0; b < batch.count(); ++b) {
      const int32_t length = batch.length[static_cast<size_t>(b)];
      std::copy_n(from, length, rows.data() + batch.rowBegin[static_cast<size_t>(b)]);
      from += length;
    }
    return rows;
  };
  std::vector<float> logprobs = spread(given.logprobs);
  for (size_t t = 0; t < logprobs.size(); ++t) logprobs[t] = batch.targets[t] < 0 ? 0.0f : logprobs[t];
  return {std::move(logprobs), spread(given.entropies), spread(given.values)};
}

}  // namespace

Model::Model(Spec spec, Device device, Parallel parallel, std::shared_ptr<Arena> weights)
    : spec_(std::move(spec)),
      device_(device),
      parallel_(std::move(parallel)),
      parameters_(spec_, parallel_, device.kernels, device.queue, device.workspace.memory(), device.memory,
                  std::move(weights)),
      weights_(spec_, parallel_, parameters_),
      gradients_(spec_, parallel_, parameters_, device.queue),
      transformer_(spec_, parallel_, parameters_, weights_, gradients_, device.kernels, device.queue,
                   device.workspace.memory(), device.cancelled) {}

Model::~Model() {
  parallel_.background.reset();  // what it still does reads and writes the arenas
}

// Takes the workspace, grown to what the micro-batches under way together need; `first`: for them alone.
void Model::enter(int64_t workspaceBytes, bool first) {
  if (first) {
    kept_.clear();
    keptUse_ = ++device_.workspaceUse;
  }
  if (keptUse_ != device_.workspaceUse) throw interrupted();
  const auto bytes = static_cast<size_t>(workspaceBytes);
  if (bytes > device_.workspace.planned()) device_.workspace.reserve(bytes);
}

void Model::requireTokens(const std::vector<int32_t>& tokens) const {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= 0 && tokens[i] < spec_.shape.vocabulary) continue;
    throw Error("TOKEN_OUT_OF_RANGE", "token id " + std::to_string(tokens[i]) + " at position " + std::to_string(i) +
                                          " of the batch is outside the model's vocabulary 0.." +
                                          std::to_string(spec_.shape.vocabulary - 1));
  }
}

void Model::requireSequences(const ForwardPass& pass) const {
  for (size_t b = 0; b < pass.lengths.size(); ++b) {
    if (pass.lengths[b] >= 1 && pass.lengths[b] <= spec_.shape.maxPositions) continue;
    throw Error("SEQUENCE_TOO_LONG", "sequence " + std::to_string(b) + " has " + std::to_string(pass.lengths[b]) +
                                         " tokens; the model takes 1.." + std::to_string(spec_.shape.maxPositions));
  }
  requireTokens(pass.tokens);
}

// Rows of sequences without the padding between them.
void Model::copyOut(const Batch& batch, View<const float> rows, float* out) const {
  for (int64_t b = 0; b < batch.count(); ++b) {
    for (int32_t i = 0; i < batch.length[static_cast<size_t>(b)]; ++i, out += rows.cols) {
      std::copy_n(rows.row(batch.rowBegin[static_cast<size_t>(b)] + i), rows.cols, out);
    }
  }
}

void Model::forward(const ForwardCall& call) {
  const Range range("forward");
  together([&] {
    runForward(call);
    device_.queue.synchronize();
    WorkClock::end();
    if (!call.keep || !call.keep->more) transformer_.flush();
  });
}

void Model::runForward(const ForwardCall& call) {
  for (const ForwardPass& pass : call.passes) requireSequences(pass);
  enter(call.workspaceBytes, !call.keep || call.keep->first);
  std::vector<Pass> passes;
  for (const ForwardPass& pass : call.passes) {
    Batch batch = Batch::whole(pass.tokens.data(), pass.lengths.data(), static_cast<int64_t>(pass.lengths.size()),
                               device_.kernels.rowGrain);
    const int64_t pages = batch.pageCount;
    passes.push_back({.workspace = Workspace(device_.workspace, pass.plan),
                      .batch = std::move(batch),
                      .pageCount = pages,
                      .inverseTemperature = call.inverseTemperature});
  }
  units_ = Workspace(device_.workspace, call.units);
  weights_.walkForward(units_);
  transformer_.forward(passes, call.keep ? Keep::kActivations : Keep::kNothing);
  for (size_t i = 0; i < passes.size(); ++i) {
    if (parallel_.lastStage()) giveOutputs(passes[i], call.passes[i].outputs, call.keep.has_value());
    if (call.keep) kept_.insert_or_assign(call.passes[i].slot, std::move(passes[i]));
  }
}

void Model::giveOutputs(Pass& pass, const ForwardOutputs& out, bool keep) {
  const int64_t rows = pass.rows();
  const auto give = [&](std::vector<float>& array, float* to, int64_t columns = 1) {
    if (to != nullptr) copyOut(pass.batch, dense<const float>(array.data(), rows, columns), to);
  };
  if (spec_.shape.head == Head::kScalar) {
    std::vector<float> values(static_cast<size_t>(rows));
    const View<float> computed = pass.workspace.f32("wide", kAbsent, rows, 1);
    transformer_.values(pass.hidden, computed);
    device_.queue.toHost(values.data(), computed.data, values.size() * sizeof(float));
    give(values, out.values);
  } else if (keep || out.logprobs != nullptr || out.entropies != nullptr) {
    transformer_.logprobs(pass);
    give(pass.logprobs, out.logprobs);
    give(pass.entropies, out.entropies);
  }
  if (out.logits != nullptr) {
    std::vector<float> logits(static_cast<size_t>(rows * spec_.shape.vocabulary));
    const size_t bytes = logits.size() * sizeof(float);
    Arena computed("logits", bytes, nullptr, device_.workspace.memory());
    auto* data = static_cast<float*>(computed.at(0, bytes, "logits"));
    transformer_.logits(pass.hidden, dense(data, rows, spec_.shape.vocabulary));
    device_.queue.toHost(logits.data(), data, bytes);
    give(logits, out.logits, spec_.shape.vocabulary);
  }
  if (out.hidden != nullptr) {
    std::vector<float> widened(static_cast<size_t>(rows * spec_.shape.width));
    std::vector<char> hidden(widened.size() * bytesOf(spec_.dtype));
    device_.queue.toHost(hidden.data(), pass.hidden.data, hidden.size());
    for (size_t i = 0; i < widened.size(); ++i) {
      widened[i] = spec_.dtype == DType::kFloat32 ? reinterpret_cast<const float*>(hidden.data())[i]
                                                  : toFloat(reinterpret_cast<const BFloat16*>(hidden.data())[i]);
    }
    give(widened, out.hidden, spec_.shape.width);
  }
}

void Model::backward(const std::vector<BackwardPass>& passes, bool more, bool last) {
  const Range range("backward");
  together([&] {
    runBackward(passes, last);
    device_.queue.synchronize();
    WorkClock::end();
    if (!more) transformer_.flush();
  });
}

void Model::runBackward(const std::vector<BackwardPass>& gradients, bool last) {
  if (keptUse_ != device_.workspaceUse) kept_.clear();
  std::vector<Pass> passes;
  std::vector<std::array<std::vector<float>, 3>> spread;
  std::vector<Transformer::OutputGradients> d;
  for (const BackwardPass& given : gradients) {
    if (kept_.count(given.slot) == 0) throw interrupted();
    passes.push_back(std::move(kept_.extract(given.slot).mapped()));
    spread.push_back(spreadGradients(passes.back().batch, given));
    auto& [logprobs, entropies, values] = spread.back();
    if (spec_.shape.head == Head::kScalar && values.empty())
      values.assign(static_cast<size_t>(passes.back().rows()), 0);
    const auto pointer = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
    d.push_back({pointer(logprobs), pointer(entropies), pointer(values)});
  }
  weights_.walkBackward();
  parameters_.touchGradients();
  gradients_.begin(units_, last);
  transformer_.backward(passes, d);
  gradients_.end();
}

void Model::reduceGradients() {
  const Range range("reduce");
  together([&] { gradients_.finish(); });
}

double Model::step(const StepOptions& options) {
  const Range range("step");
  double norm = 0;
  together([&] {
    gradients_.finish();
    norm = parameters_.finishGradients(device_.queue);
    if (std::isfinite(norm)) {
      parameters_.step(device_.queue, options, norm);
    } else {
      parameters_.clearGradients();
    }
    gradients_.clear();
  });
  if (!std::isfinite(norm)) throw notFinite(options.step);  // on all ranks: none waits for this one
  return norm;
}

void Model::clearGradients() {
  const Range range("clear");
  kept_.clear();
  gradients_.clear();
  parameters_.clearGradients();
  device_.queue.synchronize();
}

std::vector<Generated> Model::generate(const GeneratePlans& plans, const GenerateSettings& settings,
                                       const std::vector<GenerateRequest>& requests, GenerateControl& control,
                                       const Generator::Progress& progress, GenerateStatistics& statistics) {
  const Range range("generate");
  std::vector<Generated> results;
  together([&] { results = runGenerate(plans, settings, requests, control, progress, statistics); });
  return results;
}

std::vector<Generated> Model::runGenerate(const GeneratePlans& plans, const GenerateSettings& settings,
                                          const std::vector<GenerateRequest>& requests, GenerateControl& control,
                                          const Generator::Progress& progress, GenerateStatistics& statistics) {
  for (const GenerateRequest& request : requests) {
    requireTokens(request.prompt);
    const int64_t positions = static_cast<int64_t>(request.prompt.size()) + request.maxNewTokens;
    if (request.prompt.empty() || positions > spec_.shape.maxPositions) {
      throw Error("SEQUENCE_TOO_LONG", "a prompt of " + std::to_string(request.prompt.size()) + " tokens and " +
                                           std::to_string(request.maxNewTokens) + " new ones: the model takes 1.." +
                                           std::to_string(spec_.shape.maxPositions) + " positions");
    }
  }
  enter(plans.workspaceBytes, true);
  weights_.gatherAll(Workspace(device_.workspace, plans.units));
  if (requests.empty()) return {};
  const Workspace workspace(device_.workspace, plans.call);
  Generator generator(spec_, parallel_, transformer_, device_.kernels, device_.queue, workspace, settings);
  std::vector<Generated> results = generator.run(requests, control, progress);
  statistics = generator.statistics();
  return results;
}

}  // namespace lockstep::model
