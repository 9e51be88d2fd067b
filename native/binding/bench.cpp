// Measurements of single operations for bench/: the result is verified against the reference, then timed on the rank's
// own threads. Each call times a ceiling next to the operation, in turn with it, so that a ratio holds on a noisy
// machine.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>

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
double timed(const std::function<void()>& run) {
  constexpr int kMost = 1'000'000;  // of something that takes no time
  int count = 1;
  for (;;) {
    const double seconds = secondsOf([&] {
      for (int i = 0; i < count; ++i) run();
    });
    if (seconds > 0.02 || count >= kMost) return seconds / count;
    count = static_cast<int>(std::min<double>(kMost, std::max(count * 2.0, count * 0.03 / std::max(seconds, 1e-7))));
  }
}

class Bench {
 public:
  Bench(Rank& rank, int runs)
      : rank_(rank), queue_(rank.queue()), k_(rank.kernels()), ceiling_(kernels::ceilingOf(k_)), runs_(runs) {}

  BenchResult gemm(const std::string& product, int64_t rows, int64_t out, int64_t in, const std::string& split,
                   int64_t parts, DType dtype, bool cold);
  BenchResult adamw(int64_t count);
  BenchResult dispatch();
  BenchResult ceilings(DType dtype);

 private:
  void measure(BenchResult& result, const std::function<void()>& run, const std::function<void()>& ceiling) {
    measureInTurn(result, runs_, run, ceiling);
  }
  std::function<void()> multiplyAdds(DType dtype, double* work) {
    constexpr int64_t kRounds = 20000;
    const bool pairs = dtype == DType::kBFloat16;
    *work = static_cast<double>(ceiling_.multiplyAddsOf(kRounds, pairs)) * queue_.threads();
    return [this, pairs] { queue_.pool().each([&](int) { sink_ = ceiling_.multiplyAdds(kRounds, pairs); }); };
  }
  // Reads 256 MiB that no cache holds.
  std::function<void()> reading(double* work) {
    if (large_ == nullptr) {
      large_ = std::make_unique<Arena>("bench", kLarge);
      std::memset(large_->at(0, kLarge, "bench"), 1, kLarge);
    }
    *work = static_cast<double>(kLarge);
    return [this] {
      const auto* data = static_cast<const float*>(large_->at(0, kLarge, "bench"));
      const int64_t each = static_cast<int64_t>(kLarge / 4) / queue_.threads() / 128 * 128;
      queue_.pool().each([&](int thread) { sink_ = ceiling_.readAll(data + thread * each, each); });
    };
  }

  static constexpr size_t kLarge = size_t{256} << 20;
  Rank& rank_;
  Queue& queue_;
  const kernels::Kernels& k_;
  const kernels::Ceiling& ceiling_;
  int runs_;
  std::unique_ptr<Arena> large_;
  volatile float sink_ = 0;
};

void fill(void* data, int64_t count, DType dtype, uint32_t seed, float scale) {
  uint32_t state = seed * 2654435761u + 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = (static_cast<float>(state >> 8) * 0x1p-24f - 0.5f) * scale;
    if (dtype == DType::kFloat32)
      static_cast<float*>(data)[i] = x;
    else
      static_cast<BFloat16*>(data)[i] = toBFloat16(x);
  }
}

WeightLayout layoutOf(int64_t out, int64_t in, const std::string& split, int64_t parts) {
  if (split == "none") return WeightLayout::make(out, in, Split::kNone, {out});
  const int64_t extent = split == "out" ? out : in;
  return WeightLayout::make(out, in, split == "out" ? Split::kOut : Split::kIn,
                            std::vector<int64_t>(static_cast<size_t>(parts), extent / parts));
}

