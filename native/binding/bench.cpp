// Measurements of single operations for bench/: the result is verified against the reference, then timed where the rank
// computes. Each call times a ceiling next to the operation, in turn with it, so that a ratio holds on a noisy machine.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>

#include "binding/bench.h"
#include "binding/convert.h"
#include "binding/device.h"
#include "core/error.h"
#include "kernels/ceiling.h"

namespace lockstep::binding {

namespace {

using kernels::Split;
using kernels::WeightLayout;

double secondsOf(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A run long enough to be timed: repeats until 20 ms.
double timed(const std::function<void()>& run, const std::function<void()>& finish) {
  constexpr int kMost = 1'000'000;  // of something that takes no time
  int count = 1;
  for (;;) {
    const double seconds = secondsOf([&] {
      for (int i = 0; i < count; ++i) run();
      finish();
    });
    if (seconds > 0.02 || count >= kMost) return seconds / count;
    count = static_cast<int>(std::min<double>(kMost, std::max(count * 2.0, count * 0.03 / std::max(seconds, 1e-7))));
  }
}

// Random numbers in (-scale / 2, scale / 2), as the host and a device see them. Many of them repeat: drawing a billion
// takes longer than what is measured.
class Values {
 public:
  Values(int64_t count, DType dtype, uint32_t seed, float scale)
      : dtype_(dtype), bytes_(static_cast<size_t>(count) * bytesOf(dtype)) {
    uint32_t state = seed * 2654435761u + 1;
    const int64_t drawn = std::min<int64_t>(count, 4'000'037);
    for (int64_t i = 0; i < drawn; ++i) {
      state = state * 1664525u + 1013904223u;
      const float x = (static_cast<float>(state >> 8) * 0x1p-24f - 0.5f) * scale;
      if (dtype == DType::kFloat32)
        reinterpret_cast<float*>(bytes_.data())[i] = x;
      else
        reinterpret_cast<BFloat16*>(bytes_.data())[i] = toBFloat16(x);
    }
    const size_t period = static_cast<size_t>(drawn) * bytesOf(dtype);
    for (size_t at = period; at < bytes_.size(); at += period)
      std::memcpy(bytes_.data() + at, bytes_.data(), std::min(period, bytes_.size() - at));
  }
  template <class T = void>
  T* host() {
    return reinterpret_cast<T*>(bytes_.data());
  }
  size_t bytes() const { return bytes_.size(); }
  DType dtype() const { return dtype_; }

 private:
  DType dtype_;
  std::vector<char> bytes_;
};

class Bench {
 public:
  Bench(Rank& rank, int runs, int64_t ceilingBytes)
      : queue_(rank.queue()),
        k_(rank.kernels()),
        ceiling_(kernels::ceilingOf(k_)),
        memory_(rank.workspace().memory()),
        host_(1, size_t{64} << 20),
        runs_(runs),
        ceilingBytes_(ceilingBytes) {}
  ~Bench() { host_.close(); }

  BenchResult gemm(const std::string& product, int64_t rows, int64_t out, int64_t in, const std::string& split,
                   int64_t parts, DType dtype, bool cold);
  BenchResult attention(const kernels::AttentionShape&, int64_t count, int64_t length, bool backward, DType dtype);
  BenchResult adamw(int64_t count);
  BenchResult dispatch();
  BenchResult ceilings(DType dtype);
  BenchResult moves(int64_t bytes);

 private:
  class Packed;

  void measure(BenchResult& result, const std::function<void()>& run, const std::function<void()>& ceiling) {
    measureInTurn(result, runs_, run, ceiling, [this] { queue_.synchronize(); });
  }
  std::function<void()> multiplyAdds(DType dtype, double* work) {
    return [=, this] { *work = ceiling_.multiplyAdds(queue_, dtype); };
  }
  // Memory that no cache holds.
  std::function<void()> reading(double* work) {
    if (large_ == nullptr) {
      large_ = room(static_cast<size_t>(ceilingBytes_));
      queue_.fill(large_->data(), 1, static_cast<size_t>(ceilingBytes_));
    }
    *work = static_cast<double>(ceilingBytes_);
    return [this] { ceiling_.readAll(queue_, reinterpret_cast<const float*>(large_->data()), ceilingBytes_ / 4); };
  }

  // Of the device, zeroed.
  std::unique_ptr<Arena> room(size_t bytes) {
    return std::make_unique<Arena>("bench", std::max<size_t>(bytes, 64), nullptr, memory_);
  }
  std::unique_ptr<Arena> room(Values& values) {
    auto arena = room(values.bytes());
    queue_.fromHost(arena->data(), values.host(), values.bytes());
    return arena;
  }
  // What the device has computed is what the reference has: to the last bit, but for products of bfloat16 on tensor
  // cores.
  bool equal(const void* expected, const void* onDevice, int64_t count, DType of, DType products) {
    std::vector<char> got(static_cast<size_t>(count) * bytesOf(of));
    queue_.toHost(got.data(), onDevice, got.size());
    if (std::memcmp(got.data(), expected, got.size()) == 0) return true;
    if (memory_.isHost() || products == DType::kFloat32) return false;
    const auto at = [&](const void* data, int64_t i) {
      return of == DType::kFloat32 ? static_cast<const float*>(data)[i]
                                   : toFloat(static_cast<const BFloat16*>(data)[i]);
    };
    float largest = 0, furthest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float far = std::fabs(at(got.data(), i) - at(expected, i));
      largest = std::max(largest, std::fabs(at(expected, i)));
      furthest = std::isnan(far) ? INFINITY : std::max(furthest, far);
    }
    return furthest <= largest * 0x1p-6f;
  }

  Queue& queue_;
  const kernels::Kernels& k_;
  const kernels::Ceiling& ceiling_;
  Memory& memory_;
  Queue host_;  // of the reference
  int runs_;
  int64_t ceilingBytes_;
  std::unique_ptr<Arena> large_;
};

WeightLayout layoutOf(int64_t out, int64_t in, const std::string& split, int64_t parts) {
  if (split == "none") return WeightLayout::make(out, in, Split::kNone, {out});
  const int64_t extent = split == "out" ? out : in;
  return WeightLayout::make(out, in, split == "out" ? Split::kOut : Split::kIn,
                            std::vector<int64_t>(static_cast<size_t>(parts), extent / parts));
}

BenchResult Bench::gemm(const std::string& product, int64_t rows, int64_t out, int64_t in, const std::string& split,
                        int64_t parts, DType dtype, bool cold) {
  const WeightLayout layout = layoutOf(out, in, split, parts);
  const int64_t weightBytes = kernels::roundUp(layout.elements * static_cast<int64_t>(bytesOf(dtype)), 256);
  // Cold weights: enough copies that none is in a cache when its turn comes.
  const int64_t copies = cold ? std::max<int64_t>(2, 2 * ceilingBytes_ / weightBytes) : 1;
  const bool forward = product == "forward", weightGradient = product == "weight", input = product == "input";
  Values w(layout.elements, dtype, 7, 0.2f), x(input ? 0 : rows * in, dtype, 1, 2.0f),
      dy(forward ? 0 : rows * out, dtype, 2, 2.0f);
  const auto weights = room(static_cast<size_t>(weightBytes * copies));
  for (int64_t c = 0; c < copies; ++c) queue_.fromHost(weights->data() + c * weightBytes, w.host(), w.bytes());
  const int64_t results = forward ? rows * out : input ? rows * in : layout.elements;
  const auto xRoom = room(x), dyRoom = room(dy), to = room(static_cast<size_t>(results) * 4);
  const auto run = [&](const kernels::Kernels& k, Queue& queue, int64_t count, void* xAt, void* dyAt, void* wAt,
                       void* into) {
    const Operand xRows = denseOperand(xAt, dtype, count, in), dyRows = denseOperand(dyAt, dtype, count, out);
    auto* const result = static_cast<float*>(into);
    const kernels::Weight weight{&layout, wAt, dtype};
    if (forward)
      k.linear(queue, xRows, weight, nullptr, kernels::Output::store(dense(result, count, out)));
    else if (input)
      k.linearBackwardInput(queue, dyRows, weight, kernels::Output::store(dense(result, count, in)));
    else
      k.linearBackwardWeight(queue, dyRows, xRows, {&layout, result}, nullptr);
  };
  int64_t turn = 0;
  const auto all = [&](int64_t count) {
    run(k_, queue_, count, xRoom->data(), dyRoom->data(), weights->data() + turn++ % copies * weightBytes, to->data());
  };
  BenchResult result;
  // Verified on the first rows: they do not depend on the others.
  const int64_t some = std::min<int64_t>(rows, 2);
  std::vector<float> expected(static_cast<size_t>(weightGradient ? results : some * (forward ? out : in)));
  run(kernels::referenceKernels(), host_, some, x.host(), dy.host(), w.host(), expected.data());
  all(weightGradient ? some : rows);
  result.verified = equal(expected.data(), to->data(), static_cast<int64_t>(expected.size()), DType::kFloat32, dtype);
  if (cold) {
    result.work = static_cast<double>(w.bytes());
    measure(
        result, [&] { all(rows); }, reading(&result.ceilingWork));
  } else {
    result.work = static_cast<double>(rows) * static_cast<double>(out) * static_cast<double>(in);
    measure(
        result, [&] { all(rows); }, multiplyAdds(dtype, &result.ceilingWork));
  }
  return result;
}

// Sequences of one length, packed; keys and values are what the pages hold.
class Bench::Packed {
 public:
  Packed(const kernels::AttentionShape& shape, int64_t count, int64_t length, DType dtype)
      : count(count), length(length), layout_{shape}, dtype_(dtype) {
    const auto stride = static_cast<int32_t>((length + kernels::kPagePositions - 1) / kernels::kPagePositions);
    for (int32_t b = 0; b < count; ++b) {
      begin_.push_back(b * static_cast<int32_t>(length));
      length_.push_back(static_cast<int32_t>(length));
      offset_.push_back(0);
      for (int32_t i = 0; i < stride; ++i) pages_.push_back(b * stride + i);
    }
    stride_ = stride;
  }

