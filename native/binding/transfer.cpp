#include "binding/transfer.h"

#include <utility>

#include "binding/convert.h"
#include "binding/device.h"
#include "core/error.h"

namespace lockstep::binding {

namespace {

std::shared_ptr<Arena> memoryAt(Napi::Object o, const char* key) {
  return MemoryWrap::Unwrap(objectAt(o, key))->arena(o.Env());
}

// {tensors: names, slices: flat [tensor, from, to, sourceOffset, destinationOffset, bytes, count, sourceStride,
// destinationStride, ...]}
std::vector<transfer::Slice> readSlices(Napi::Object o) {
  constexpr size_t kFields = 9;
  const auto names = objectAt(o, "tensors").As<Napi::Array>();
  const std::vector<int64_t> flat = integersAt(o, "slices");
  if (flat.size() % kFields != 0) invalid(o.Env(), "slices", "nine integers for each slice");
  std::vector<transfer::Slice> slices;
  for (size_t i = 0; i < flat.size(); i += kFields) {
    if (flat[i] < 0 || flat[i] >= static_cast<int64_t>(names.Length()))
      invalid(o.Env(), "slices", "tensors that exist");
    slices.push_back({names.Get(static_cast<uint32_t>(flat[i])).As<Napi::String>().Utf8Value(),
                      static_cast<int>(flat[i + 1]), static_cast<int>(flat[i + 2]), flat[i + 3], flat[i + 4],
                      flat[i + 5], flat[i + 6], flat[i + 7], flat[i + 8]});
  }
  return slices;
}

}  // namespace

Napi::Function MemoryWrap::define(Napi::Env env) {
  return DefineClass(env, "Memory",
                     {InstanceMethod<&MemoryWrap::marks>("marks"), InstanceMethod<&MemoryWrap::discard>("discard"),
                      InstanceMethod<&MemoryWrap::read>("read"), InstanceMethod<&MemoryWrap::write>("write"),
                      InstanceMethod<&MemoryWrap::close>("close")});
}

MemoryWrap::MemoryWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<MemoryWrap>(info) {
  const auto o = info[0].As<Napi::Object>();
  try {
    Memory& memory = DeviceWrap::Unwrap(objectAt(o, "device"))->rank()->workspace().memory();
    arena_ = std::make_shared<Arena>(stringAt(o, "name"), static_cast<size_t>(integerAt(o, "bytes")), nullptr, memory);
  } catch (const Error& error) {
    throw toJavaScript(info.Env(), error.code(), error.what());
  }
}

std::shared_ptr<Arena> MemoryWrap::arena(Napi::Env env) const {
  if (arena_ == nullptr) throw toJavaScript(env, "CLOSED", "the memory is closed");
  return arena_;
}

// {planned, highWater, resident} in bytes
Napi::Value MemoryWrap::marks(const Napi::CallbackInfo& info) {
  const auto memory = arena(info.Env());
  auto out = Napi::Object::New(info.Env());
  out.Set("planned", static_cast<double>(memory->planned()));
  out.Set("highWater", static_cast<double>(memory->highWater()));
  out.Set("resident", static_cast<double>(memory->resident()));
  return out;
}

// discard(device, [offset, bytes, ...]): on the device's thread, after the calls before
Napi::Value MemoryWrap::discard(const Napi::CallbackInfo& info) {
  const auto ranges = info[1].As<Napi::Array>();
  std::vector<size_t> flat;
  for (uint32_t i = 0; i < ranges.Length(); ++i)
    flat.push_back(static_cast<size_t>(ranges.Get(i).As<Napi::Number>().Int64Value()));
  auto work = [memory = arena(info.Env()), flat] {
    for (size_t i = 0; i + 1 < flat.size(); i += 2) memory->discard(flat[i], flat[i + 1]);
  };
  return DeviceWrap::Unwrap(info[0].As<Napi::Object>())->rank()->call(info.Env(), work, [](Napi::Env env) {
    return env.Undefined();
  });
}

// read(offset, bytes): a copy; for tests
Napi::Value MemoryWrap::read(const Napi::CallbackInfo& info) {
  const auto offset = static_cast<size_t>(info[0].As<Napi::Number>().Int64Value());
  const auto bytes = static_cast<size_t>(info[1].As<Napi::Number>().Int64Value());
  auto out = Napi::Uint8Array::New(info.Env(), bytes);
  try {
    const auto memory = arena(info.Env());
    memory->memory().toHost(out.Data(), static_cast<char*>(memory->at(0, offset + bytes, "what is read")) + offset,
                            bytes);
  } catch (const Error& error) {
    throw toJavaScript(info.Env(), error.code(), error.what());
  }
  return out;
}

// write(offset, Uint8Array); for tests
Napi::Value MemoryWrap::write(const Napi::CallbackInfo& info) {
  const auto offset = static_cast<size_t>(info[0].As<Napi::Number>().Int64Value());
  const auto data = info[1].As<Napi::Uint8Array>();
  try {
    const auto memory = arena(info.Env());
    void* to = memory->at(0, offset + data.ByteLength(), "what is written");
    memory->memory().fromHost(static_cast<char*>(to) + offset, data.Data(), data.ByteLength());
  } catch (const Error& error) {
    throw toJavaScript(info.Env(), error.code(), error.what());
  }
  return info.Env().Undefined();
}

// Frees it when nothing uses it any more. Idempotent.
Napi::Value MemoryWrap::close(const Napi::CallbackInfo& info) {
  arena_.reset();
  return info.Env().Undefined();
}

Napi::Function TransferWrap::define(Napi::Env env) {
  return DefineClass(env, "Transfer",
                     {InstanceMethod<&TransferWrap::run>("run"), InstanceMethod<&TransferWrap::verify>("verify"),
                      InstanceMethod<&TransferWrap::close>("close")});
}

TransferWrap::TransferWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<TransferWrap>(info) {
  rank_ = DeviceWrap::Unwrap(info[0].As<Napi::Object>())->rank();
  const auto o = info[1].As<Napi::Object>();
  const std::vector<int64_t> named = integersAt(o, "ranks");
  std::shared_ptr<comm::Communicator> group;
  if (has(o, "group")) group = takeHandle(objectAt(o, "group"), *rank_);
  try {
    transfer_ =
        std::make_shared<transfer::Transfer>(std::move(group), memoryAt(o, "source"), memoryAt(o, "destination"),
                                             readSlices(o), std::vector<int>(named.begin(), named.end()));
  } catch (const Error& error) {
    throw toJavaScript(info.Env(), error.code(), error.what());
  }
  Value().Set("gathers", transfer_->gathers());
}

std::shared_ptr<transfer::Transfer> TransferWrap::open(Napi::Env env) const {
  if (transfer_ == nullptr) throw toJavaScript(env, "CLOSED", "the transfer is closed");
  return transfer_;
}

// run(check): resolves to {receivedBytes, sentBytes, moveSeconds, checkSeconds} when the rank has its slices
Napi::Value TransferWrap::run(const Napi::CallbackInfo& info) {
  auto result = std::make_shared<transfer::TransferResult>();
  auto work = [rank = rank_, transfer = open(info.Env()), check = info[0].As<Napi::Boolean>().Value(), result] {
    transfer->connect([&](auto group) { return rank->connect(std::move(group)); });
    *result = transfer->run(rank->queue(), check);
  };
  return rank_->call(info.Env(), work, [result](Napi::Env env) {
    auto out = Napi::Object::New(env);
    out.Set("receivedBytes", static_cast<double>(result->receivedBytes));
    out.Set("sentBytes", static_cast<double>(result->sentBytes));
    out.Set("moveSeconds", result->moveSeconds);
    out.Set("checkSeconds", result->checkSeconds);
    return out;
  });
}

// verify(): rejects when what the last checked run sent has changed since
Napi::Value TransferWrap::verify(const Napi::CallbackInfo& info) {
  auto work = [rank = rank_, transfer = open(info.Env())] { transfer->verify(rank->queue()); };
  return rank_->call(info.Env(), work, [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value TransferWrap::close(const Napi::CallbackInfo& info) {
  transfer_.reset();
  return info.Env().Undefined();
}

}  // namespace lockstep::binding
