#include "model/kv_cache.h"

namespace lockstep::model {

PagePool::PagePool(Queue& queue, void* data, kernels::KvPages shape, int64_t layers, int64_t pages, bool poison)
    : queue_(queue),
      data_(static_cast<char*>(data)),
      layers_(layers),
      pages_(pages),
      pageBytes_(shape.pageElements() * static_cast<int64_t>(bytesOf(shape.dtype))),
      dtype_(shape.dtype),
      poison_(poison),
      owners_(static_cast<size_t>(pages), 0) {
  for (int64_t page = pages - 1; page >= 0; --page) {
    free_.push_back(static_cast<int32_t>(page));
    if (poison_) {
      owners_[static_cast<size_t>(page)] = 1;
      free_.pop_back();
      release(static_cast<int32_t>(page));
    }
  }
}

char* PagePool::at(int64_t layer, int32_t page) const {
  return data_ + (layer * pages_ + page) * pageBytes_;
}

int32_t PagePool::allocate() {
  if (free_.empty()) return kNone;
  const int32_t page = free_.back();
  free_.pop_back();
  owners_[static_cast<size_t>(page)] = 1;
  return page;
}

void PagePool::release(int32_t page) {
  if (--owners_[static_cast<size_t>(page)] > 0) return;
  free_.push_back(page);
  if (!poison_) return;
  // All bits set is a NaN in float32 and in bfloat16.
  for (int64_t l = 0; l < layers_; ++l) queue_.fill(at(l, page), 0xff, static_cast<size_t>(pageBytes_));
}

void PagePool::copy(int32_t from, int32_t to) {
  for (int64_t l = 0; l < layers_; ++l) queue_.copy(at(l, to), at(l, from), static_cast<size_t>(pageBytes_));
}

}  // namespace lockstep::model