  int64_t rows() const { return count * length; }
  int64_t queryColumns() const { return layout_.attention.heads * layout_.attention.headWidth; }
  int64_t columns() const { return layout_.columns(); }
  int64_t pageElements() const { return static_cast<int64_t>(pages_.size()) * pagesAt(nullptr).pageElements(); }
  kernels::KvPages pagesAt(void* data) const {
    return {data, dtype_, layout_.attention.keyValueHeads, layout_.attention.headWidth};
  }
  Operand operand(void* data) const { return denseOperand(data, dtype_, rows(), queryColumns()); }

  void forward(const kernels::Kernels& k, Queue& queue, void* q, void* pages, void* out, float* logSumExp) const {
    k.attention(queue, layout_.attention, operand(q), pagesAt(pages), sequences(), operand(out),
                dense(logSumExp, layout_.attention.heads, rows()));
  }
  void backward(const kernels::Kernels& k, Queue& queue, void* q, void* pages, void* out, const float* logSumExp,
                void* dOut, float* dqkv) const {
    k.attentionBackward(queue, layout_, operand(q), pagesAt(pages), sequences(), operand(out),
                        dense(logSumExp, layout_.attention.heads, rows()), operand(dOut),
                        dense(dqkv, rows(), columns()));
  }

  const int64_t count, length;

