// What the row-wise kernels share: walking a row 16 lanes at a time with a masked tail, operands of either dtype, and
// dealing ranges of rows to threads.
#pragma once

#include "core/queue.h"
#include "core/view.h"
#include "kernels/cpu/simd.h"
#include "kernels/math.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

// Per-row arithmetic on float32 beside that on Vec.
using kernels::fma;
using kernels::maximum;

namespace {

// How many lanes of a vector exist: all of them, or the first `count`.
struct Full {};
struct Some {
  int count;
};

template <class T>
LOCKSTEP_INLINE Vec load(const T* p, Full) {
  return loadu(p);
}
template <class T>
LOCKSTEP_INLINE Vec load(const T* p, Some some) {
  return loadPartial(p, some.count);
}
template <class T>
LOCKSTEP_INLINE void store(T* p, Vec x, Full) {
  storeu(p, x);
}
template <class T>
LOCKSTEP_INLINE void store(T* p, Vec x, Some some) {
  storePartial(p, x, some.count);
}

// `next` in the lanes that exist, `old` in the others: a lane without an element keeps its partial sum.
LOCKSTEP_INLINE Vec keep(Vec next, Vec, Full) {
  return next;
}
LOCKSTEP_INLINE Vec keep(Vec next, Vec old, Some some) {
  return select(firstLanes(some.count), next, old);
}

// body(i, lanes) for i = 0, 16, 32, ...
template <class Body>
LOCKSTEP_INLINE void eachVector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) body(i, Full{});
  if (i < count) body(i, Some{static_cast<int>(count - i)});
}

// The lanes sum of kernels.h: next(acc, i, lanes) returns acc with the elements at i added.
template <class Next>
LOCKSTEP_INLINE float lanesSum(int64_t count, const Next& next) {
  Vec acc = zero();
  eachVector(count, [&](int64_t i, auto lanes) { acc = keep(next(acc, i, lanes), acc, lanes); });
  return lanesSum(acc);
}

// body(T{}) with the element type of a dtype.
template <class Body>
LOCKSTEP_INLINE void withElement(DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) {
    body(float{});
  } else {
    body(BFloat16{});
  }
}

// Elements below which waking another thread costs more than it saves.
constexpr int64_t kRangeElements = 16384;

// body(begin, end) over ranges of `count` items of itemElements each.
template <class Body>
LOCKSTEP_INLINE void forRanges(Queue& queue, int64_t count, int64_t itemElements, const Body& body) {
  if (count <= 0) return;
  const int64_t fit = kRangeElements / (itemElements > 0 ? itemElements : 1);
  const int64_t size = fit < 1 ? 1 : fit;
  queue.pool().forEach((count + size - 1) / size, [&](int64_t range, int) {
    const int64_t begin = range * size;
    body(begin, begin + size < count ? begin + size : count);
  });
}

// body(begin, end) over ranges of columns, whole vectors each, one range per thread unless the work is small.
template <class Body>
LOCKSTEP_INLINE void forColumns(Queue& queue, int64_t rows, int64_t columns, const Body& body) {
  const int64_t vectors = (columns + 15) / 16;
  const int64_t ranges = rows * columns < kRangeElements ? 1 : queue.threads();
  queue.pool().forEach(ranges, [&](int64_t range, int) {
    const int64_t begin = range * vectors / ranges * 16, end = (range + 1) * vectors / ranges * 16;
    if (begin < end) body(begin, end < columns ? end : columns);
  });
}

}  // namespace
}  // namespace lockstep::kernels::LOCKSTEP_ISA
