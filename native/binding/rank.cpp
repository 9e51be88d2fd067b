#include "binding/rank.h"

#include "comm/nccl/nccl.h"
#include "core/error.h"
#include "core/work_clock.h"
#include "cuda/backend.h"

namespace lockstep::binding {

struct Rank::Call {
  std::shared_ptr<Rank> rank;
  std::function<void()> work;
  std::function<Napi::Value(Napi::Env)> finish;
  Napi::Promise::Deferred deferred;
  std::string code, message;
  WorkTimes times;
};

namespace {

void giveSeconds(Napi::Object to, const char* name, int64_t nanoseconds) {
  to.Set(name, static_cast<double>(nanoseconds) * 1e-9);
}

// [{gpu, stream, begin, end, busy, bytes}]
Napi::Array streamsOf(Napi::Env env, int gpu, const std::vector<StreamWork>& works) {
  constexpr const char* kNames[] = {"compute", "to host", "from host"};
  auto result = Napi::Array::New(env, works.size());
  for (uint32_t i = 0; i < works.size(); ++i) {
    auto work = Napi::Object::New(env);
    work.Set("gpu", gpu);
    work.Set("stream", kNames[static_cast<size_t>(works[i].stream)]);
    giveSeconds(work, "begin", works[i].begin);
    giveSeconds(work, "end", works[i].end);
    giveSeconds(work, "busy", works[i].busy);
    work.Set("bytes", static_cast<double>(works[i].bytes));
    result.Set(i, work);
  }
  return result;
}

// {value, begin, end, communicating, waiting, streams} in seconds, begin and end of the clock of process.hrtime();
// streams on a GPU only.
Napi::Object timed(Napi::Env env, Napi::Value value, int gpu, const WorkTimes& times) {
  auto result = Napi::Object::New(env);
  result.Set("value", value);
  giveSeconds(result, "begin", times.begin);
  giveSeconds(result, "end", times.end);
  giveSeconds(result, "communicating", times.communicating);
  giveSeconds(result, "waiting", times.waiting);
  if (gpu >= 0) result.Set("streams", streamsOf(env, gpu, times.streams));
  return result;
}

const kernels::Kernels* kernelsOf(const RankOptions& options) {
  if (options.implementation == "reference") return &kernels::referenceKernels();
  return options.implementation == "cuda" ? &kernels::cudaKernels() : &kernels::cpuKernels(options.isa.c_str());
}

}  // namespace

Napi::Error toJavaScript(Napi::Env env, const std::string& code, const std::string& message) {
  Napi::Error error = Napi::Error::New(env, message);
  error.Set("code", Napi::String::New(env, code));
  return error;
}

Rank::Rank(Napi::Env env, const RankOptions& options)
    : options_(options),
      kernels_(kernelsOf(options)),
      poison_(options.poison),
      memory_("memory.device", MemorySpace::kUnbounded),
      host_("memory.host", options.hostBytes, deviceMemory()),
      workspace_("workspace", 0, &memory_, deviceMemory()),
      queue_(gpu() < 0 ? std::make_unique<Queue>(options.threads, options.scratchBytes)
                       : cuda::makeQueue(gpu(), options.threads, 0)),
      env_(env),
      door_(Napi::ThreadSafeFunction::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}),
                                          "lockstep rank", 0, 1)) {
  // An idle rank does not keep the process alive.
  door_.Unref(env);
  napi_add_env_cleanup_hook(env_, &Rank::atExit, this);
}

Memory& Rank::deviceMemory() const {
  return gpu() < 0 ? hostMemory() : cuda::memoryOf(gpu());
}

Rank::~Rank() {
  if (hooked_) napi_remove_env_cleanup_hook(env_, &Rank::atExit, this);
  close();
}

std::shared_ptr<comm::Communicator> Rank::connect(std::shared_ptr<comm::Communicator> group) {
  if (gpu() < 0 || group == nullptr) return group;
  const comm::Computation own = comm::computationOf(*queue_);
  const auto mark = [this, own]() -> std::function<void()> { return [this, given = own.mark()] { whileOpen(given); }; };
  return comm::overNccl(std::move(group), gpu(), {[this, own] { whileOpen(own.settle); }, mark});
}

void Rank::whileOpen(const std::function<void()>& wait) {
  const std::shared_lock lock(queueMutex_);
  if (queueClosed_) throw Error("CLOSED", "the device is closed");
  wait();
}

