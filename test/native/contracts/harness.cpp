#include "harness.h"

#include "testing.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cuda/backend.h"

namespace lockstep::contracts {

using kernels::WeightLayout;

namespace {

constexpr size_t kScratchBytes = size_t{64} << 20;

float element(const Buffer& buffer, DType dtype, int64_t i) {
  return dtype == DType::kFloat32 ? buffer.as<float>()[i] : toFloat(buffer.as<BFloat16>()[i]);
}

void setElement(const Buffer& buffer, DType dtype, int64_t i, float value) {
  if (dtype == DType::kFloat32) {
    buffer.as<float>()[i] = value;
  } else {
    buffer.as<BFloat16>()[i] = toBFloat16(value);
  }
}

std::string printed(float value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.9g (0x%08x)", static_cast<double>(value), std::bit_cast<uint32_t>(value));
  return text;
}

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  void* memory = cuda::testing::allocate(std::max<size_t>(bytes, 1));
  if (memory == nullptr) throw std::bad_alloc();
  memory_ = std::shared_ptr<std::byte>(static_cast<std::byte*>(memory), [](std::byte* p) { cuda::testing::free(p); });
  std::memset(memory, 0, bytes);
}

Buffer Buffer::clone() const {
  Buffer copy(bytes_);
  std::memcpy(copy.as<char>(), as<char>(), bytes_);
  return copy;
}

Trial::Trial(const kernels::Kernels& implementation, DType dtype, uint64_t seed, double tolerance)
    : implementation_(implementation), dtype_(dtype), random_(seed), tolerance_(tolerance) {}

Queue& Trial::referenceQueue() {
  static Queue queue(1, kScratchBytes);
  return queue;
}

Queue& Trial::implementationQueue() {
  if (!onGpu()) return referenceQueue();
  static const std::unique_ptr<Queue> gpu = cuda::makeQueue(0, 1, 0);
  return *gpu;
}

void Trial::eachQueue(const std::function<void(Queue&)>& body) {
  const auto run = [&](Queue& queue, const std::string& context) {
    context_ = context;
    queue_ = &queue;
    body(queue);
    queue.synchronize();
    queue_ = nullptr;
  };
  if (onGpu()) {
    for (int i = 0; i < cuda::testing::kSchedules; ++i) {
      cuda::testing::setSchedule(i);
      run(implementationQueue(), " with schedule " + std::to_string(i));
    }
  } else {
    static Queue one(1, kScratchBytes), two(2, kScratchBytes), three(3, kScratchBytes);
    for (Queue* queue : {&one, &two, &three}) run(*queue, " with " + std::to_string(queue->threads()) + " thread(s)");
  }
  context_.clear();
}

int64_t Trial::integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_);
}

int64_t Trial::pick(std::initializer_list<int64_t> values) {
  return values.begin()[integer(0, static_cast<int64_t>(values.size()) - 1)];
}

bool Trial::chance(double probability) {
  return std::uniform_real_distribution<double>(0, 1)(random_) < probability;
}

float Trial::number(float scale) {
  const uint32_t draw = static_cast<uint32_t>(random_()) % 256;
  if (draw == 0) return 0.0f;
  if (draw == 1) return -0.0f;
  if (draw == 2) return std::bit_cast<float>(static_cast<uint32_t>(random_()) & 0x807fffffu);
  const float x = std::uniform_real_distribution<float>(-scale, scale)(random_);
  return draw == 3 ? x * 1e-30f : x;
}

int64_t Trial::rows(int64_t most) {
  const int64_t drawn =
      chance(0.5) ? integer(1, 20) : pick({1, 2, 14, 15, 16, 17, 28, 31, 32, 33, 63, 64, 65, 66, 127, 128, 129, 130});
  return std::min(drawn, most);
}

std::vector<int64_t> Trial::partSizes(int64_t total, int64_t parts, int64_t unit) {
  const int64_t units = total / unit;
  std::vector<int64_t> ends(static_cast<size_t>(parts));
  const int64_t kind = integer(0, 2);
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t even = (units + parts - 1) / parts;
    ends[p] = kind == 0 ? units * (p + 1) / parts : kind == 1 ? integer(0, units) : std::min(units, even * (p + 1));
  }
  ends.back() = units;
  std::sort(ends.begin(), ends.end());
  std::vector<int64_t> sizes;
  for (int64_t p = 0; p < parts; ++p) sizes.push_back((ends[p] - (p == 0 ? 0 : ends[p - 1])) * unit);
  return sizes;
}

Matrix Trial::matrix(DType dtype, int64_t rows, int64_t cols, float scale) {
  return filled(dtype, rows, cols, cols + (chance(0.5) ? integer(1, 37) : 0), scale);
}

Matrix Trial::alignedMatrix(DType dtype, int64_t rows, int64_t cols, float scale) {
  return filled(dtype, rows, cols, kernels::roundUp(cols, 8) + 8 * integer(0, 4), scale);
}

