// A rank as JavaScript holds it: the native thread with its kernels, threads and workspace, and the door through which
// calls cross. `work` runs on the rank's thread and touches no JavaScript value; `finish` runs on the JavaScript thread
// and makes one. Errors cross as exceptions with a `code`.
#pragma once

#include <napi.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/queue.h"
#include "core/rank_thread.h"
#include "kernels/kernels.h"
#include "model/model.h"

namespace lockstep::binding {

struct RankOptions {
  int threads;
  size_t scratchBytes;
  std::string implementation;  // "cpu" or "reference"
  std::string isa;             // "" for the best one
  bool poison;
};

class Rank : public std::enable_shared_from_this<Rank> {
 public:
  Rank(Napi::Env, const RankOptions&);
  ~Rank();

  // Runs work on the rank's thread; the promise resolves to finish(env) or rejects with the error of either.
  Napi::Promise call(Napi::Env, std::function<void()> work, std::function<Napi::Value(Napi::Env)> finish);

  // The same on a thread beside it, which files are written from.
  Napi::Promise callSaver(Napi::Env, std::function<void()> work, std::function<Napi::Value(Napi::Env)> finish);
  // Started when it is first asked for; from the JavaScript thread.
  RankThread& saver();

  // From the rank's thread: runs `visit` on the JavaScript thread, without waiting for it.
  void notify(std::function<void(Napi::Env)> visit);

  // Called by close() before it waits for what runs, from the closing thread: ends waits for other ranks.
  void onClose(std::function<void()> hook) { hooks_.push_back(std::move(hook)); }

  // Cancels what runs, waits for it, ends the thread. Idempotent; any thread but the rank's.
  void close();
  bool closed() const { return closed_; }

  model::Device device() { return {*kernels_, *queue_, workspace_, thread_.cancelled(), workspaceUse_}; }
  const kernels::Kernels& kernels() const { return *kernels_; }
  Queue& queue() { return *queue_; }
  Arena& workspace() { return workspace_; }
  bool poison() const { return poison_; }

 private:
  struct Call;
  Napi::Promise callOn(RankThread&, Napi::Env, std::function<void()> work,
                       std::function<Napi::Value(Napi::Env)> finish);
  static void complete(Napi::Env, Call*);
  static void atExit(void* rank);

  const kernels::Kernels* kernels_;
  bool poison_;
  int64_t workspaceUse_ = 0;
  Arena workspace_;
  std::unique_ptr<Queue> queue_;
  napi_env env_;
  Napi::ThreadSafeFunction door_;
  int pending_ = 0;
  std::vector<std::function<void()>> hooks_;
  std::atomic<bool> closed_{false};
  bool hooked_ = true;
  RankThread thread_;
  std::unique_ptr<RankThread> saver_;
};

Napi::Error toJavaScript(Napi::Env, const std::string& code, const std::string& message);

}  // namespace lockstep::binding
