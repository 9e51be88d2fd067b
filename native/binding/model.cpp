#include <algorithm>
#include <utility>

#include "binding/convert.h"
#include "binding/device.h"
#include "binding/transfer.h"
#include "core/error.h"
#include "transfer/file_slices.h"

namespace lockstep::binding {

namespace {

model::Space readSpace(Napi::Object o) {
  const std::string space = stringAt(o, "space");
  if (space == "weights") return model::Space::kWeights;
  if (space == "moment1") return model::Space::kMoment1;
  if (space == "moment2") return model::Space::kMoment2;
  if (space == "gradients") return model::Space::kGradients;
  invalid(o.Env(), "space", "weights, moment1, moment2 or gradients");
}

// Rows of one checkpoint tensor and where they go: source row, engine tensor, row there, count.
struct Piece {
  int64_t sourceRow, tensor, row, rows;
};

std::vector<Piece> readPieces(Napi::Object o) {
  const std::vector<int64_t> flat = integersAt(o, "pieces");
  std::vector<Piece> pieces;
  for (size_t i = 0; i + 3 < flat.size(); i += 4) pieces.push_back({flat[i], flat[i + 1], flat[i + 2], flat[i + 3]});
  return pieces;
}

struct LoadItem {
  std::string path;
  transfer::FileTensor tensor;
  int64_t columnBegin, columnCount;  // of the rows in the file, those that the engine's tensor has
  std::vector<Piece> pieces;
};

LoadItem readLoadItem(Napi::Object o) {
  const std::string type = stringAt(o, "dtype");
  const auto stored = type == "F32"    ? transfer::StoredType::kFloat32
                      : type == "BF16" ? transfer::StoredType::kBFloat16
                                       : transfer::StoredType::kFloat16;
  return {stringAt(o, "file"),
          {stringAt(o, "name"), integerAt(o, "offset"), stored, integerAt(o, "rows"), integerAt(o, "columns"),
           booleanAt(o, "transposed")},
          integerAt(o, "columnBegin"),
          integerAt(o, "columnCount"),
          readPieces(o)};
}

void loadItem(model::Parameters& parameters, const transfer::MappedFile& file, const LoadItem& item) {
  constexpr int64_t kRows = 64;
  std::vector<float> rows(static_cast<size_t>(kRows * item.tensor.columns));
  for (const Piece& piece : item.pieces) {
    for (int64_t r = 0; r < piece.rows; r += kRows) {
      const int64_t count = std::min(kRows, piece.rows - r);
      transfer::readRows(file, item.path, item.tensor, piece.sourceRow + r, count, rows.data());
      const int64_t columns = item.columnCount;
      for (int64_t i = 0; i < count && columns < item.tensor.columns; ++i) {
        std::copy_n(rows.data() + i * item.tensor.columns + item.columnBegin, columns, rows.data() + i * columns);
      }
      parameters.writeRows(piece.tensor, model::Space::kWeights, piece.row + r, count, rows.data());
    }
  }
}

}  // namespace

Napi::Function ModelWrap::define(Napi::Env env) {
  return DefineClass(
      env, "Model",
      {InstanceMethod<&ModelWrap::join>("join"), InstanceMethod<&ModelWrap::load>("load"),
       InstanceMethod<&ModelWrap::forward>("forward"), InstanceMethod<&ModelWrap::backward>("backward"),
       InstanceMethod<&ModelWrap::step>("step"), InstanceMethod<&ModelWrap::generate>("generate"),
       InstanceMethod<&ModelWrap::readRows>("readRows"), InstanceMethod<&ModelWrap::writeRows>("writeRows"),
       InstanceMethod<&ModelWrap::publish>("publish"), InstanceMethod<&ModelWrap::memory>("memory"),
       InstanceMethod<&ModelWrap::close>("close")});
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
  } catch (const Error& error) {
    throw toJavaScript(info.Env(), error.code(), error.what());
  }
}

std::shared_ptr<model::Model> ModelWrap::open(Napi::Env env) const {
  if (model_ == nullptr) throw toJavaScript(env, "CLOSED", "the model is closed");
  return model_;
}

// join(tensorRanks): resolves when all ranks of the world have called it
Napi::Value ModelWrap::join(const Napi::CallbackInfo& info) {
  const int tensorRanks = info[0].As<Napi::Number>().Int32Value();
  return rank_->call(
      info.Env(), [model = open(info.Env()), tensorRanks] { model->join(tensorRanks); },
      [](Napi::Env env) { return env.Undefined(); });
}

