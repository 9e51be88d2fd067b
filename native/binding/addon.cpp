// The addon: its classes and a few facts about the machine.
#include <napi.h>

#include "binding/device.h"
#include "binding/rank.h"
#include "binding/transfer.h"
#include "core/error.h"
#include "kernels/kernels.h"

namespace lockstep::binding {

namespace {

// instructionSet(name): the kernels that "avx2", "avx512", "avx512-bf16" or "" (best) resolves to on this CPU, after
// the self-check; throws ISA_UNSUPPORTED.
Napi::Value instructionSet(const Napi::CallbackInfo& info) {
  try {
    return Napi::String::New(info.Env(), kernels::cpuKernels(info[0].As<Napi::String>().Utf8Value().c_str()).name);
  } catch (const Error& error) {
    throw toJavaScript(info.Env(), error.code(), error.what());
  }
}

Napi::Object initialize(Napi::Env env, Napi::Object exports) {
  exports.Set("Device", DeviceWrap::define(env));
  exports.Set("World", WorldWrap::define(env));
  exports.Set("Model", ModelWrap::define(env));
  exports.Set("Memory", MemoryWrap::define(env));
  exports.Set("Transfer", TransferWrap::define(env));
  exports.Set("instructionSet", Napi::Function::New<instructionSet>(env));
  return exports;
}

}  // namespace

NODE_API_MODULE(lockstep, initialize)

}  // namespace lockstep::binding
