#include "model/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/work_clock.h"

namespace lockstep::model {

namespace {

Error interrupted() {
  return {"NO_FORWARD",
          "backward needs a forward with `keep` before it and no other call of its device between: the activations lie "
          "in the workspace that the next call uses"};
}

Error notFinite(int64_t step) {
  return {"GRADIENT_NOT_FINITE",
          "the gradient norm of step " + std::to_string(step) +
              " is not finite; nothing was updated. Lower optimizer.learningRate or look for bad rows in the data"};
}

}  // namespace

Model::Model(Spec spec, Device device, Parallel parallel, std::shared_ptr<Arena> weights)
    : spec_(std::move(spec)),
      device_(device),
      parallel_(std::move(parallel)),
      parameters_(spec_, parallel_, device.kernels, device.memory, std::move(weights)),
      transformer_(spec_, parallel_, parameters_, device.kernels, device.queue, device.cancelled) {}

// Takes the workspace for one call, grown to its plan.
Workspace Model::enter(const std::vector<BufferSpec>& plan, const std::optional<KeptPass>& keep) {
  if (!keep || keep->first) {
    kept_.clear();
    keptUse_ = ++device_.workspaceUse;
  }
  if (keptUse_ != device_.workspaceUse) throw interrupted();
  int64_t bytes = keep ? keep->workspaceBytes : 0;
  for (const BufferSpec& buffer : plan) bytes = std::max(bytes, buffer.offset + buffer.bytes);
  if (static_cast<size_t>(bytes) > device_.workspace.planned()) device_.workspace.reserve(static_cast<size_t>(bytes));
  return Workspace(device_.workspace, plan);
}

void Model::requireTokens(const int32_t* tokens, int64_t count) const {
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] >= 0 && tokens[i] < spec_.shape.vocabulary) continue;
    throw Error("TOKEN_OUT_OF_RANGE", "token id " + std::to_string(tokens[i]) + " at position " + std::to_string(i) +
                                          " of the batch is outside the model's vocabulary 0.." +
                                          std::to_string(spec_.shape.vocabulary - 1));
  }
}

// Rows of sequences without the padding between them.
void Model::copyOut(const Batch& batch, View<const float> rows, float* out) const {
  for (int64_t b = 0; b < batch.count(); ++b) {
    for (int32_t i = 0; i < batch.length[static_cast<size_t>(b)]; ++i, out += rows.cols) {
      std::copy_n(rows.row(batch.rowBegin[static_cast<size_t>(b)] + i), rows.cols, out);
    }
  }
}

void Model::forward(const std::vector<BufferSpec>& plan, const int32_t* tokens, const int32_t* lengths, int64_t count,
                    float inverseTemperature, const std::optional<KeptPass>& keep, const ForwardOutputs& out) {
  together([&] {
    runForward(plan, tokens, lengths, count, inverseTemperature, keep, out);
    WorkClock::end();
    if (!keep || !keep->more) transformer_.flush();
  });
}

void Model::runForward(const std::vector<BufferSpec>& plan, const int32_t* tokens, const int32_t* lengths,
                       int64_t count, float inverseTemperature, const std::optional<KeptPass>& keep,
                       const ForwardOutputs& out) {
  int64_t total = 0;
  for (int64_t b = 0; b < count; ++b) {
    total += lengths[b];
    if (lengths[b] < 1 || lengths[b] > spec_.shape.maxPositions) {
      throw Error("SEQUENCE_TOO_LONG", "sequence " + std::to_string(b) + " has " + std::to_string(lengths[b]) +
                                           " tokens; the model takes 1.." + std::to_string(spec_.shape.maxPositions));
    }
  }
  requireTokens(tokens, total);
  Kept call{enter(plan, keep), Batch::whole(tokens, lengths, count, true), {}, inverseTemperature, {}, {}, {}};
  const int64_t rows = call.batch.rows();
  call.hidden = transformer_.forward(call.workspace, call.batch, keep ? Keep::kActivations : Keep::kNothing,
                                     call.batch.pageCount);
  if (!parallel_.lastStage()) {
    if (keep) kept_.insert_or_assign(keep->slot, std::move(call));
    return;
  }
  const auto width = static_cast<size_t>(rows);
  if (spec_.shape.head == Head::kScalar) {
    std::vector<float> values(width);
    transformer_.values(call.hidden, dense(values.data(), rows, 1));
    if (out.values != nullptr) copyOut(call.batch, dense<const float>(values.data(), rows, 1), out.values);
  } else if (keep || out.logprobs != nullptr || out.entropies != nullptr) {
    for (auto* array : {&call.logprobs, &call.entropies, &call.logZ}) array->resize(width);
    transformer_.logprobs(call.workspace, call.batch, call.hidden, inverseTemperature,
                          {call.logprobs.data(), call.entropies.data(), call.logZ.data()});
    if (out.logprobs != nullptr) copyOut(call.batch, dense<const float>(call.logprobs.data(), rows, 1), out.logprobs);
    if (out.entropies != nullptr)
      copyOut(call.batch, dense<const float>(call.entropies.data(), rows, 1), out.entropies);
  }
  if (out.logits != nullptr) {
    std::vector<float> logits(width * static_cast<size_t>(spec_.shape.vocabulary));
    const View<float> all = dense(logits.data(), rows, spec_.shape.vocabulary);
    transformer_.logits(call.hidden, all);
    copyOut(call.batch, all, out.logits);
  }
  if (out.hidden != nullptr) {
    std::vector<float> widened(width * static_cast<size_t>(spec_.shape.width));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < spec_.shape.width; ++c) {
        widened[static_cast<size_t>(r * spec_.shape.width + c)] =
            spec_.dtype == DType::kFloat32 ? call.hidden.row<float>(r)[c] : toFloat(call.hidden.row<BFloat16>(r)[c]);
      }
    }
    copyOut(call.batch, dense<const float>(widened.data(), rows, spec_.shape.width), out.hidden);
  }
  if (keep) kept_.insert_or_assign(keep->slot, std::move(call));
}

