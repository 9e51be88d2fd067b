#include "binding/convert.h"
#include "binding/device.h"
#include "comm/local/local.h"
#include "core/error.h"

namespace lockstep::binding {

Napi::Function WorldWrap::define(Napi::Env env) {
  return DefineClass(env, "World", {});
}

WorldWrap::WorldWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<WorldWrap>(info) {
  const auto o = info[0].As<Napi::Object>();
  comm::LocalOptions options;
  options.timeoutSeconds = numberAt(o, "timeoutSeconds");
  try {
    handles_ = comm::localWorld(static_cast<int>(integerAt(o, "ranks")), options);
  } catch (const Error& error) {
    throw toJavaScript(info.Env(), error.code(), error.what());
  }
}

std::shared_ptr<comm::Communicator> WorldWrap::take(Napi::Env env, int64_t rank) {
  if (rank < 0 || rank >= static_cast<int64_t>(handles_.size()) || handles_[static_cast<size_t>(rank)] == nullptr)
    invalid(env, "rank", "a rank of the world that no model has");
  return std::move(handles_[static_cast<size_t>(rank)]);
}

std::shared_ptr<comm::Communicator> takeHandle(Napi::Object o, Rank& rank) {
  auto taken = WorldWrap::Unwrap(objectAt(o, "world"))->take(o.Env(), integerAt(o, "rank"));
  rank.onClose([handle = std::weak_ptr(taken)] {
    if (const auto world = handle.lock()) world->abort("its device was closed");
  });
  return taken;
}

}  // namespace lockstep::binding
