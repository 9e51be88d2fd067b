#include <algorithm>
#include <utility>

#include "binding/convert.h"
#include "binding/device.h"
#include "binding/transfer.h"
#include "core/error.h"

namespace lockstep::binding {

namespace {

// What reading or writing rows of a space needs on the device.
unsigned groupsOf(const model::Model& model, model::Space space, const std::vector<Piece>& pieces) {
  if (space == model::Space::kGradients) return kGradients;
  if (space != model::Space::kWeights) return kOptimizer;
  const auto& tensors = model.spec().tensors;
  const bool masters = std::any_of(pieces.begin(), pieces.end(), [&](const Piece& piece) {
    return tensors.at(static_cast<size_t>(piece.tensor)).master != model::kAbsent;
  });
  return masters ? kParameters | kOptimizer : kParameters;
}

}  // namespace

Napi::Function ModelWrap::define(Napi::Env env) {
  return DefineClass(
      env, "Model",
      {InstanceMethod<&ModelWrap::join>("join"), InstanceMethod<&ModelWrap::load>("load"),
       InstanceMethod<&ModelWrap::snapshot>("snapshot"), InstanceMethod<&ModelWrap::save>("save"),
       InstanceMethod<&ModelWrap::forward>("forward"), InstanceMethod<&ModelWrap::backward>("backward"),
       InstanceMethod<&ModelWrap::step>("step"), InstanceMethod<&ModelWrap::generate>("generate"),
       InstanceMethod<&ModelWrap::readRows>("readRows"), InstanceMethod<&ModelWrap::writeRows>("writeRows"),
       InstanceMethod<&ModelWrap::reduceGradients>("reduceGradients"),
       InstanceMethod<&ModelWrap::clearGradients>("clearGradients"), InstanceMethod<&ModelWrap::publish>("publish"),
       InstanceMethod<&ModelWrap::traffic>("traffic"), InstanceMethod<&ModelWrap::memory>("memory"),
       InstanceMethod<&ModelWrap::state>("state"), InstanceMethod<&ModelWrap::close>("close")});
}

ModelWrap::ModelWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ModelWrap>(info) {
  rank_ = DeviceWrap::Unwrap(info[0].As<Napi::Object>())->rank();
  try {
    model::Parallel parallel;
    if (info[2].IsObject()) parallel.world = takeHandle(info[2].As<Napi::Object>(), *rank_);
    std::shared_ptr<Arena> weights;
    if (info[3].IsObject()) weights = MemoryWrap::Unwrap(info[3].As<Napi::Object>())->arena(info.Env());
    model_ = std::make_shared<model::Model>(readSpec(info[1].As<Napi::Object>()), rank_->device(), std::move(parallel),
                                            std::move(weights));
    state_ = std::make_shared<ModelState>(model_, rank_->host());
  } catch (const Error& error) {
    throw toJavaScript(info.Env(), error.code(), error.what());
  }
}

std::shared_ptr<model::Model> ModelWrap::open(Napi::Env env) const {
  if (model_ == nullptr) throw toJavaScript(env, "CLOSED", "the model is closed");
  return model_;
}

// join({pipeline, tensor, data, keyValueRanks, tiedEnds}): resolves when all ranks of the world have called it
Napi::Value ModelWrap::join(const Napi::CallbackInfo& info) {
  const auto o = info[0].As<Napi::Object>();
  const auto degree = [&](const char* key) { return static_cast<int>(integerAt(o, key)); };
  const model::Degrees degrees{degree("pipeline"), degree("tensor"), degree("data"), degree("keyValueRanks"),
                               booleanAt(o, "tiedEnds")};
  return rank_->call(
      info.Env(),
      [model = open(info.Env()), rank = rank_, degrees] {
        model->join(degrees, [&](auto world) { return rank->connect(std::move(world)); });
      },
      [](Napi::Env env) { return env.Undefined(); });
}

namespace {

// A forward call and what it gives, [passes] of each output.
struct ForwardWork {
  struct Outputs {
    std::vector<float> logprobs, entropies, values, logits, hidden;
  };
  model::ForwardCall call;
  std::vector<Outputs> outputs;
};

// {first, more}; absent: nothing is kept.
std::optional<model::Keeping> readKeep(Napi::Object o) {
  if (!has(o, "keep")) return std::nullopt;
  const auto keep = objectAt(o, "keep");
  return model::Keeping{booleanAt(keep, "first"), booleanAt(keep, "more")};
}

std::shared_ptr<ForwardWork> readForward(Napi::Object o, const model::Shape& shape) {
  auto work = std::make_shared<ForwardWork>();
  work->call = {{},
                readPlan(objectAt(o, "units")),
                integerAt(o, "workspaceBytes"),
                static_cast<float>(numberAt(o, "inverseTemperature")),
                readKeep(o)};
  const auto wanted = objectAt(o, "outputs");
  const auto passes = objectAt(o, "passes").As<Napi::Array>();
  work->outputs.resize(passes.Length());
  for (uint32_t i = 0; i < passes.Length(); ++i) {
    const auto pass = passes.Get(i).As<Napi::Object>();
    std::vector<int32_t> tokens = int32At(pass, "tokens");
    const auto want = [&](const char* name, std::vector<float>& array, int64_t columns) -> float* {
      if (!has(wanted, name)) return nullptr;
      array.resize(tokens.size() * static_cast<size_t>(columns));
      return array.data();
    };
    ForwardWork::Outputs& out = work->outputs[i];
    const model::ForwardOutputs outputs{want("logprobs", out.logprobs, 1), want("entropies", out.entropies, 1),
                                        want("values", out.values, 1), want("logits", out.logits, shape.vocabulary),
                                        want("hidden", out.hidden, shape.width)};
    work->call.passes.push_back({readPlan(objectAt(pass, "plan")), std::move(tokens), int32At(pass, "lengths"),
                                 integerAt(pass, "slot"), outputs});
  }
  return work;
}

}  // namespace

// forward({passes: [{tokens, lengths, plan, slot}], units, workspaceBytes, inverseTemperature, keep: {first, more},
// outputs: {logprobs, entropies, values, logits, hidden}}): the outputs of each pass
Napi::Value ModelWrap::forward(const Napi::CallbackInfo& info) {
  auto model = open(info.Env());
  const auto forward = readForward(info[0].As<Napi::Object>(), model->spec().shape);
  auto work = [model, forward] { model->forward(forward->call); };
  return rank_->call(info.Env(), claimed(state_, kParameters, work), [forward](Napi::Env env) {
    auto results = Napi::Array::New(env, forward->outputs.size());
    for (uint32_t i = 0; i < results.Length(); ++i) {
      const ForwardWork::Outputs& out = forward->outputs[i];
      auto result = Napi::Object::New(env);
      const auto give = [&](const char* name, const std::vector<float>& array) {
        if (!array.empty()) result.Set(name, toFloat32Array(env, array));
      };
      give("logprobs", out.logprobs);
      give("entropies", out.entropies);
      give("values", out.values);
      give("logits", out.logits);
      give("hidden", out.hidden);
      results.Set(i, result);
    }
    return results;
  });
}

// backward({passes: [{slot, logprobs, entropies, values}], more, last}): Float32Arrays, packed as the forward's tokens
Napi::Value ModelWrap::backward(const Napi::CallbackInfo& info) {
  const auto o = info[0].As<Napi::Object>();
  const auto list = objectAt(o, "passes").As<Napi::Array>();
  auto passes = std::make_shared<std::vector<model::BackwardPass>>();
  for (uint32_t i = 0; i < list.Length(); ++i) {
    const auto pass = list.Get(i).As<Napi::Object>();
    passes->push_back({integerAt(pass, "slot"), float32At(pass, "logprobs"), float32At(pass, "entropies"),
                       float32At(pass, "values")});
  }
  auto work = [model = open(info.Env()), passes, more = booleanAt(o, "more"), last = booleanAt(o, "last")] {
    model->backward(*passes, more, last);
  };
  return rank_->call(info.Env(), claimed(state_, kParameters | kGradients, work),
                     [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value ModelWrap::step(const Napi::CallbackInfo& info) {
  const auto o = info[0].As<Napi::Object>();
  const auto number = [&](const char* key) { return numberAt(o, key); };
  const model::StepOptions options{number("learningRate"), number("beta1"),    number("beta2"),     number("epsilon"),
                                   number("weightDecay"),  number("clipNorm"), integerAt(o, "step")};
  auto norm = std::make_shared<double>(0);
  auto work = [model = open(info.Env()), options, norm] { *norm = model->step(options); };
  return rank_->call(info.Env(), claimed(state_, kParameters | kGradients | kOptimizer, work),
                     [norm](Napi::Env env) { return Napi::Number::New(env, *norm); });
}

// readRows({space, pieces: [sourceRow, tensor, row, rows, ...], columns}): float32 [sum of source rows, columns]
Napi::Value ModelWrap::readRows(const Napi::CallbackInfo& info) {
  const auto o = info[0].As<Napi::Object>();
  const std::vector<Piece> pieces = readPieces(o);
  const model::Space space = readSpace(o);
  const int64_t columns = integerAt(o, "columns");
  int64_t rows = 0;
  for (const Piece& piece : pieces) rows = std::max(rows, piece.sourceRow + piece.rows);
  auto out = std::make_shared<std::vector<float>>(static_cast<size_t>(rows * columns));
  auto work = [model = open(info.Env()), pieces, space, columns, out] {
    for (const Piece& p : pieces)
      model->parameters().readRows(p.tensor, space, p.row, p.rows, out->data() + p.sourceRow * columns);
  };
  return rank_->call(info.Env(), claimed(state_, groupsOf(*model_, space, pieces), work),
                     [out](Napi::Env env) { return toFloat32Array(env, *out); });
}

Napi::Value ModelWrap::writeRows(const Napi::CallbackInfo& info) {
  const auto o = info[0].As<Napi::Object>();
  const std::vector<Piece> pieces = readPieces(o);
  const model::Space space = readSpace(o);
  const int64_t columns = integerAt(o, "columns");
  auto data = std::make_shared<std::vector<float>>(float32At(o, "data"));
  for (const Piece& p : pieces) {
    if ((p.sourceRow + p.rows) * columns > static_cast<int64_t>(data->size()))
      invalid(info.Env(), "data", "rows x columns numbers");
  }
  auto work = [model = open(info.Env()), pieces, space, columns, data] {
    for (const Piece& p : pieces)
      model->parameters().writeRows(p.tensor, space, p.row, p.rows, data->data() + p.sourceRow * columns);
  };
  return rank_->call(info.Env(), claimed(state_, groupsOf(*model_, space, pieces), work),
                     [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value ModelWrap::reduceGradients(const Napi::CallbackInfo& info) {
  const auto model = open(info.Env());
  return rank_->call(info.Env(), claimed(state_, kGradients, [model] { model->reduceGradients(); }),
                     [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value ModelWrap::clearGradients(const Napi::CallbackInfo& info) {
  const auto model = open(info.Env());
  return rank_->call(info.Env(), claimed(state_, kGradients, [model] { model->clearGradients(); }),
                     [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value ModelWrap::publish(const Napi::CallbackInfo& info) {
  const auto model = open(info.Env());
  return rank_->call(info.Env(), claimed(state_, kParameters | kOptimizer, [model] { model->publish(); }),
                     [](Napi::Env env) { return env.Undefined(); });
}

// {receivedBytes, sentBytes}: of what goes over the replicas behind the computation
Napi::Value ModelWrap::traffic(const Napi::CallbackInfo& info) {
  const comm::Traffic traffic = open(info.Env())->backgroundTraffic();
  auto out = Napi::Object::New(info.Env());
  out.Set("receivedBytes", static_cast<double>(traffic.receivedBytes));
  out.Set("sentBytes", static_cast<double>(traffic.sentBytes));
  return out;
}

// {weights, gradients, optimizer}: {planned, highWater} in bytes
Napi::Value ModelWrap::memory(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto model = open(env);
  auto out = Napi::Object::New(env);
  const auto give = [&](const char* name, const Arena& arena) {
    auto o = Napi::Object::New(env);
    o.Set("planned", static_cast<double>(arena.planned()));
    o.Set("highWater", static_cast<double>(arena.highWater()));
    out.Set(name, o);
  };
  give("weights", model->parameters().weights());
  give("gradients", model->parameters().gradients());
  give("optimizer", model->parameters().optimizer());
  return out;
}

// Frees the model's memory when the calls in flight are done. Idempotent.
Napi::Value ModelWrap::close(const Napi::CallbackInfo& info) {
  model_.reset();
  state_.reset();
  return info.Env().Undefined();
}

}  // namespace lockstep::binding