void Model::backward(int64_t slot, bool more, const float* dLogprobs, const float* dEntropies, const float* dValues) {
  together([&] {
    runBackward(slot, dLogprobs, dEntropies, dValues);
    WorkClock::end();
    if (!more) transformer_.flush();
  });
}

void Model::runBackward(int64_t slot, const float* dLogprobs, const float* dEntropies, const float* dValues) {
  if (keptUse_ != device_.workspaceUse) kept_.clear();
  if (kept_.count(slot) == 0) throw interrupted();
  Kept call = std::move(kept_.extract(slot).mapped());
  const Batch& batch = call.batch;
  // Gradients per row; zero on padding rows.
  const auto spread = [&](const float* packed) {
    std::vector<float> rows;
    if (packed == nullptr) return rows;
    rows.assign(static_cast<size_t>(batch.rows()), 0.0f);
    for (int64_t b = 0; b < batch.count(); ++b) {
      const int32_t length = batch.length[static_cast<size_t>(b)];
      std::copy_n(packed, length, rows.data() + batch.rowBegin[static_cast<size_t>(b)]);
      packed += length;
    }
    return rows;
  };
  std::vector<float> logprobs = spread(dLogprobs);
  for (size_t t = 0; t < logprobs.size(); ++t) logprobs[t] = batch.targets[t] < 0 ? 0.0f : logprobs[t];
  const std::vector<float> entropies = spread(dEntropies);
  std::vector<float> values = spread(dValues);
  if (spec_.shape.head == Head::kScalar && values.empty()) values.assign(static_cast<size_t>(batch.rows()), 0.0f);
  const auto pointer = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
  transformer_.backward(call.workspace, batch, call.hidden, call.inverseTemperature,
                        {call.logprobs.data(), call.entropies.data(), call.logZ.data()},
                        {pointer(logprobs), pointer(entropies), pointer(values)});
}

double Model::step(const StepOptions& options) {
  double norm = 0;
  together([&] { norm = parameters_.finishGradients(device_.queue); });
  if (!std::isfinite(norm)) throw notFinite(options.step);  // on all ranks: none waits for this one
  together([&] { parameters_.step(device_.queue, options, norm); });
  return norm;
}

void Model::clearGradients() {
  kept_.clear();
  parameters_.clearGradients();
}

std::vector<Generated> Model::generate(const std::vector<BufferSpec>& plan, const GenerateSettings& settings,
                                       const std::vector<GenerateRequest>& requests, GenerateControl& control,
                                       const Generator::Progress& progress, GenerateStatistics& statistics) {
  std::vector<Generated> results;
  together([&] { results = runGenerate(plan, settings, requests, control, progress, statistics); });
  return results;
}

std::vector<Generated> Model::runGenerate(const std::vector<BufferSpec>& plan, const GenerateSettings& settings,
                                          const std::vector<GenerateRequest>& requests, GenerateControl& control,
                                          const Generator::Progress& progress, GenerateStatistics& statistics) {
  for (const GenerateRequest& request : requests) {
    requireTokens(request.prompt.data(), static_cast<int64_t>(request.prompt.size()));
    const int64_t positions = static_cast<int64_t>(request.prompt.size()) + request.maxNewTokens;
    if (request.prompt.empty() || positions > spec_.shape.maxPositions) {
      throw Error("SEQUENCE_TOO_LONG", "a prompt of " + std::to_string(request.prompt.size()) + " tokens and " +
                                           std::to_string(request.maxNewTokens) + " new ones: the model takes 1.." +
                                           std::to_string(spec_.shape.maxPositions) + " positions");
    }
  }
  const Workspace workspace = enter(plan);
  Generator generator(spec_, parallel_, transformer_, device_.kernels, device_.queue, workspace, settings);
  std::vector<Generated> results = generator.run(requests, control, progress);
  statistics = generator.statistics();
  return results;
}

}  // namespace lockstep::model
