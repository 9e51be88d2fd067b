// NCCL as a table of functions found at run time, so that the addon builds and loads without it. Names, types and
// numbers are its stable binary interface. Two makers of tables: the loader (nccl_api.cpp), and ranks of one process
// with emulated GPUs (cuda/emulation/fake_nccl.h).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <limits>
#include <string>

#include "comm/nccl/nccl.h"

namespace lockstep::comm::nccl {

struct UniqueId {
  char bytes[128];
};
using Comm = struct ncclComm*;
using Result = int;
constexpr Result kSuccess = 0, kSystemError = 2, kInternalError = 3, kInvalidArgument = 4, kInvalidUsage = 5,
                 kInProgress = 7;
using Type = int;
constexpr Type kBytes = 1;  // ncclUint8: everything is moved, nothing is summed

// What all versions' ncclConfig_t begins with: a library reads `size` bytes, and as many members as `version` had.
// Communicators do not block: a call that waits for other ranks returns kInProgress, commGetAsyncError says when it is
// done, and commAbort ends it.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef, version = 21700;
  int blocking = 0;
  int clusterSize = std::numeric_limits<int>::min();  // the library's choice
};
static_assert(sizeof(Config) == 24);

struct Api {
  Result (*getVersion)(int*) = nullptr;
  Result (*getUniqueId)(UniqueId*) = nullptr;
  Result (*commInitRankConfig)(Comm*, int ranks, UniqueId, int rank, Config*) = nullptr;
  Result (*commDestroy)(Comm) = nullptr;
  Result (*commAbort)(Comm) = nullptr;
  Result (*commGetAsyncError)(Comm, Result*) = nullptr;
  const char* (*getErrorString)(Result) = nullptr;
  Result (*allGather)(const void* send, void* receive, size_t sendCount, Type, Comm, cudaStream_t) = nullptr;
  Result (*broadcast)(const void* send, void* receive, size_t count, Type, int root, Comm, cudaStream_t) = nullptr;
  Result (*send)(const void*, size_t count, Type, int to, Comm, cudaStream_t) = nullptr;
  Result (*receive)(void*, size_t count, Type, int from, Comm, cudaStream_t) = nullptr;
  Result (*groupStart)() = nullptr;
  Result (*groupEnd)() = nullptr;
};

struct Library {
  Api api;
  NcclStatus status;
  std::string code;  // of the error that status.problem is: NCCL_UNAVAILABLE or NCCL_VERSION
};

// Looks for libnccl.so.2: LOCKSTEP_NCCL_PATH and nothing else where that is set; what the process has loaded already;
// the dynamic linker's places; wheels of the Python environment that is active; the CUDA toolkit. The first that is
// there counts.
Library load();

// What this build uses, found once.
const Library& library();

// Throws library().code when there is no NCCL.
const Api& api();

// Throws Error("NCCL_FAILED") unless it went well or goes on.
void check(Result, const char* what);

// Calls that NCCL takes as one.
class Group {
 public:
  explicit Group(const Api& api) : api_(api) { check(api_.groupStart(), "beginning a group"); }
  ~Group() {
    if (open_) api_.groupEnd();
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  void end() {
    open_ = false;
    check(api_.groupEnd(), "starting a group");
  }

 private:
  const Api& api_;
  bool open_ = true;
};

}  // namespace lockstep::comm::nccl