BenchResult Bench::gemm(const std::string& product, int64_t rows, int64_t out, int64_t in, const std::string& split,
                        int64_t parts, DType dtype, bool cold) {
  const WeightLayout layout = layoutOf(out, in, split, parts);
  const auto e = static_cast<int64_t>(bytesOf(dtype));
  const int64_t weightBytes = kernels::roundUp(layout.elements * e, 64);
  // Cold weights: enough copies that none is in a cache when its turn comes.
  const int64_t copies = cold ? std::max<int64_t>(2, (int64_t{512} << 20) / weightBytes) : 1;
  Arena weights("bench weights", static_cast<size_t>(weightBytes * copies));
  Arena memory("bench",
               static_cast<size_t>(kernels::roundUp(rows * in * 4, 64) * 2 + kernels::roundUp(rows * out * 4, 64) * 2 +
                                   kernels::roundUp(layout.elements * 4, 64) * 2 + 4096));
  size_t used = 0;
  const auto take = [&](int64_t bytes) {
    void* at = memory.at(used, static_cast<size_t>(bytes), "bench");
    used += static_cast<size_t>(kernels::roundUp(bytes, 64));
    return at;
  };
  for (int64_t c = 0; c < copies; ++c)
    fill(weights.at(static_cast<size_t>(c * weightBytes), static_cast<size_t>(layout.elements * e), "w"),
         layout.elements, dtype, 7, 0.2f);
  const Operand x = denseOperand(take(rows * in * 4), dtype, rows, in),
                dy = denseOperand(take(rows * out * 4), dtype, rows, out);
  fill(x.data, rows * in, dtype, 1, 2.0f);
  fill(dy.data, rows * out, dtype, 2, 2.0f);
  const View<float> y = dense(static_cast<float*>(take(rows * out * 4)), rows, out),
                    dx = dense(static_cast<float*>(take(rows * in * 4)), rows, in);
  const kernels::WeightGradient dW{&layout, static_cast<float*>(take(layout.elements * 4))};
  int64_t turn = 0;
  const auto weight = [&] {
    const int64_t c = turn++ % copies;
    return kernels::Weight{
        &layout, weights.at(static_cast<size_t>(c * weightBytes), static_cast<size_t>(layout.elements * e), "w"),
        dtype};
  };
  const auto run = [&](const kernels::Kernels& k, int64_t count) {
    if (product == "forward")
      k.linear(queue_, x.slice(0, count), weight(), nullptr, kernels::Output::store(y.slice(0, count)));
    else if (product == "input")
      k.linearBackwardInput(queue_, dy.slice(0, count), weight(), kernels::Output::store(dx.slice(0, count)));
    else
      k.linearBackwardWeight(queue_, dy.slice(0, count), x.slice(0, count), dW, nullptr);
  };
  BenchResult result;
  // Verified on the first rows: they do not depend on the others.
  const int64_t some = std::min<int64_t>(rows, 2);
  const View<float> checked = product == "forward" ? y.slice(0, some) : dx.slice(0, some);
  if (product == "weight") {
    std::vector<float> expected(static_cast<size_t>(layout.elements));
    run(kernels::referenceKernels(), some);
    std::copy_n(dW.data, layout.elements, expected.data());
    std::fill_n(dW.data, layout.elements, 0.0f);
    run(k_, some);
    result.verified = std::memcmp(expected.data(), dW.data, expected.size() * 4) == 0;
  } else {
    run(kernels::referenceKernels(), some);
    const std::vector<float> expected(checked.data, checked.data + some * checked.cols);
    run(k_, rows);
    result.verified = std::memcmp(expected.data(), checked.data, expected.size() * 4) == 0;
  }
  if (cold) {
    result.work = static_cast<double>(layout.elements * e);
    measure(
        result, [&] { run(k_, rows); }, reading(&result.ceilingWork));
  } else {
    result.work = static_cast<double>(rows) * static_cast<double>(out) * static_cast<double>(in);
    measure(
        result, [&] { run(k_, rows); }, multiplyAdds(dtype, &result.ceilingWork));
  }
  return result;
}

