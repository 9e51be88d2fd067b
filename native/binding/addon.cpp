// The addon: its classes and a few facts about the machine.
#include <napi.h>

#include "binding/device.h"
#include "binding/rank.h"
#include "binding/transfer.h"
#include "core/error.h"
#include "cuda/backend.h"
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

// cuda(): {build, problem, driver, runtime, gpus: [{name, major, minor, multiprocessors, memoryBytes}]}; see
// cuda/backend.h
Napi::Value cudaStatus(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const cuda::Status status = cuda::status();
  auto out = Napi::Object::New(env);
  out.Set("build", status.build);
  out.Set("problem", status.problem);
  out.Set("driver", status.driver);
  out.Set("runtime", status.runtime);
  auto gpus = Napi::Array::New(env, status.gpus.size());
  for (uint32_t i = 0; i < gpus.Length(); ++i) {
    const cuda::Gpu& gpu = status.gpus[i];
    auto o = Napi::Object::New(env);
    o.Set("name", gpu.name);
    o.Set("major", gpu.major);
    o.Set("minor", gpu.minor);
    o.Set("multiprocessors", gpu.multiprocessors);
    o.Set("memoryBytes", static_cast<double>(gpu.memoryBytes));
    gpus.Set(i, o);
  }
  out.Set("gpus", gpus);
  return out;
}

// gpuMemory(gpu): {freeBytes, totalBytes}; see cuda/backend.h
Napi::Value gpuMemory(const Napi::CallbackInfo& info) {
  try {
    const auto [free, total] = cuda::memoryInfo(info[0].As<Napi::Number>().Int32Value());
    auto out = Napi::Object::New(info.Env());
    out.Set("freeBytes", static_cast<double>(free));
    out.Set("totalBytes", static_cast<double>(total));
    return out;
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
  exports.Set("cuda", Napi::Function::New<cudaStatus>(env));
  exports.Set("gpuMemory", Napi::Function::New<gpuMemory>(env));
  exports.Set("instructionSet", Napi::Function::New<instructionSet>(env));
  return exports;
}

}  // namespace

NODE_API_MODULE(lockstep, initialize)

}  // namespace lockstep::binding