void Rank::atExit(void* rank) {
  auto* self = static_cast<Rank*>(rank);
  self->hooked_ = false;
  self->close();
}

void Rank::close() {
  if (closed_.exchange(true)) return;
  for (const auto& hook : hooks_) hook();
  thread_.close();
  for (RankThread* beside : {saver_.get(), transfer_.get()}) {
    if (beside != nullptr) beside->close();
  }
  {
    const std::lock_guard lock(queueMutex_);
    queueClosed_ = true;
    queue_->close();
  }
  workspace_.release();
  host_.close();
  door_.Release();
}

Napi::Promise Rank::call(Napi::Env env, std::function<void()> work, std::function<Napi::Value(Napi::Env)> finish) {
  return callOn(thread_, env, std::move(work), std::move(finish));
}

Napi::Promise Rank::callSaver(Napi::Env env, std::function<void()> work, std::function<Napi::Value(Napi::Env)> finish) {
  return callOn(saver(), env, std::move(work), std::move(finish));
}

RankThread& Rank::saver() {
  if (!saver_) saver_ = std::make_unique<RankThread>();
  return *saver_;
}

Napi::Promise Rank::transfer(Napi::Env env, std::function<void()> work, std::function<Napi::Value(Napi::Env)> finish) {
  if (transfer_ == nullptr && !closed_) transfer_ = std::make_unique<RankThread>();
  return callOn(transfer_ == nullptr ? thread_ : *transfer_, env, std::move(work), std::move(finish));
}

void Rank::trim(size_t bytes) {
  workspace_.trim(bytes);
  ++workspaceUse_;
}

std::shared_future<void> Rank::after(std::function<void()> work) {
  const auto task = std::make_shared<std::packaged_task<void()>>(std::move(work));
  auto done = task->get_future().share();
  if (thread_.post([task] { (*task)(); })) return done;
  return {};
}

Napi::Promise Rank::callOn(RankThread& thread, Napi::Env env, std::function<void()> work,
                           std::function<Napi::Value(Napi::Env)> finish) {
  if (closed_) {  // the door is gone: nothing may touch it
    const auto refused = Napi::Promise::Deferred::New(env);
    refused.Reject(toJavaScript(env, "CLOSED", "the device is closed").Value());
    return refused.Promise();
  }
  auto* call =
      new Call{shared_from_this(), std::move(work), std::move(finish), Napi::Promise::Deferred::New(env), {}, {}, {}};
  const Napi::Promise promise = call->deferred.Promise();
  if (pending_++ == 0) door_.Ref(env);
  thread.post([call] {
    WorkClock::begin();
    try {
      call->work();
    } catch (const Error& error) {
      call->code = error.code();
      call->message = error.what();
    } catch (const std::bad_alloc&) {
      call->code = "OUT_OF_MEMORY";
      call->message = "the system refused memory";
    } catch (const std::exception& error) {
      call->code = "INTERNAL";
      call->message = error.what();
    }
    WorkClock::end();
    call->times = WorkClock::take();
    call->work = nullptr;
    // Refused only when the environment is going away: nobody waits then, and its values may not be touched.
    call->rank->door_.NonBlockingCall(call, [](Napi::Env env, Napi::Function, Call* done) { complete(env, done); });
  });
  return promise;
}

void Rank::complete(Napi::Env env, Call* call) {
  if (static_cast<napi_env>(env) == nullptr) return;  // closing; the process is about to go
  const std::unique_ptr<Call> owned(call);
  const Napi::HandleScope scope(env);
  if (--call->rank->pending_ == 0 && !call->rank->closed_) call->rank->door_.Unref(env);
  if (!call->message.empty()) {
    call->deferred.Reject(toJavaScript(env, call->code, call->message).Value());
    return;
  }
  try {
    call->deferred.Resolve(timed(env, call->finish(env), call->rank->gpu(), call->times));
  } catch (const Napi::Error& error) {
    call->deferred.Reject(error.Value());
  }
}

void Rank::notify(std::function<void(Napi::Env)> visit) {
  auto* held = new std::function<void(Napi::Env)>(std::move(visit));
  const auto run = [](Napi::Env env, Napi::Function, std::function<void(Napi::Env)>* owned) {
    const std::unique_ptr<std::function<void(Napi::Env)>> guard(owned);
    if (static_cast<napi_env>(env) == nullptr) return;
    const Napi::HandleScope scope(env);
    (*owned)(env);
  };
  if (door_.NonBlockingCall(held, run) != napi_ok) delete held;
}

}  // namespace lockstep::binding