BenchResult Bench::adamw(int64_t count) {
  const WeightLayout layout = WeightLayout::make(count / 512, 512, Split::kNone, {count / 512});
  const auto elements = static_cast<size_t>(layout.elements);
  Arena memory("bench", elements * 18 + 4096);
  float* p[4];
  for (size_t i = 0; i < 4; ++i) {
    p[i] = static_cast<float*>(memory.at(i * elements * 4, elements * 4, "bench"));
    fill(p[i], layout.elements, DType::kFloat32, static_cast<uint32_t>(i), 0.1f);
  }
  for (size_t i = 0; i < elements; ++i) p[2][i] = std::fabs(p[2][i]);
  void* weights = memory.at(4 * elements * 4, elements * 2, "bench");
  const kernels::AdamW settings{1e-4, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05, 0.5};
  // Verified on the first panel.
  const WeightLayout small = WeightLayout::make(64, 512, Split::kNone, {64});
  const auto few = static_cast<size_t>(small.elements);
  std::vector<float> e[4];
  std::vector<BFloat16> ew(few);
  for (int i = 0; i < 4; ++i) e[i].assign(p[i], p[i] + few);
  kernels::referenceKernels().adamw(queue_, settings, small.elements, e[0].data(), e[1].data(), e[2].data(),
                                    e[3].data(), &small, ew.data());
  const auto update = [&] {
    sink_ = static_cast<float>(k_.sumOfSquares(queue_, p[3], layout.elements));
    k_.adamw(queue_, settings, layout.elements, p[0], p[1], p[2], p[3], &layout, weights);
  };
  update();
  BenchResult result;
  result.verified = std::memcmp(e[0].data(), p[0], few * 4) == 0 && std::memcmp(ew.data(), weights, few * 2) == 0;
  // Read p, m, v, g and g once more for the norm; write p, m, v, g and the bfloat16 weights.
  result.work = static_cast<double>(elements) * (5 * 4 + 4 * 4 + 2);
  measure(result, update, reading(&result.ceilingWork));
  return result;
}

BenchResult Bench::dispatch() {
  BenchResult result;
  result.work = 1;
  result.ceilingWork = 1;
  measure(
      result, [&] { queue_.pool().each([](int) {}); }, [] {});
  return result;
}

BenchResult Bench::ceilings(DType dtype) {
  BenchResult result;
  measure(result, reading(&result.work), multiplyAdds(dtype, &result.ceilingWork));
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
                   const std::function<void()>& ceiling) {
  run();
  ceiling();
  for (int i = 0; i < runs; ++i) {
    result.ceilingSeconds.push_back(timed(ceiling));
    result.seconds.push_back(timed(run));
  }
}

// bench({what: gemm|adamw|dispatch|ceilings|collective, runs, ...}): {seconds, ceilingSeconds, work, ceilingWork,
// verified}
Napi::Value DeviceWrap::bench(const Napi::CallbackInfo& info) {
  const auto o = info[0].As<Napi::Object>();
  const std::string what = stringAt(o, "what");
  const int runs = static_cast<int>(integerAt(o, "runs"));
  const DType dtype = has(o, "dtype") && stringAt(o, "dtype") == "bfloat16" ? DType::kBFloat16 : DType::kFloat32;
  auto result = std::make_shared<BenchResult>();
  std::function<void()> work;
  if (what == "gemm") {
    work = [rank = rank_, runs, dtype, result, product = stringAt(o, "product"), rows = integerAt(o, "rows"),
            out = integerAt(o, "out"), in = integerAt(o, "in"), split = stringAt(o, "split"),
            parts = integerAt(o, "parts"), cold = booleanAt(o, "cold")] {
      *result = Bench(*rank, runs).gemm(product, rows, out, in, split, parts, dtype, cold);
    };
  } else if (what == "adamw") {
    work = [rank = rank_, runs, result, count = integerAt(o, "count")] { *result = Bench(*rank, runs).adamw(count); };
  } else if (what == "dispatch") {
    work = [rank = rank_, runs, result] { *result = Bench(*rank, runs).dispatch(); };
  } else if (what == "ceilings") {
    work = [rank = rank_, runs, result, dtype] { *result = Bench(*rank, runs).ceilings(dtype); };
  } else if (what == "collective") {
    work = [runs, result, operation = operationOf(info.Env(), stringAt(o, "operation")),
            ranks = static_cast<int>(integerAt(o, "ranks")),
            bytes = integerAt(o, "bytes")] { *result = benchCollective(operation, ranks, bytes, runs); };
  } else {
    invalid(info.Env(), "what", "gemm, adamw, dispatch, ceilings or collective");
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