Matrix Trial::filled(DType dtype, int64_t rows, int64_t cols, int64_t stride, float scale) {
  const int64_t count = rows == 0 ? 0 : (rows - 1) * stride + cols;
  Matrix m{Buffer(static_cast<size_t>(count) * bytesOf(dtype)), dtype, rows, cols, stride};
  for (int64_t i = 0; i < count; ++i) setElement(m.buffer, dtype, i, number(scale));
  return m;
}

Buffer Trial::floats(int64_t count, float scale) {
  Buffer buffer(static_cast<size_t>(count) * sizeof(float));
  for (int64_t i = 0; i < count; ++i) buffer.as<float>()[i] = number(scale);
  return buffer;
}

WeightMatrix Trial::weight(DType dtype, const WeightLayout& layout, float scale) {
  WeightMatrix w{std::make_shared<WeightLayout>(layout), Buffer(static_cast<size_t>(layout.elements) * bytesOf(dtype)),
                 dtype};
  for (const kernels::Part& part : layout.parts) {
    for (int64_t n = 0; n < part.out; ++n) {
      const int64_t panel = n / kernels::kPanel, width = part.panelWidth(panel), base = part.panelOffset(panel);
      const int64_t column = n % kernels::kPanel;
      for (int64_t k = 0; k < part.in; ++k) {
        const int64_t i = dtype == DType::kFloat32 ? k * width + column : k / 2 * 2 * width + 2 * column + k % 2;
        setElement(w.buffer, dtype, base + i, number(scale));
      }
    }
  }
  return w;
}

void Trial::note(const std::string& name, int64_t value) {
  shape_ += (shape_.empty() ? "" : ", ") + name + " " + std::to_string(value);
}

void Trial::note(const std::string& name, const std::vector<int64_t>& values) {
  shape_ += (shape_.empty() ? "" : ", ") + name + " [";
  for (size_t i = 0; i < values.size(); ++i) shape_ += (i == 0 ? "" : " ") + std::to_string(values[i]);
  shape_ += "]";
}

void Trial::fail(const std::string& message) {
  throw Failure{message + context_};
}

void Trial::compareElement(const std::string& what, const std::string& where, float expected, float actual,
                           bool exact) {
  if (std::bit_cast<uint32_t>(expected) == std::bit_cast<uint32_t>(actual)) return;
  // A product on tensor cores is padded with zeros, which turn a chain's -0 into +0.
  const bool zeros = expected == 0 && actual == 0;
  if (zeros && onGpu() && dtype_ == DType::kBFloat16) return;
  const bool nan = expected != expected, nanActual = actual != actual;
  if (nan && nanActual) return;
  if (!exact && tolerance_ > 0 && !nan && !nanActual &&
      std::fabs(double{expected} - actual) <= tolerance_ * (1 + std::fabs(double{expected}))) {
    return;
  }
  fail(what + " " + where + ": expected " + printed(expected) + ", got " + printed(actual));
}

void Trial::compare(const std::string& what, const Matrix& expected, const Matrix& actual) {
  settle();
  const int64_t count = static_cast<int64_t>(expected.buffer.bytes() / bytesOf(expected.dtype));
  for (int64_t i = 0; i < count; ++i) {
    const float a = element(expected.buffer, expected.dtype, i), b = element(actual.buffer, actual.dtype, i);
    if (std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b)) continue;
    const int64_t row = i / expected.stride, col = i % expected.stride;
    const std::string where = "row " + std::to_string(row) + " column " + std::to_string(col);
    compareElement(what, where + (col < expected.cols ? "" : " (a gap between rows)"), a, b, col >= expected.cols);
  }
}

void Trial::compare(const std::string& what, const WeightMatrix& expected, const WeightMatrix& actual) {
  compare(what, expected.buffer, actual.buffer, expected.dtype);
}

void Trial::compare(const std::string& what, const Buffer& expected, const Buffer& actual, DType dtype) {
  settle();
  const int64_t count = static_cast<int64_t>(expected.bytes() / bytesOf(dtype));
  for (int64_t i = 0; i < count; ++i) {
    compareElement(what, "element " + std::to_string(i), element(expected, dtype, i), element(actual, dtype, i), false);
  }
}

void Trial::compareRows(const std::string& what, const Matrix& whole, int64_t firstRow, const Matrix& part) {
  settle();
  for (int64_t r = 0; r < part.rows; ++r) {
    for (int64_t c = 0; c < part.cols; ++c) {
      compareElement(what + " of a part of the batch,",
                     "row " + std::to_string(firstRow + r) + " column " + std::to_string(c),
                     element(whole.buffer, whole.dtype, (firstRow + r) * whole.stride + c),
                     element(part.buffer, part.dtype, r * part.stride + c), true);
    }
  }
}

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

Registration::Registration(const std::string& op, int trials, const std::function<void(Trial&)>& run) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) cases().push_back({op, dtype, trials, run});
}

Registration::Registration(const std::string& op, DType dtype, int trials, const std::function<void(Trial&)>& run) {
  cases().push_back({op, dtype, trials, run});
}

}  // namespace lockstep::contracts
