// Contracts of attention and attentionBackward: equal bits to the reference whatever the batch, the chunks, the pages
// and the threads; and both against the formula in float64.
#include "attention_problem.h"
#include "core/error.h"

namespace lockstep::contracts {

namespace {

void checkForward(Trial& t, Heads heads) {
  AttentionProblem p = AttentionProblem::draw(t, t.chance(0.5), heads);
  p.fillPages(t, static_cast<float>(t.pick({1, 1, 8, 100})));
  const Matrix q = t.matrix(p.dtype, p.rows, p.queryColumns(), 2);
  const Matrix out = t.matrix(p.dtype, p.rows, p.queryColumns());
  const Matrix logSumExp = t.matrix(DType::kFloat32, p.shape().heads, p.rows);
  const Matrix expected = out.clone(), expectedLogSumExp = logSumExp.clone();
  t.reference().attention(t.referenceQueue(), p.shape(), q.operand(), p.kv, p.batch.sequences(), expected.operand(),
                          expectedLogSumExp.view());
  t.eachQueue([&](Queue& queue) {
    const Matrix actual = out.clone(), actualLogSumExp = logSumExp.clone();
    t.implementation().attention(queue, p.shape(), q.operand(), p.kv, p.batch.sequences(), actual.operand(),
                                 actualLogSumExp.view());
    t.compare("out", expected, actual);
    t.compare("logSumExp", expectedLogSumExp, actualLogSumExp);
  });
  for (const bool decode : {true, false}) {
    const SubBatch sub = p.drawSubBatch(t, decode);
    const Matrix part = gather(q, sub.sourceRow), whole = gather(expected, sub.sourceRow), actual = whole.clone();
    for (int64_t r = 0; r < actual.rows; ++r)
      std::memset(actual.operand().rowBytes(r), 0, bytesOf(p.dtype) * actual.cols);
    t.eachQueue([&](Queue& queue) {
      t.implementation().attention(queue, p.shape(), part.operand(), p.kv, sub.sequences(), actual.operand(), {});
      t.compareRows(decode ? "out of single rows" : "out of chunks", whole, 0, actual);
    });
  }
}

// A training problem with its forward pass, by the reference.
struct Training {
  AttentionProblem p;
  Matrix q, out, logSumExp, dOut;

  static Training draw(Trial& t, Heads heads) {
    Training x{AttentionProblem::draw(t, true, heads), {}, {}, {}, {}};
    x.p.fillPages(t, 2);
    x.q = t.matrix(x.p.dtype, x.p.rows, x.p.queryColumns(), 2);
    x.out = t.matrix(x.p.dtype, x.p.rows, x.p.queryColumns());
    x.dOut = t.matrix(x.p.dtype, x.p.rows, x.p.queryColumns());
    x.logSumExp = t.matrix(DType::kFloat32, x.p.shape().heads, x.p.rows);
    t.reference().attention(t.referenceQueue(), x.p.shape(), x.q.operand(), x.p.kv, x.p.batch.sequences(),
                            x.out.operand(), x.logSumExp.view());
    return x;
  }

