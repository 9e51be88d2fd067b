#include "comm/nccl/nccl_api.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <vector>

#include "build.h"
#include "core/error.h"
#include "cuda/emulation/fake_nccl.h"

namespace lockstep::comm::nccl {

namespace {

namespace fs = std::filesystem;

constexpr const char* kName = "libnccl.so.2";
constexpr int kLeastVersion = 22600;
constexpr bool kEmulated = std::string_view(cuda::kBuild) == "emulated";

std::string versionText(int version) {
  const int major = version < 10000 ? version / 1000 : version / 10000;
  const int minor = version < 10000 ? version / 100 % 10 : version / 100 % 100;
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(version % 100);
}

std::string setting(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// Where pip and conda, and the toolkit, put the library.
std::vector<std::string> folders() {
  std::vector<std::string> found;
  for (const char* name : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    const std::string root = setting(name);
    if (root.empty()) continue;
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator(fs::path(root) / "lib", ignored)) {
      const bool python = entry.path().filename().string().starts_with("python3");
      if (python) found.push_back((entry.path() / "site-packages/nvidia/nccl/lib").string());
    }
    found.push_back(root + "/lib");
  }
  for (const char* name : {"CUDA_PATH", "CUDA_HOME"}) {
    const std::string root = setting(name);
    if (!root.empty()) found.insert(found.end(), {root + "/lib64", root + "/lib"});
  }
  return found;
}

std::string lastError() {
  const char* const text = dlerror();
  return text == nullptr ? "the dynamic linker does not say why" : text;
}

// The handle, or null and why.
void* open(std::string& problem) {
  constexpr int kHow = RTLD_NOW | RTLD_LOCAL;
  constexpr const char* kAdvice =
      "; install it (pip install nvidia-nccl-cu13, or the package libnccl2), or set LOCKSTEP_NCCL_PATH to a "
      "libnccl.so.2";
  if (const std::string path = setting("LOCKSTEP_NCCL_PATH"); !path.empty()) {
    void* const handle = dlopen(path.c_str(), kHow);
    if (handle == nullptr) {
      problem = "LOCKSTEP_NCCL_PATH is " + path + ", and that can not be loaded: " + lastError() +
                "; set it to a libnccl.so.2, or unset it";
    }
    return handle;
  }
  if (void* const handle = dlopen(kName, kHow | RTLD_NOLOAD)) return handle;
  if (void* const handle = dlopen(kName, kHow)) return handle;
  std::string why = lastError();
  for (const std::string& folder : folders()) {
    const std::string path = folder + "/" + kName;
    std::error_code ignored;
    if (!fs::exists(path, ignored)) continue;
    if (void* const handle = dlopen(path.c_str(), kHow)) return handle;
    why = lastError();
  }
  problem = "there is no NCCL here: " + why + kAdvice;
  return nullptr;
}

template <class Function>
bool find(void* handle, Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  return function != nullptr;
}

}  // namespace

Library load() {
  Library found;
  found.code = "NCCL_UNAVAILABLE";
  std::string& problem = found.status.problem;
  // Memory made of pages is open to its own GPU only, and NCCL would have other ranks of the process write to it. It
  // reads this when it is first used.
  setenv("NCCL_P2P_DIRECT_DISABLE", "1", 0);
  // Kernels of communicators on one GPU begin in the order in which they were started (comm/nccl/launch_order.h).
  setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", 0);
  void* const handle = open(problem);
  if (handle == nullptr) return found;
  Api& api = found.api;
  Dl_info where{};
  int version = 0;
  if (!find(handle, api.getVersion, "ncclGetVersion") || api.getVersion(&version) != kSuccess) {
    problem =
        "a library of the name is there, but does not say its version as NCCL does; set LOCKSTEP_NCCL_PATH to a "
        "libnccl.so.2 of NCCL 2.26 or newer";
    return found;
  }
  const bool named = dladdr(reinterpret_cast<void*>(api.getVersion), &where) != 0 && where.dli_fname != nullptr;
  found.status.path = named ? where.dli_fname : kName;
  found.status.version = versionText(version);
  const std::string what = "NCCL " + found.status.version + " (" + found.status.path + ")";
  if (version < kLeastVersion) {
    found.code = "NCCL_VERSION";
    problem = "found " + what + ", needed 2.26 or newer; update it (pip install -U nvidia-nccl-cu13, or the package " +
              "libnccl2), or set LOCKSTEP_NCCL_PATH to a newer libnccl.so.2";
    return found;
  }
  std::string missing;
  const auto need = [&](auto& function, const char* name) {
    if (!find(handle, function, name)) missing += (missing.empty() ? "" : ", ") + std::string(name);
  };
  need(api.getUniqueId, "ncclGetUniqueId");
  need(api.commInitRankConfig, "ncclCommInitRankConfig");
  need(api.commDestroy, "ncclCommDestroy");
  need(api.commAbort, "ncclCommAbort");
  need(api.commGetAsyncError, "ncclCommGetAsyncError");
  need(api.getErrorString, "ncclGetErrorString");
  need(api.allGather, "ncclAllGather");
  need(api.broadcast, "ncclBroadcast");
  need(api.send, "ncclSend");
  need(api.receive, "ncclRecv");
  need(api.groupStart, "ncclGroupStart");
  need(api.groupEnd, "ncclGroupEnd");
  if (!missing.empty()) problem = what + " lacks " + missing + "; install a complete one of 2.26 or newer";
  return found;
}

const Library& library() {
  static const Library found = [] {
    if constexpr (kEmulated) {
      return fakeLibrary();
    } else {
      return load();
    }
  }();
  return found;
}

const Api& api() {
  const Library& found = library();
  if (!found.status.problem.empty()) throw Error(found.code, found.status.problem);
  return found.api;
}

void check(Result result, const char* what) {
  if (result == kSuccess || result == kInProgress) return;
  const char* const text = library().api.getErrorString(result);
  throw Error("NCCL_FAILED", std::string(what) + ": NCCL says: " + text +
                                 "; run again with NCCL_DEBUG=WARN in the environment to see more");
}

}  // namespace lockstep::comm::nccl

namespace lockstep::comm {

NcclStatus ncclStatus() {
  try {
    return nccl::library().status;
  } catch (const std::exception& error) {
    return {"", "", error.what()};
  }
}

}  // namespace lockstep::comm
