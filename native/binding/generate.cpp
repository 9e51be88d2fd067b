// generate: many requests in, batches of new tokens out while it runs, all results at the end.
#include <utility>

#include "binding/convert.h"
#include "binding/device.h"

namespace lockstep::binding {

namespace {

struct GenerateCall {
  model::GeneratePlans plans;
  model::GenerateSettings settings;
  std::vector<model::GenerateRequest> requests;
  model::GenerateControl control;
  std::vector<model::Generated> results;
  model::GenerateStatistics statistics;
  // The callback lives and dies on the JavaScript thread.
  std::unique_ptr<Napi::FunctionReference> onProgress;
  int64_t total = 0;
};

model::GenerateSettings readSettings(Napi::Object o, bool poison) {
  return {static_cast<float>(numberAt(o, "temperature")),
          static_cast<float>(numberAt(o, "topP")),
          static_cast<int32_t>(integerAt(o, "topK")),
          int32At(o, "stopTokens"),
          bitsAt(o, "seed"),
          integerAt(o, "rows"),
          integerAt(o, "sequences"),
          integerAt(o, "guesses"),
          integerAt(o, "guessRows"),
          integerAt(o, "pages"),
          poison};
}

std::vector<model::GenerateRequest> readRequests(Napi::Object o) {
  const auto list = objectAt(o, "requests").As<Napi::Array>();
  std::vector<model::GenerateRequest> requests;
  for (uint32_t i = 0; i < list.Length(); ++i) {
    const auto request = list.Get(i).As<Napi::Object>();
    requests.push_back({int32At(request, "prompt"), integerAt(request, "maxNewTokens"), bitsAt(request, "id")});
  }
  return requests;
}

void deliver(Napi::Env env, GenerateCall& call, const std::vector<int32_t>& requests,
             const std::vector<int32_t>& tokens) {
  call.total += static_cast<int64_t>(tokens.size());
  auto progress = Napi::Object::New(env);
  progress.Set("requests", toInt32Array(env, requests));
  progress.Set("tokens", toInt32Array(env, tokens));
  progress.Set("total", static_cast<double>(call.total));
  const Napi::Value ended = call.onProgress->Value().Call({progress});
  if (!ended.IsArray()) return;
  const auto list = ended.As<Napi::Array>();
  for (uint32_t i = 0; i < list.Length(); ++i) call.control.end(list.Get(i).As<Napi::Number>().Int32Value());
}

Napi::Value toResult(Napi::Env env, const model::Generated& generated) {
  constexpr const char* kFinish[] = {"stop", "length", "aborted"};
  auto result = Napi::Object::New(env);
  result.Set("tokens", toInt32Array(env, generated.tokens));
  result.Set("logprobs", toFloat32Array(env, generated.logprobs));
  result.Set("finish", kFinish[static_cast<int>(generated.finish)]);
  return result;
}

}  // namespace

// generate({plan, units, temperature, topP, topK, stopTokens, seed, rows, sequences, guesses, guessRows, pages,
//   requests}, onProgress?)
//   -> {promise, abort()}; the promise resolves to {results, steps, rows, preemptions, sharedPositions, guessed,
//   accepted}
Napi::Value ModelWrap::generate(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto o = info[0].As<Napi::Object>();
  auto call = std::make_shared<GenerateCall>();
  const auto plan = objectAt(o, "plan");
  call->plans = {readPlan(plan), readPlan(objectAt(o, "units")), integerAt(plan, "total")};
  call->settings = readSettings(o, rank_->poison());
  call->requests = readRequests(o);
  model::Generator::Progress progress;
  if (info[1].IsFunction()) {
    call->onProgress = std::make_unique<Napi::FunctionReference>(Napi::Persistent(info[1].As<Napi::Function>()));
    progress = [rank = rank_, call](std::vector<int32_t> requests, std::vector<int32_t> tokens) {
      rank->notify([call, requests = std::move(requests), tokens = std::move(tokens)](Napi::Env visited) {
        deliver(visited, *call, requests, tokens);
      });
    };
  }
  auto work = [model = open(env), call, progress] {
    call->results =
        model->generate(call->plans, call->settings, call->requests, call->control, progress, call->statistics);
  };
  auto finish = [call](Napi::Env done) -> Napi::Value {
    auto out = Napi::Object::New(done);
    auto list = Napi::Array::New(done, call->results.size());
    for (size_t i = 0; i < call->results.size(); ++i)
      list.Set(static_cast<uint32_t>(i), toResult(done, call->results[i]));
    out.Set("results", list);
    out.Set("steps", static_cast<double>(call->statistics.steps));
    out.Set("rows", static_cast<double>(call->statistics.rows));
    out.Set("preemptions", static_cast<double>(call->statistics.preemptions));
    out.Set("sharedPositions", static_cast<double>(call->statistics.sharedPositions));
    out.Set("guessed", static_cast<double>(call->statistics.guessed));
    out.Set("accepted", static_cast<double>(call->statistics.accepted));
    return out;
  };
  auto handle = Napi::Object::New(env);
  handle.Set("promise", rank_->call(env, claimed(state_, kParameters, work), finish));
  handle.Set("abort", Napi::Function::New(env, [call](const Napi::CallbackInfo&) { call->control.abort(); }));
  return handle;
}

}  // namespace lockstep::binding
