#include "core/arena.h"

#include <algorithm>

#include "core/error.h"

namespace lockstep {

namespace {

constexpr size_t kAlignment = 64;

}  // namespace

Arena::Arena(std::string name, size_t bytes, MemorySpace* space, Memory& memory)
    : name_(std::move(name)), space_(space), memory_(memory) {
  reserve(bytes);
}

Arena::~Arena() {
  release();
}

void Arena::release() {
  if (data_ != nullptr) memory_.unmap(data_, mapped_);
  data_ = nullptr;
  mapped_ = 0;
  if (space_ != nullptr) space_->give(counted_);
  counted_ = 0;
}

void Arena::refuse(size_t bytes) const {
  throw Error("OUT_OF_MEMORY", "arena '" + name_ + "': " + (memory_.isHost() ? "the system" : memory_.name()) +
                                   " refused " + std::to_string(bytes) +
                                   " bytes; use a smaller model, batch.microTokens or memory.device");
}

void Arena::reserve(size_t bytes) {
  bytes_ = bytes;
  if (bytes <= mapped_) return discard(bytes, mapped_ - bytes);
  release();
  if (space_ != nullptr) space_->take(bytes, "arena '" + name_ + "'");
  counted_ = bytes;
  const size_t grain = memory_.grain(), mapped = (bytes + grain - 1) / grain * grain;
  data_ = memory_.map(mapped);
  if (data_ == nullptr) refuse(mapped);
  mapped_ = mapped;
}

void Arena::trim(size_t bytes) {
  if (bytes >= counted_) return;
  const size_t grain = memory_.grain(), kept = bytes / grain * grain;
  if (kept < mapped_) memory_.unmap(data_ + kept, mapped_ - kept);
  if (kept == 0) data_ = nullptr;
  mapped_ = kept;
  bytes_ = std::min(bytes_, kept);
  if (space_ != nullptr) space_->give(counted_ - kept);
  counted_ = kept;
}

void Arena::setAbsent(size_t bytes) {
  const size_t before = absent_, grain = memory_.grain();
  if (bytes > before) {
    absent_ = bytes;
    // What is absent is one run from the start: the grain in which it ended before goes now, when it is whole.
    const size_t begin = before / grain * grain, end = bytes == bytes_ ? mapped_ : bytes / grain * grain;
    if (end > begin) memory_.giveBack(data_ + begin, end - begin);
    if (space_ != nullptr) space_->give(bytes - before);
    counted_ -= bytes - before;
  } else if (bytes < before) {
    if (space_ != nullptr) space_->take(before - bytes, "arena '" + name_ + "'");
    const size_t begin = bytes / grain * grain, end = std::min((before + grain - 1) / grain * grain, mapped_);
    if (!memory_.restore(data_ + begin, end - begin)) {
      if (space_ != nullptr) space_->give(before - bytes);
      refuse(before - bytes);
    }
    counted_ += before - bytes;
    absent_ = bytes;
  }
}

void Arena::discard(size_t offset, size_t bytes) const {
  // Of device memory all that an arena has stays its own: others could not take it, and getting it back costs time.
  if (!memory_.isHost()) return;
  const size_t grain = memory_.grain(), begin = (offset + grain - 1) / grain * grain;
  const size_t end = offset + bytes == bytes_ ? mapped_ : (offset + bytes) / grain * grain;
  if (end > begin) memory_.giveBack(data_ + begin, end - begin);
}

size_t Arena::resident() const {
  return memory_.resident(data_, mapped_);
}

void* Arena::at(size_t offset, size_t bytes, const char* what) {
  if (offset + bytes > bytes_ || offset % kAlignment != 0) {
    throw Error("MEMORY_PLAN", "arena '" + name_ + "': " + what + " needs bytes " + std::to_string(offset) + ".." +
                                   std::to_string(offset + bytes) + ", the plan has " + std::to_string(bytes_));
  }
  if (absent_ > 0) {
    throw Error("STATE_NOT_ON_DEVICE", "arena '" + name_ + "': " + what + " is needed, and " + std::to_string(absent_) +
                                           " of its " + std::to_string(bytes_) +
                                           " bytes are not on the device; move them there first");
  }
  highWater_ = std::max(highWater_, std::min((offset + bytes + kAlignment - 1) / kAlignment * kAlignment, bytes_));
  return data_ + offset;
}

}  // namespace lockstep
