#include "transfer/backing.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <vector>

#include "core/arena.h"
#include "core/error.h"

namespace lockstep::transfer {

namespace {

class HostBacking final : public Backing {
 public:
  HostBacking(const std::string& name, size_t bytes, MemorySpace& host, Memory& device)
      : name_(name), memory_(name, bytes), host_(host), device_(device) {
    if (bytes > 0) device_.pin(memory_.data(), bytes);
  }
  ~HostBacking() override {
    if (memory_.planned() > 0) device_.unpin(memory_.data());
    host_.give(held_);
  }

  void put(size_t offset, const char* from, size_t bytes) override {
    host_.take(bytes, "keeping '" + name_ + "' in host memory");
    held_ += bytes;
    device_.toHost(memory_.data() + offset, from, bytes);
  }

  void take(size_t offset, char* to, size_t bytes) override {
    device_.fromHost(to, memory_.data() + offset, bytes);
    if (device_.isHost()) memory_.discard(offset, bytes);
    host_.give(bytes);
    held_ -= bytes;
  }

 private:
  std::string name_;
  Arena memory_;
  MemorySpace& host_;
  Memory& device_;
  size_t held_ = 0;
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

std::unique_ptr<Backing> hostBacking(const std::string& name, size_t bytes, MemorySpace& host, Memory& device) {
  return std::make_unique<HostBacking>(name, bytes, host, device);
}

std::unique_ptr<Backing> fileBacking(const std::string& name, size_t bytes, const std::string& folder, Memory& device) {
  return std::make_unique<FileBacking>(name, bytes, folder, device);
}

}  // namespace lockstep::transfer
