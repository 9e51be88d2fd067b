#include "model/workspace.h"

#include <utility>

#include "core/error.h"

namespace lockstep::model {

Workspace::Workspace(Arena& arena, const std::vector<BufferSpec>& plan) : arena_(&arena) {
  auto buffers = std::make_shared<std::unordered_map<std::string, BufferSpec>>();
  for (const BufferSpec& buffer : plan) buffers->emplace(buffer.name, buffer);
  buffers_ = std::move(buffers);
}

const BufferSpec& Workspace::find(const std::string& name, int64_t layer) const {
  auto found = layer == kAbsent ? buffers_->end() : buffers_->find(name + "." + std::to_string(layer));
  if (found == buffers_->end()) found = buffers_->find(name);
  if (found == buffers_->end()) throw Error("MEMORY_PLAN", "the plan of this call has no buffer '" + name + "'");
  return found->second;
}

int64_t Workspace::bytes(const std::string& name) const {
  return find(name, kAbsent).bytes;
}

void* Workspace::take(const std::string& name, int64_t layer, int64_t bytes) const {
  const BufferSpec& buffer = find(name, layer);
  if (bytes > buffer.bytes) {
    throw Error("MEMORY_PLAN", "buffer '" + buffer.name + "' is planned with " + std::to_string(buffer.bytes) +
                                   " bytes, " + std::to_string(bytes) + " are needed");
  }
  return arena_->at(static_cast<size_t>(buffer.offset), static_cast<size_t>(bytes), buffer.name.c_str());
}

}  // namespace lockstep::model
