// A weight whose parts lie apart, in any order, between foreign bytes, gives the bits of the same weight in one piece:
// generation reads its weights in the training shards of several ranks.
#include <algorithm>
#include <limits>
#include <numeric>

#include "rows.h"

namespace lockstep::contracts {
namespace {

using kernels::Activation;
using kernels::Output;
using kernels::Part;
using kernels::Split;
using kernels::WeightLayout;

// Offsets are multiples of this many elements, so that panels stay aligned in every dtype.
constexpr int64_t kGrain = 32;

WeightMatrix scatter(Trial& t, const WeightMatrix& w) {
  WeightLayout layout = *w.layout;
  std::vector<size_t> order(layout.parts.size());
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), t.random());
  int64_t end = 0;
  for (const size_t p : order) {
    Part& part = layout.parts[p];
    part.offset = end + t.integer(0, 5) * kGrain;
    end = kernels::roundUp(part.offset + part.elements(), kGrain);
  }
  layout.elements = end;
  const size_t size = bytesOf(w.dtype);
  WeightMatrix apart{std::make_shared<WeightLayout>(layout), Buffer(static_cast<size_t>(end) * size), w.dtype};
  std::memset(apart.buffer.as<char>(), 0xff, apart.buffer.bytes());  // NaN in either dtype
  for (size_t p = 0; p < layout.parts.size(); ++p) {
    const Part &from = w.layout->parts[p], &to = layout.parts[p];
    std::memcpy(apart.buffer.as<char>() + static_cast<size_t>(to.offset) * size,
                w.buffer.as<char>() + static_cast<size_t>(from.offset) * size,
                static_cast<size_t>(from.elements()) * size);
  }
  return apart;
}

struct Pair {
  int64_t rows, out, in;
  WeightMatrix whole, apart;
  Matrix x;

  // `unit` divides the rows of a part; Split::kNone: either way of cutting.
  Pair(Trial& t, Split split, int64_t unit = 1) : rows(t.rows()) {
    const int64_t parts = t.pick({1, 2, 4, 8});
    if (split == Split::kNone) split = t.chance(0.5) ? Split::kOut : Split::kIn;
    out = t.integer(parts, 300) / unit * unit + unit;
    in = t.integer(parts, 150);
    const std::vector<int64_t> sizes =
        t.partSizes(split == Split::kIn ? in : out, parts, split == Split::kIn ? 1 : unit);
    t.note("rows", rows);
    t.note("out", out);
    t.note("in", in);
    t.note(split == Split::kIn ? "parts of in" : "parts of out", sizes);
    whole = t.weight(t.dtype(), WeightLayout::make(out, in, split, sizes));
    apart = scatter(t, whole);
    x = t.matrix(t.dtype(), rows, in);
  }
};

const Registration kLinear("scattered.linear", 30, [](Trial& t) {
  const Pair p(t, Split::kNone);
  const Matrix fresh = t.matrix(DType::kFloat32, p.rows, p.out);
  t.eachQueue([&](Queue& queue) {
    const Matrix expected = fresh.clone(), actual = fresh.clone();
    t.implementation().linear(queue, p.x.operand(), p.whole.weight(), nullptr, Output::store(expected.view()));
    t.implementation().linear(queue, p.x.operand(), p.apart.weight(), nullptr, Output::store(actual.view()));
    t.compare("y", expected, actual);
  });
});

const Registration kActivated("scattered.activatedLinear", 30, [](Trial& t) {
  const auto activation = t.chance(0.5) ? Activation::kSwiGlu : Activation::kGeluTanh;
  const int64_t unit = activation == Activation::kSwiGlu ? 2 : 1;
  const Pair p(t, Split::kOut, unit);
  const Matrix fresh = t.matrix(t.dtype(), p.rows, p.out / unit);
  t.eachQueue([&](Queue& queue) {
    const Matrix expected = fresh.clone(), actual = fresh.clone();
    const auto run = [&](const WeightMatrix& w, const Matrix& y) {
      t.implementation().activatedLinear(queue, p.x.operand(), w.weight(), nullptr, activation, y.operand(), {});
    };
    run(p.whole, expected);
    run(p.apart, actual);
    t.compare("y", expected, actual);
  });
});

const Registration kEmbed("scattered.embed", 20, [](Trial& t) {
  const Pair p(t, Split::kOut);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < p.rows; ++i) tokens.push_back(static_cast<int32_t>(t.integer(-1, p.out - 1)));
  const Matrix fresh = t.matrix(DType::kFloat32, p.rows, p.in);
  t.eachQueue([&](Queue& queue) {
    const Matrix expected = fresh.clone(), actual = fresh.clone();
    t.implementation().embed(queue, tokens.data(), nullptr, p.whole.weight(), nullptr, expected.view());
    t.implementation().embed(queue, tokens.data(), nullptr, p.apart.weight(), nullptr, actual.view());
    t.compare("x", expected, actual);
  });
});

const Registration kStatistics("scattered.softmaxStatistics", 20, [](Trial& t) {
  const Pair p(t, Split::kOut);
  std::vector<int32_t> targets;
  for (int64_t i = 0; i < p.rows; ++i) targets.push_back(static_cast<int32_t>(t.integer(-1, p.out - 1)));
  const Buffer staging(
      static_cast<size_t>(kernels::vocabularyStagingBytes(t.pick({2, 16, 130}), p.out, t.dtype(), false)));
  const Matrix fresh = t.matrix(DType::kFloat32, p.rows, 4);
  t.eachQueue([&](Queue& queue) {
    const auto run = [&](const WeightMatrix& w) {
      std::vector<kernels::SoftmaxStatistics> statistics(static_cast<size_t>(p.rows));
      t.implementation().softmaxStatistics(queue, p.x.operand(), w.weight(), targets.data(), 1.25f, statistics.data(),
                                           {staging.as<char>(), static_cast<int64_t>(staging.bytes())});
      const Matrix result = fresh.clone();
      for (int64_t i = 0; i < p.rows; ++i) {
        const kernels::SoftmaxStatistics& s = statistics[static_cast<size_t>(i)];
        float* const row = result.view().row(i);
        row[0] = s.m, row[1] = s.s, row[2] = s.u, row[3] = s.target;
      }
      return result;
    };
    const Matrix expected = run(p.whole);
    t.compare("statistics", expected, run(p.apart));
  });
});

}  // namespace
}  // namespace lockstep::contracts