// load([{file, name, dtype, offset, rows, columns, columnBegin, columnCount, transposed, pieces: [sourceRow, tensor,
// row, rows, ...]}])
Napi::Value ModelWrap::load(const Napi::CallbackInfo& info) {
  const auto list = info[0].As<Napi::Array>();
  auto items = std::make_shared<std::vector<LoadItem>>();
  for (uint32_t i = 0; i < list.Length(); ++i) items->push_back(readLoadItem(list.Get(i).As<Napi::Object>()));
  auto work = [model = open(info.Env()), items] {
    std::unique_ptr<transfer::MappedFile> file;
    const std::string* path = nullptr;
    for (const LoadItem& item : *items) {
      if (path == nullptr || *path != item.path) file = std::make_unique<transfer::MappedFile>(item.path);
      path = &item.path;
      loadItem(model->parameters(), *file, item);
    }
    model->publish();
  };
  return rank_->call(info.Env(), work, [](Napi::Env env) { return env.Undefined(); });
}

// forward({tokens, lengths, inverseTemperature, keep, plan, outputs: {logprobs, entropies, values, logits, hidden}})
Napi::Value ModelWrap::forward(const Napi::CallbackInfo& info) {
  struct Call {
    std::vector<int32_t> tokens, lengths;
    std::vector<model::BufferSpec> plan;
    float inverseTemperature;
    bool keep;
    std::vector<float> logprobs, entropies, values, logits, hidden;
  };
  const auto o = info[0].As<Napi::Object>();
  auto call = std::make_shared<Call>(Call{int32At(o, "tokens"),
                                          int32At(o, "lengths"),
                                          readPlan(objectAt(o, "plan")),
                                          static_cast<float>(numberAt(o, "inverseTemperature")),
                                          booleanAt(o, "keep"),
                                          {},
                                          {},
                                          {},
                                          {},
                                          {}});
  auto model = open(info.Env());
  const auto outputs = objectAt(o, "outputs");
  const size_t total = call->tokens.size();
  const auto want = [&](const char* name, std::vector<float>& array, int64_t columns) {
    if (has(outputs, name)) array.resize(total * static_cast<size_t>(columns));
  };
  want("logprobs", call->logprobs, 1);
  want("entropies", call->entropies, 1);
  want("values", call->values, 1);
  want("logits", call->logits, model->spec().shape.vocabulary);
  want("hidden", call->hidden, model->spec().shape.width);
  auto work = [model, call] {
    const auto pointer = [](std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
    model->forward(call->plan, call->tokens.data(), call->lengths.data(), static_cast<int64_t>(call->lengths.size()),
                   call->inverseTemperature, call->keep,
                   {pointer(call->logprobs), pointer(call->entropies), pointer(call->values), pointer(call->logits),
                    pointer(call->hidden)});
  };
  return rank_->call(info.Env(), work, [call](Napi::Env env) {
    auto result = Napi::Object::New(env);
    const auto give = [&](const char* name, const std::vector<float>& array) {
      if (!array.empty()) result.Set(name, toFloat32Array(env, array));
    };
    give("logprobs", call->logprobs);
    give("entropies", call->entropies);
    give("values", call->values);
    give("logits", call->logits);
    give("hidden", call->hidden);
    return result;
  });
}

// backward({logprobs, entropies, values}): Float32Arrays, packed as the forward's tokens
Napi::Value ModelWrap::backward(const Napi::CallbackInfo& info) {
  const auto o = info[0].As<Napi::Object>();
  auto gradients = std::make_shared<std::array<std::vector<float>, 3>>(
      std::array<std::vector<float>, 3>{float32At(o, "logprobs"), float32At(o, "entropies"), float32At(o, "values")});
  auto work = [model = open(info.Env()), gradients] {
    const auto pointer = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
    model->backward(pointer((*gradients)[0]), pointer((*gradients)[1]), pointer((*gradients)[2]));
  };
  return rank_->call(info.Env(), work, [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value ModelWrap::step(const Napi::CallbackInfo& info) {
  const auto o = info[0].As<Napi::Object>();
  const auto number = [&](const char* key) { return numberAt(o, key); };
  const model::StepOptions options{number("learningRate"), number("beta1"),    number("beta2"),     number("epsilon"),
                                   number("weightDecay"),  number("clipNorm"), integerAt(o, "step")};
  auto norm = std::make_shared<double>(0);
  auto work = [model = open(info.Env()), options, norm] { *norm = model->step(options); };
  return rank_->call(info.Env(), work, [norm](Napi::Env env) { return Napi::Number::New(env, *norm); });
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
  return rank_->call(info.Env(), work, [out](Napi::Env env) { return toFloat32Array(env, *out); });
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
  return rank_->call(info.Env(), work, [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value ModelWrap::publish(const Napi::CallbackInfo& info) {
  return rank_->call(
      info.Env(), [model = open(info.Env())] { model->publish(); }, [](Napi::Env env) { return env.Undefined(); });
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
  return info.Env().Undefined();
}

}  // namespace lockstep::binding