 private:
  kernels::Sequences sequences() const {
    return {count, begin_.data(), length_.data(), offset_.data(), pages_.data(), stride_};
  }

  kernels::QkvLayout layout_;
  DType dtype_;
  std::vector<int32_t> begin_, length_, offset_, pages_;
  int64_t stride_;
};

BenchResult Bench::attention(const kernels::AttentionShape& shape, int64_t count, int64_t length, bool backward,
                             DType dtype) {
  const Packed all(shape, count, length, dtype), few(shape, 1, std::min<int64_t>(length, 128), dtype);
  const int64_t queries = all.rows() * all.queryColumns();
  Values q(queries, dtype, 1, 2.0f), pages(all.pageElements(), dtype, 2, 2.0f), dOut(queries, dtype, 3, 2.0f);
  const auto qRoom = room(q), pagesRoom = room(pages), dOutRoom = room(dOut),
             out = room(static_cast<size_t>(queries) * bytesOf(dtype)),
             logSumExp = room(static_cast<size_t>(shape.heads * all.rows() * 4)),
             dqkv = room(static_cast<size_t>(all.rows() * all.columns() * 4));
  const auto floats = [](const std::unique_ptr<Arena>& arena) { return reinterpret_cast<float*>(arena->data()); };
  const auto run = [&](const Packed& of, bool back) {
    if (back)
      of.backward(k_, queue_, qRoom->data(), pagesRoom->data(), out->data(), floats(logSumExp), dOutRoom->data(),
                  floats(dqkv));
    else
      of.forward(k_, queue_, qRoom->data(), pagesRoom->data(), out->data(), floats(logSumExp));
  };
  BenchResult result;
  const int64_t fewQueries = few.rows() * few.queryColumns();
  Values expected(fewQueries, dtype, 0, 0.0f);
  std::vector<float> logs(static_cast<size_t>(shape.heads * few.rows())),
      gradients(static_cast<size_t>(few.rows() * few.columns()));
  few.forward(kernels::referenceKernels(), host_, q.host(), pages.host(), expected.host(), logs.data());
  run(few, false);
  result.verified = equal(expected.host(), out->data(), fewQueries, dtype, dtype);
  if (backward) {
    few.backward(kernels::referenceKernels(), host_, q.host(), pages.host(), expected.host(), logs.data(), dOut.host(),
                 gradients.data());
    run(few, true);
    result.verified = result.verified && equal(gradients.data(), dqkv->data(), static_cast<int64_t>(gradients.size()),
                                               DType::kFloat32, dtype);
  }
  // Two products of causal attention, in backward five.
  result.work = (backward ? 5.0 : 2.0) * static_cast<double>(count * shape.heads * shape.headWidth) *
                (static_cast<double>(length) * static_cast<double>(length + 1) / 2);
  run(all, false);
  measure(
      result, [&] { run(all, backward); }, multiplyAdds(dtype, &result.ceilingWork));
  return result;
}

BenchResult Bench::adamw(int64_t count) {
  const WeightLayout layout = WeightLayout::make(count / 512, 512, Split::kNone, {count / 512});
  const WeightLayout small = WeightLayout::make(64, 512, Split::kNone, {64});  // verified on the first panel
  std::unique_ptr<Arena> rooms[4];
  std::vector<float> expected[4];
  for (uint32_t i = 0; i < 4; ++i) {
    Values values(layout.elements, DType::kFloat32, i, 0.1f);
    auto* const data = values.host<float>();
    if (i == 2) std::for_each(data, data + layout.elements, [](float& v) { v = std::fabs(v); });
    expected[i].assign(data, data + small.elements);
    rooms[i] = room(values);
  }
  const auto at = [&](size_t i) { return reinterpret_cast<float*>(rooms[i]->data()); };
  const auto weights = room(static_cast<size_t>(layout.elements) * 2);
  const kernels::AdamW settings{1e-4, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05, 0.5};
  std::vector<BFloat16> published(static_cast<size_t>(small.elements));
  kernels::referenceKernels().adamw(host_, settings, small.elements, expected[0].data(), expected[1].data(),
                                    expected[2].data(), expected[3].data(), &small, published.data());
  const auto update = [&] {
    const kernels::Run gradient{at(3), layout.elements};
    double sum = 0;
    k_.sumsOfSquares(queue_, &gradient, 1, &sum);
    k_.adamw(queue_, settings, layout.elements, at(0), at(1), at(2), at(3), &layout, weights->data());
  };
  update();
  BenchResult result;
  result.verified = equal(expected[0].data(), at(0), small.elements, DType::kFloat32, DType::kFloat32) &&
                    equal(published.data(), weights->data(), small.elements, DType::kBFloat16, DType::kFloat32);
  // Read p, m, v, g and g once more for the norm; write p, m, v, g and the bfloat16 weights.
  result.work = static_cast<double>(layout.elements) * (5 * 4 + 4 * 4 + 2);
  measure(result, update, reading(&result.ceilingWork));
  return result;
}

// The least that an operation costs: on a GPU, a fill that is waited for.
BenchResult Bench::dispatch() {
  BenchResult result;
  result.work = 1;
  result.ceilingWork = 1;
  const auto little = room(256);
  measure(
      result,
      [&] {
        if (memory_.isHost()) return queue_.pool().each([](int) {});
        queue_.fill(little->data(), 0, 256);
        queue_.synchronize();
      },
      [] {});
  return result;
}

BenchResult Bench::ceilings(DType dtype) {
  BenchResult result;
  measure(result, reading(&result.work), multiplyAdds(dtype, &result.ceilingWork));
  return result;
}

// Pinned host memory to the device and back, one after the other: what offload is a share of. On a CPU a copy.
BenchResult Bench::moves(int64_t bytes) {
  Arena host("bench", static_cast<size_t>(bytes));
  std::memset(host.data(), 1, static_cast<size_t>(bytes));
  const auto device = room(static_cast<size_t>(bytes));
  memory_.pin(host.data(), static_cast<size_t>(bytes));
  BenchResult result;
  result.work = 2.0 * static_cast<double>(bytes);
  measureInTurn(
      result, runs_,
      [&] {
        memory_.fromHost(device->data(), host.data(), static_cast<size_t>(bytes));
        memory_.toHost(host.data(), device->data(), static_cast<size_t>(bytes));
      },
      [] {});
  memory_.unpin(host.data());
  return result;
}

comm::Operation operationOf(Napi::Env env, const std::string& name) {
  if (name == "all-gather") return comm::Operation::kAllGather;
  if (name == "reduce-scatter") return comm::Operation::kReduceScatter;
  if (name == "all-reduce") return comm::Operation::kAllReduce;
  invalid(env, "operation", "all-gather, reduce-scatter or all-reduce");
}

}  // namespace

void measureInTurn(BenchResult& result, int runs, const std::function<void()>& run,
                   const std::function<void()>& ceiling, const std::function<void()>& finish) {
  run();
  ceiling();
  finish();
  for (int i = 0; i < runs; ++i) {
    result.ceilingSeconds.push_back(timed(ceiling, finish));
    result.seconds.push_back(timed(run, finish));
  }
}

// bench({what: gemm|attention|adamw|dispatch|ceilings|moves|collective, runs, ...}): {seconds, ceilingSeconds, work,
// ceilingWork, verified}
Napi::Value DeviceWrap::bench(const Napi::CallbackInfo& info) {
  const auto o = info[0].As<Napi::Object>();
  const std::string what = stringAt(o, "what");
  const int runs = static_cast<int>(integerAt(o, "runs"));
  const DType dtype = has(o, "dtype") && stringAt(o, "dtype") == "bfloat16" ? DType::kBFloat16 : DType::kFloat32;
  const int64_t ceilingBytes = has(o, "ceilingBytes") ? integerAt(o, "ceilingBytes") : int64_t{256} << 20;
  auto result = std::make_shared<BenchResult>();
  std::function<void(Bench&)> measure;
  if (what == "gemm") {
    measure = [dtype, result, product = stringAt(o, "product"), rows = integerAt(o, "rows"), out = integerAt(o, "out"),
               in = integerAt(o, "in"), split = stringAt(o, "split"), parts = integerAt(o, "parts"),
               cold = booleanAt(o, "cold")](Bench& bench) {
      *result = bench.gemm(product, rows, out, in, split, parts, dtype, cold);
    };
  } else if (what == "attention") {
    const auto width = integerAt(o, "headWidth");
    const kernels::AttentionShape shape{integerAt(o, "heads"),
                                        integerAt(o, "keyValueHeads"),
                                        width,
                                        0,
                                        integerAt(o, "parts"),
                                        1.0f / std::sqrt(static_cast<float>(width))};
    measure = [dtype, result, shape, count = integerAt(o, "sequences"), length = integerAt(o, "length"),
               backward = booleanAt(o, "backward")](Bench& bench) {
      *result = bench.attention(shape, count, length, backward, dtype);
    };
  } else if (what == "adamw") {
    measure = [result, count = integerAt(o, "count")](Bench& bench) { *result = bench.adamw(count); };
  } else if (what == "dispatch") {
    measure = [result](Bench& bench) { *result = bench.dispatch(); };
  } else if (what == "ceilings") {
    measure = [result, dtype](Bench& bench) { *result = bench.ceilings(dtype); };
  } else if (what == "moves") {
    measure = [result, bytes = integerAt(o, "bytes")](Bench& bench) { *result = bench.moves(bytes); };
  } else if (what != "collective") {
    invalid(info.Env(), "what", "gemm, attention, adamw, dispatch, ceilings, moves or collective");
  }
  std::function<void()> work = [rank = rank_, runs, ceilingBytes, measure] {
    Bench bench(*rank, runs, ceilingBytes);
    measure(bench);
  };
  if (what == "collective") {
    work = [runs, result, operation = operationOf(info.Env(), stringAt(o, "operation")),
            ranks = static_cast<int>(integerAt(o, "ranks")),
            bytes = integerAt(o, "bytes")] { *result = benchCollective(operation, ranks, bytes, runs); };
  }
  return rank_->call(info.Env(), work, [result](Napi::Env env) {
    auto out = Napi::Object::New(env);
    const auto list = [&](const std::vector<double>& values) {
      auto array = Napi::Array::New(env, values.size());
      for (size_t i = 0; i < values.size(); ++i) array.Set(static_cast<uint32_t>(i), values[i]);
      return array;
    };
    out.Set("seconds", list(result->seconds));
    out.Set("ceilingSeconds", list(result->ceilingSeconds));
    out.Set("work", result->work);
    out.Set("ceilingWork", result->ceilingWork);
    out.Set("verified", result->verified);
    return out;
  });
}

}  // namespace lockstep::binding
