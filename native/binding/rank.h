// A rank as JavaScript holds it: the native thread with its kernels, threads and workspace, and the door through which
// calls cross. `work` runs on the rank's thread and touches no JavaScript value; `finish` runs on the JavaScript thread
// and makes one. Errors cross as exceptions with a `code`.
#pragma once

#include <napi.h>

#include <atomic>
#include <functional>
#include <future>
#include <memory>
#include <shared_mutex>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/queue.h"
#include "core/rank_thread.h"
#include "core/memory_space.h"
#include "kernels/kernels.h"
#include "model/model.h"
#include "transfer/host_room.h"

namespace lockstep::binding {

struct RankOptions {
  int threads;
  size_t scratchBytes;
  std::string implementation;  // "cpu", "reference" or "cuda"
  std::string isa;             // of a CPU; "" for the best one
  int gpu;                     // of "cuda"
  bool poison;
  size_t hostBytes;  // budget of what is moved to host memory
};

class Rank : public std::enable_shared_from_this<Rank> {
 public:
  Rank(Napi::Env, const RankOptions&);
  ~Rank();

  // Runs work on the rank's thread; the promise resolves to {value: finish(env), and when it ran: WorkTimes} or rejects
  // with the error of either.
  Napi::Promise call(Napi::Env, std::function<void()> work, std::function<Napi::Value(Napi::Env)> finish);

  // The same on a thread beside it, which files are written from.
  Napi::Promise callSaver(Napi::Env, std::function<void()> work, std::function<Napi::Value(Napi::Env)> finish);
  // Started when it is first asked for; from the JavaScript thread.
  RankThread& saver();
  // The same on the rank's transfer thread, which moves state while the rank computes; the first call starts it.
  Napi::Promise transfer(Napi::Env, std::function<void()> work, std::function<Napi::Value(Napi::Env)> finish);

  // On the rank's thread: the workspace gives back what it has beyond `bytes`. Activations kept for backward are lost.
  void trim(size_t bytes);
  // Work on the rank's thread that comes after the calls so far, and its error; none on a device that was closed.
  std::shared_future<void> after(std::function<void()> work);

  // From the rank's thread: runs `visit` on the JavaScript thread, without waiting for it.
  void notify(std::function<void(Napi::Env)> visit);

  // Called by close() before it waits for what runs, from the closing thread: ends waits for other ranks.
  void onClose(std::function<void()> hook) { hooks_.push_back(std::move(hook)); }

  // Cancels what runs, waits for it, ends the thread. Idempotent; any thread but the rank's.
  void close();
  bool closed() const { return closed_; }

  model::Device device() { return {*kernels_, *queue_, workspace_, memory_, thread_.cancelled(), workspaceUse_}; }
  const kernels::Kernels& kernels() const { return *kernels_; }
  Queue& queue() { return *queue_; }
  Arena& workspace() { return workspace_; }
  // What the arenas of all models and the workspace hold, and what host memory holds for them.
  const MemorySpace& memory() const { return memory_; }
  transfer::HostRoom& host() { return host_; }
  const std::atomic<bool>& cancelled() const { return thread_.cancelled(); }
  bool poison() const { return poison_; }
  // The communicator for what lies on the rank's device, over one of the process: of a GPU NCCL, for which all ranks of
  // the group call this together, on their threads.
  std::shared_ptr<comm::Communicator> connect(std::shared_ptr<comm::Communicator>);
  // The GPU that it computes on; negative: on the CPU.
  int gpu() const { return options_.implementation == "cuda" ? options_.gpu : -1; }

 private:
  struct Call;
  // Waits for the queue, from threads that may outlive it: those of models that reduce gradients.
  void whileOpen(const std::function<void()>& wait);
  Napi::Promise callOn(RankThread&, Napi::Env, std::function<void()> work,
                       std::function<Napi::Value(Napi::Env)> finish);
  static void complete(Napi::Env, Call*);
  Memory& deviceMemory() const;
  static void atExit(void* rank);

  const RankOptions options_;
  const kernels::Kernels* kernels_;
  bool poison_;
  int64_t workspaceUse_ = 0;
  MemorySpace memory_;
  transfer::HostRoom host_;
  Arena workspace_;
  std::unique_ptr<Queue> queue_;
  std::shared_mutex queueMutex_;  // taken alone to close it
  bool queueClosed_ = false;
  napi_env env_;
  Napi::ThreadSafeFunction door_;
  int pending_ = 0;
  std::vector<std::function<void()>> hooks_;
  std::atomic<bool> closed_{false};
  bool hooked_ = true;
  RankThread thread_;
  std::unique_ptr<RankThread> saver_;
  std::unique_ptr<RankThread> transfer_;
};

Napi::Error toJavaScript(Napi::Env, const std::string& code, const std::string& message);

}  // namespace lockstep::binding
