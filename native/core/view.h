// Non-owning row-major matrices. A view never allocates and never checks: callers do both.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace lockstep {

// rows x cols elements; row r starts at data + r * stride.
template <class T>
struct View {
  T* data = nullptr;
  int64_t rows = 0, cols = 0, stride = 0;

  constexpr T* row(int64_t r) const { return data + r * stride; }
  constexpr bool empty() const { return data == nullptr; }
  constexpr View<T> slice(int64_t begin, int64_t count) const { return {data + begin * stride, count, cols, stride}; }
  constexpr operator View<const T>() const { return {data, rows, cols, stride}; }
};

template <class T>
View<T> dense(T* data, int64_t rows, int64_t cols) {
  return {data, rows, cols, cols};
}

// A matrix in the compute dtype: an operand of a matrix product, rounded once where it was produced.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, cols = 0, stride = 0;  // in elements

  template <class T>
  constexpr T* row(int64_t r) const {
    return static_cast<T*>(data) + r * stride;
  }
  void* rowBytes(int64_t r) const { return static_cast<char*>(data) + r * stride * bytesOf(dtype); }
  constexpr bool empty() const { return data == nullptr; }
  Operand slice(int64_t begin, int64_t count) const { return {rowBytes(begin), dtype, count, cols, stride}; }
};

inline Operand denseOperand(void* data, DType dtype, int64_t rows, int64_t cols) {
  return {data, dtype, rows, cols, cols};
}

}  // namespace lockstep