  void backward(const kernels::Kernels& kernels, Queue& queue, const kernels::Sequences& sequences,
                const Matrix& dqkv) const {
    kernels.attentionBackward(queue, p.layout, q.operand(), p.kv, sequences, out.operand(), logSumExp.view(),
                              dOut.operand(), dqkv.view());
  }
};

void checkBackward(Trial& t, Heads heads) {
  const Training x = Training::draw(t, heads);
  const Batch& batch = x.p.batch;
  const Matrix dqkv = t.matrix(DType::kFloat32, x.p.rows, x.p.layout.columns()), expected = dqkv.clone();
  x.backward(t.reference(), t.referenceQueue(), batch.sequences(), expected);
  t.eachQueue([&](Queue& queue) {
    const Matrix actual = dqkv.clone();
    x.backward(t.implementation(), queue, batch.sequences(), actual);
    t.compare("dqkv", expected, actual);
  });
  // One sequence alone: its rows as before, every other row is padding.
  const int64_t b = t.integer(0, batch.count() - 1);
  const kernels::Sequences one{
      1, &batch.rowBegin[b], &batch.length[b], &batch.offset[b], &batch.pages[b * batch.pageStride], batch.pageStride};
  for (int64_t row = 0; row < x.p.rows; ++row) {
    if (row >= batch.rowBegin[b] && row < batch.rowBegin[b] + batch.length[b]) continue;
    std::memset(expected.view().row(row), 0, sizeof(float) * expected.cols);
  }
  t.eachQueue([&](Queue& queue) {
    const Matrix alone = dqkv.clone();
    x.backward(t.implementation(), queue, one, alone);
    t.compare("dqkv of one sequence", expected, alone);
  });
}

// The formula in float64 for one (sequence, head): out, dq and this head's contribution to dk and dv, all [length, K].
struct Exact {
  std::vector<double> out, dq, dk, dv;
};

Exact exactHead(const Training& x, int64_t b, int64_t h) {
  const kernels::AttentionShape& shape = x.p.shape();
  const int64_t width = shape.headWidth, length = x.p.batch.length[b], first = x.p.batch.rowBegin[b];
  const int64_t g = h / (shape.heads / shape.keyValueHeads);
  const std::vector<double> zeros(static_cast<size_t>(length * width));
  Exact e{zeros, zeros, zeros, zeros};
  const auto key = [&](int64_t j, int64_t i) { return double{x.p.element(x.p.keyIndex(b, g, j, i))}; };
  const auto value = [&](int64_t j, int64_t i) { return double{x.p.element(x.p.valueIndex(b, g, j, i))}; };
  const auto query = [&](int64_t i, int64_t k) { return double{at(x.q, first + i, h * width + k)}; };
  const auto dOut = [&](int64_t i, int64_t k) { return double{at(x.dOut, first + i, h * width + k)}; };
  for (int64_t i = 0; i < length; ++i) {
    const int64_t begin = shape.window > 0 ? std::max<int64_t>(0, i - shape.window + 1) : 0;
    std::vector<double> p(static_cast<size_t>(length)), dP = p;
    double sum = 0, delta = 0;
    for (int64_t j = begin; j <= i; ++j) {
      double s = 0;
      for (int64_t k = 0; k < width; ++k) s += query(i, k) * key(j, k);
      p[j] = std::exp(s * double{shape.scale});
      sum += p[j];
    }
    for (int64_t j = begin; j <= i; ++j) {
      p[j] /= sum;
      for (int64_t k = 0; k < width; ++k) {
        e.out[i * width + k] += p[j] * value(j, k);
        dP[j] += dOut(i, k) * value(j, k);
      }
      delta += p[j] * dP[j];
    }
    for (int64_t j = begin; j <= i; ++j) {
      const double dS = p[j] * (dP[j] - delta) * double{shape.scale};
      for (int64_t k = 0; k < width; ++k) {
        e.dq[i * width + k] += dS * key(j, k);
        e.dk[j * width + k] += dS * query(i, k);
        e.dv[j * width + k] += p[j] * dOut(i, k);
      }
    }
  }
  return e;
}

void checkAgainstFloat64(Trial& t) {
  const Training x = Training::draw(t, Heads::kUsual);
  const kernels::AttentionShape& shape = x.p.shape();
  const int64_t width = shape.headWidth, group = shape.heads / shape.keyValueHeads;
  const Matrix out = x.out.clone(), dqkv = t.matrix(DType::kFloat32, x.p.rows, x.p.layout.columns());
  t.eachQueue([&](Queue& queue) {
    t.implementation().attention(queue, shape, x.q.operand(), x.p.kv, x.p.batch.sequences(), out.operand(), {});
    x.backward(t.implementation(), queue, x.p.batch.sequences(), dqkv);
  });
  // Values are of order 1; dk and dv sum up to 300 queries of several heads.
  const double bound = x.p.dtype == DType::kFloat32 ? 2e-5 : 0.05;
  const auto check = [&](const char* what, int64_t row, int64_t k, double exact, float actual) {
    if (std::abs(exact - double{actual}) <= bound * (1 + std::abs(exact))) return;
    t.fail(std::string(what) + " row " + std::to_string(row) + " dimension " + std::to_string(k) + ": float64 " +
           std::to_string(exact) + ", got " + std::to_string(actual));
  };
  for (int64_t b = 0; b < x.p.batch.count(); ++b) {
    const int64_t length = x.p.batch.length[b], first = x.p.batch.rowBegin[b];
    for (int64_t g = 0; g < shape.keyValueHeads; ++g) {
      std::vector<double> dk(static_cast<size_t>(length * width)), dv = dk;
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        const Exact e = exactHead(x, b, h);
        for (int64_t i = 0; i < length * width; ++i) {
          const int64_t row = first + i / width, k = i % width;
          dk[i] += e.dk[i];
          dv[i] += e.dv[i];
          check("out", row, k, e.out[i], at(out, row, h * width + k));
          check("dq", row, k, e.dq[i], at(dqkv, row, x.p.layout.queryColumn(h) + k));
        }
      }
      for (int64_t i = 0; i < length * width; ++i) {
        const int64_t row = first + i / width, k = i % width;
        check("dk", row, k, dk[i], at(dqkv, row, x.p.layout.keyColumn(g) + k));
        check("dv", row, k, dv[i], at(dqkv, row, x.p.layout.valueColumn(g) + k));
      }
    }
  }
}

const Registration kForward("attention", 60, [](Trial& t) { checkForward(t, Heads::kUsual); });
const Registration kForwardWide("attention.wideHeads", 12, [](Trial& t) { checkForward(t, Heads::kWide); });
// A GPU has no room for wider heads of bfloat16, and says so before it computes anything.
const Registration kTooWide("attention.tooWide", DType::kBFloat16, 1, [](Trial& t) {
  if (!t.onGpu()) return;
  const kernels::AttentionShape shape{1, 1, 546, 0, 1, 1};
  const Matrix q = t.matrix(DType::kBFloat16, 1, shape.headWidth);
  try {
    t.implementation().attention(t.implementationQueue(), shape, q.operand(), {}, {}, q.operand(), {});
  } catch (const Error& error) {
    if (error.code() == "CUDA_HEAD_WIDTH") return;
    t.fail("expected CUDA_HEAD_WIDTH, got " + error.code());
  }
  t.fail("heads of 546 columns were not refused");
});
const Registration kBackward("attentionBackward", 40, [](Trial& t) { checkBackward(t, Heads::kUsual); });
const Registration kBackwardWide("attentionBackward.wideHeads", 8, [](Trial& t) { checkBackward(t, Heads::kWide); });
const Registration kExact("attentionAgainstFloat64", 10, checkAgainstFloat64);

}  // namespace

}  // namespace lockstep::contracts
