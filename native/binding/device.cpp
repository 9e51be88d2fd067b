#include "binding/device.h"

#include "binding/convert.h"
#include "core/error.h"

namespace lockstep::binding {

Napi::Function DeviceWrap::define(Napi::Env env) {
  return DefineClass(
      env, "Device",
      {InstanceMethod<&DeviceWrap::memory>("memory"), InstanceMethod<&DeviceWrap::close>("close"),
       InstanceMethod<&DeviceWrap::limitWorkspace>("limitWorkspace"), InstanceMethod<&DeviceWrap::bench>("bench"),
       InstanceMethod<&DeviceWrap::move>("move"), InstanceMethod<&DeviceWrap::spaces>("spaces")});
}

DeviceWrap::DeviceWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<DeviceWrap>(info) {
  const auto o = info[0].As<Napi::Object>();
  const RankOptions options{static_cast<int>(integerAt(o, "threads")),
                            static_cast<size_t>(integerAt(o, "scratchBytes")),
                            stringAt(o, "implementation"),
                            stringAt(o, "isa"),
                            static_cast<int>(integerAt(o, "gpu")),
                            booleanAt(o, "poison"),
                            static_cast<size_t>(integerAt(o, "hostBytes"))};
  try {
    rank_ = std::make_shared<Rank>(info.Env(), options);
  } catch (const Error& error) {
    throw toJavaScript(info.Env(), error.code(), error.what());
  }
  Value().Set("kernels", Napi::String::New(info.Env(), rank_->kernels().name));
  Value().Set("rowGrain", static_cast<double>(rank_->kernels().rowGrain));
}

// {workspace: {planned, highWater}, scratch: {planned, highWater}} in bytes; scratch over all threads.
Napi::Value DeviceWrap::memory(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto entry = [&](size_t planned, size_t highWater) {
    auto o = Napi::Object::New(env);
    o.Set("planned", static_cast<double>(planned));
    o.Set("highWater", static_cast<double>(highWater));
    return o;
  };
  auto out = Napi::Object::New(env);
  Queue& queue = rank_->queue();
  const auto threads = static_cast<size_t>(queue.threads());
  out.Set("workspace", entry(rank_->workspace().planned(), rank_->workspace().highWater()));
  out.Set("scratch", entry(queue.scratchBytes() * threads, queue.scratchHighWater() * threads));
  return out;
}

// limitWorkspace(bytes): what the workspace has beyond them goes back to the system, and with it what a forward kept
Napi::Value DeviceWrap::limitWorkspace(const Napi::CallbackInfo& info) {
  const auto bytes = static_cast<size_t>(info[0].As<Napi::Number>().Int64Value());
  return rank_->call(
      info.Env(), [rank = rank_, bytes] { rank->trim(bytes); }, [](Napi::Env env) { return env.Undefined(); });
}

// Cancels what runs, waits for it and ends the rank's threads. Idempotent.
Napi::Value DeviceWrap::close(const Napi::CallbackInfo& info) {
  rank_->close();
  return info.Env().Undefined();
}

}  // namespace lockstep::binding
