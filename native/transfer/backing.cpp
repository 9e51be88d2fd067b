#include "transfer/backing.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>
#include <vector>

#include "core/error.h"

namespace lockstep::transfer {

namespace {

class HostBacking final : public Backing {
 public:
  HostBacking(const std::string& name, HostRoom& host, Memory& device) : name_(name), host_(host), device_(device) {}
  ~HostBacking() override {
    for (auto& [offset, chunk] : chunks_) host_.give(std::move(chunk));
  }

  void put(size_t offset, const char* from, size_t bytes) override {
    HostRoom::Chunk chunk = host_.take(bytes, "keeping '" + name_ + "' in host memory");
    try {
      device_.toHost(chunk->data(), from, bytes);
    } catch (...) {
      host_.give(std::move(chunk));
      throw;
    }
    chunks_.insert_or_assign(offset, std::move(chunk));
  }

  void take(size_t offset, char* to, size_t bytes) override {
    const auto at = chunks_.find(offset);
    if (at == chunks_.end() || at->second->planned() != bytes)
      throw Error("INTERNAL", "'" + name_ + "' is taken back by other chunks than it was given in");
    device_.fromHost(to, at->second->data(), bytes);
    host_.give(std::move(at->second));
    chunks_.erase(at);
  }

 private:
  std::string name_;
  HostRoom& host_;
  Memory& device_;
  std::map<size_t, HostRoom::Chunk> chunks_;  // by offset
};

class FileBacking final : public Backing {
 public:
  FileBacking(const std::string& name, size_t bytes, const std::string& folder, Memory& device) : device_(device) {
    static std::atomic<int> count{0};
    path_ = folder + "/.offload-" + std::to_string(getpid()) + "-" + std::to_string(count++) + "-" + name;
    file_ = open(path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file_ < 0) fail("cannot be made");
    unlink(path_.c_str());
    // Room for all of it now: a full disk is told before a byte has left the device. A file system that cannot say
    // tells when it is written.
    if (fallocate(file_, 0, 0, static_cast<off_t>(bytes)) != 0 && errno != EOPNOTSUPP && errno != ENOSYS) {
      const int reason = errno;
      close(file_);
      errno = reason;
      fail("has no room for " + std::to_string(bytes) + " bytes");
    }
  }
  ~FileBacking() override { close(file_); }

  void put(size_t offset, const char* from, size_t bytes) override {
    if (!device_.isHost()) {
      passing_.resize(bytes);
      device_.toHost(passing_.data(), from, bytes);
      from = passing_.data();
    }
    each(offset, bytes, "cannot be written",
         [&](size_t at, size_t left) { return pwrite(file_, from + (at - offset), left, static_cast<off_t>(at)); });
  }

  void take(size_t offset, char* to, size_t bytes) override {
    passing_.resize(device_.isHost() ? 0 : bytes);
    char* const into = device_.isHost() ? to : passing_.data();
    each(offset, bytes, "cannot be read back",
         [&](size_t at, size_t left) { return pread(file_, into + (at - offset), left, static_cast<off_t>(at)); });
    if (into != to) device_.fromHost(to, into, bytes);
  }

 private:
  // Calls move(at, left) until all bytes have moved.
  template <class Move>
  void each(size_t offset, size_t bytes, const char* problem, const Move& move) {
    for (size_t done = 0; done < bytes;) {
      const ssize_t moved = move(offset + done, bytes - done);
      if (moved < 0 && errno == EINTR) continue;
      if (moved == 0) errno = EIO;
      if (moved <= 0) fail(problem);
      done += static_cast<size_t>(moved);
    }
  }

  [[noreturn]] void fail(const std::string& problem) {
    throw Error("OFFLOAD_FILE", path_ + ": the file " + problem + ": " + std::strerror(errno) +
                                    "; free space, or keep state in host memory (memory.offload: host)");
  }

  Memory& device_;
  std::string path_;
  int file_ = -1;
  std::vector<char> passing_;  // on the way between a GPU and the file
};

}  // namespace

std::unique_ptr<Backing> hostBacking(const std::string& name, HostRoom& host, Memory& device) {
  return std::make_unique<HostBacking>(name, host, device);
}

std::unique_ptr<Backing> fileBacking(const std::string& name, size_t bytes, const std::string& folder, Memory& device) {
  return std::make_unique<FileBacking>(name, bytes, folder, device);
}

}  // namespace lockstep::transfer
