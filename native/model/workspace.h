// The buffers of one call by name, as planned: activations, KV pages, staging. Plans of different calls and models use
// the same arena in turn. Copies are cheap.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/arena.h"
#include "core/view.h"
#include "model/spec.h"

namespace lockstep::model {

class Workspace {
 public:
  Workspace() = default;
  Workspace(Arena& arena, const std::vector<BufferSpec>& plan);

  // `name` of layer l: the layer's own buffer "name.l" when the plan has one, else the shared "name".
  void* take(const std::string& name, int64_t layer, int64_t bytes) const;
  void* take(const std::string& name, int64_t bytes) const { return take(name, kAbsent, bytes); }
  int64_t bytes(const std::string& name) const;

  View<float> f32(const std::string& name, int64_t layer, int64_t rows, int64_t cols) const {
    return dense(static_cast<float*>(take(name, layer, rows * cols * 4)), rows, cols);
  }
  Operand operand(const std::string& name, int64_t layer, DType dtype, int64_t rows, int64_t cols) const {
    return denseOperand(take(name, layer, rows * cols * static_cast<int64_t>(bytesOf(dtype))), dtype, rows, cols);
  }

 private:
  const BufferSpec& find(const std::string& name, int64_t layer) const;

  Arena* arena_ = nullptr;
  std::shared_ptr<const std::unordered_map<std::string, BufferSpec>> buffers_;
};

}  // namespace lockstep::model
