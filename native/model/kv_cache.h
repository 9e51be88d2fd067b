// Pages of keys and values: who owns which, and how often. Pages are shared by reference count (a common prompt is kept
// once); a page that is about to be written is owned by one sequence alone.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace lockstep::model {

class PagePool {
 public:
  // `layers` regions of `pages` pages each, starting at data. With `poison`, freed pages are filled with NaN (tests).
  PagePool(Queue& queue, void* data, kernels::KvPages shape, int64_t layers, int64_t pages, bool poison);

  int64_t free() const { return static_cast<int64_t>(free_.size()); }
  int64_t total() const { return pages_; }

  // A page with one owner, or kNone when none is free.
  int32_t allocate();
  void share(int32_t page) { ++owners_[static_cast<size_t>(page)]; }
  void release(int32_t page);
  // Copies a page's contents in every layer.
  void copy(int32_t from, int32_t to);

  static constexpr int32_t kNone = -1;

 private:
  char* at(int64_t layer, int32_t page) const;

  Queue& queue_;
  char* data_;
  int64_t layers_, pages_, pageBytes_;
  DType dtype_;
  bool poison_;
  std::vector<int32_t> free_, owners_;
};

}  // namespace lockstep::model
