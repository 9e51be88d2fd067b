// The contract suite of the kernels. A case draws shapes from a seed, runs the reference and the implementation on
// equal memory and compares every byte that either may have written, gaps between rows included.
//
//   const Registration kLinear("linear", 40, [](Trial& t) {
//     const int64_t rows = t.rows();
//     t.note("rows", rows);
//     Matrix x = t.matrix(t.dtype(), rows, 64);
//     Matrix expected = t.matrix(DType::kFloat32, rows, 32), actual = expected.clone();
//     t.reference().linear(t.referenceQueue(), x.operand(), ..., Output::store(expected.view()));
//     t.eachQueue([&](Queue& queue) { ...; t.compare("y", expected, actual); });
//   });
#pragma once

#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace lockstep::contracts {

// 64-byte aligned memory of exactly the size asked for, so that a sanitizer sees the first byte past it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  Buffer clone() const;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(memory_.get());
  }
  size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<std::byte> memory_;
  size_t bytes_ = 0;
};

// A matrix of either dtype whose stride may exceed its columns. Copies share memory; clone() does not.
struct Matrix {
  Buffer buffer;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, cols = 0, stride = 0;

  Operand operand() const { return {buffer.as<char>(), dtype, rows, cols, stride}; }
  View<float> view() const { return {buffer.as<float>(), rows, cols, stride}; }
  float* data() const { return buffer.as<float>(); }
  Matrix clone() const { return {buffer.clone(), dtype, rows, cols, stride}; }
};

// A layout with memory that outlives the trial's views of it. `elements` of padding are zero.
struct WeightMatrix {
  std::shared_ptr<kernels::WeightLayout> layout;
  Buffer buffer;
  DType dtype = DType::kFloat32;

  kernels::Weight weight() const { return {layout.get(), buffer.as<char>(), dtype}; }
  kernels::WeightGradient gradient() const { return {layout.get(), buffer.as<float>()}; }
  WeightMatrix clone() const { return {layout, buffer.clone(), dtype}; }
};

// What a trial found wrong.
struct Failure {
  std::string message;
};

class Trial {
 public:
  Trial(const kernels::Kernels& implementation, DType dtype, uint64_t seed, double tolerance);

  DType dtype() const { return dtype_; }
  const kernels::Kernels& reference() const { return kernels::referenceKernels(); }
  const kernels::Kernels& implementation() const { return implementation_; }
  Queue& referenceQueue();
  // One of those of eachQueue().
  Queue& implementationQueue();
  bool onGpu() const { return implementation_.name == std::string("cuda"); }
  // body(queue) with 1, 2 and 3 threads; on a GPU with each order of threads and copies.
  void eachQueue(const std::function<void(Queue&)>& body);

  // --- drawing -------------------------------------------------------------------------------------------------------
  std::mt19937_64& random() { return random_; }
  int64_t integer(int64_t low, int64_t high);  // both included
  int64_t pick(std::initializer_list<int64_t> values);
  bool chance(double probability);
  float number(float scale = 1);  // uniform in -scale .. scale
  // Numbers of rows: 1, small ones, and those around every internal threshold.
  int64_t rows(int64_t most = 130);
  // Sizes of `parts` parts that sum to `total`: equal, uneven, or with empty last parts, each a multiple of `unit`.
  std::vector<int64_t> partSizes(int64_t total, int64_t parts, int64_t unit = 1);

  // Random numbers everywhere, gaps between rows included; `scale` bounds them. About one number in 64 is a zero of
  // either sign, a denormal, or small.
  Matrix matrix(DType dtype, int64_t rows, int64_t cols, float scale = 1);
  // One whose rows begin at multiples of 16 bytes, which kernels may copy as they lie.
  Matrix alignedMatrix(DType dtype, int64_t rows, int64_t cols, float scale = 1);
  Buffer floats(int64_t count, float scale = 1);
  WeightMatrix weight(DType dtype, const kernels::WeightLayout& layout, float scale = 1);

  // --- comparing -----------------------------------------------------------------------------------------------------
  // Adds "name value" to the description of this trial's shape.
  void note(const std::string& name, int64_t value);
  void note(const std::string& name, const std::vector<int64_t>& values);
  // Throws Failure at the first element that differs in its bits (any NaN equals any NaN); with a tolerance, at the
  // first one that differs by more than tolerance * (1 + |expected|).
  void compare(const std::string& what, const Matrix& expected, const Matrix& actual);
  void compare(const std::string& what, const WeightMatrix& expected, const WeightMatrix& actual);
  void compare(const std::string& what, const Buffer& expected, const Buffer& actual, DType dtype = DType::kFloat32);
  // Equal bits whatever the tolerance: rows of a part of the batch against the rows of all of it.
  void compareRows(const std::string& what, const Matrix& whole, int64_t firstRow, const Matrix& part);
  [[noreturn]] void fail(const std::string& message);
  const std::string& shape() const { return shape_; }

 private:
  // What the implementation computes is there.
  void settle() {
    if (queue_ != nullptr) queue_->synchronize();
  }
  Matrix filled(DType dtype, int64_t rows, int64_t cols, int64_t stride, float scale);
  void compareElement(const std::string& what, const std::string& where, float expected, float actual, bool exact);

  const kernels::Kernels& implementation_;
  DType dtype_;
  std::mt19937_64 random_;
  double tolerance_;
  std::string shape_;
  std::string context_;
  Queue* queue_ = nullptr;
};

struct Case {
  std::string op;
  DType dtype;
  int trials;
  std::function<void(Trial&)> run;

  std::string name() const { return op + "/" + (dtype == DType::kFloat32 ? "float32" : "bfloat16"); }
};

std::vector<Case>& cases();

// Registers `run` for both dtypes, or for one.
struct Registration {
  Registration(const std::string& op, int trials, const std::function<void(Trial&)>& run);
  Registration(const std::string& op, DType dtype, int trials, const std::function<void(Trial&)>& run);
};

}  // namespace lockstep::contracts
