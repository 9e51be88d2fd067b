// AdamW with publishing in one pass over memory, the sum of squares behind gradient clipping, and joining two
// accumulators.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/pairs.h"
#include "kernels/scratch.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

struct Update {
  float *parameter, *m, *v, *gradient;
  Vec scale, beta1, rest1, beta2, rest2, decay, minusStep, root, epsilon;

  Update(const AdamW& a, float* p, float* first, float* second, float* g)
      : parameter(p),
        m(first),
        v(second),
        gradient(g),
        scale(constant(a.gradientScale)),
        beta1(constant(a.beta1)),
        rest1(constant(1 - a.beta1)),
        beta2(constant(a.beta2)),
        rest2(constant(1 - a.beta2)),
        decay(constant(1 - a.learningRate * a.weightDecay)),
        minusStep(constant(-(a.learningRate / a.correction1))),
        root(constant(1 / __builtin_sqrt(a.correction2))),
        epsilon(constant(a.epsilon)) {}
  static Vec constant(double x) { return Vec::broadcast(static_cast<float>(x)); }

  // Updates 16 elements and returns the parameters.
  template <class Lanes>
  Vec apply(int64_t i, Lanes lanes) const {
    const Vec g = load(gradient + i, lanes) * scale;
    const Vec first = fma(beta1, load(m + i, lanes), rest1 * g);
    const Vec second = fma(beta2, load(v + i, lanes), rest2 * (g * g));
    const Vec p = fma(minusStep, first / fma(squareRoot(second), root, epsilon), load(parameter + i, lanes) * decay);
    store(m + i, first, lanes);
    store(v + i, second, lanes);
    store(parameter + i, p, lanes);
    store(gradient + i, zero(), lanes);
    return p;
  }
};

// The balanced tree over `count` leaves in their order, an odd one passing up: complete subtrees wait on a stack, as
// the digits of a binary counter; what is left at the end joins from the right.
struct TreeSum {
  double stack[64];
  int64_t count = 0;
  int depth = 0;

  void add(double leaf) {
    for (int64_t bits = count++; (bits & 1) != 0; bits >>= 1) leaf = stack[--depth] + leaf;
    stack[depth++] = leaf;
  }
  double total() {
    if (depth == 0) return 0;
    double sum = stack[--depth];
    while (depth > 0) sum = stack[--depth] + sum;
    return sum;
  }
};

}  // namespace

void accumulate(Queue& queue, int64_t count, float* src, float* dst) {
  forRanges(queue, (count + 15) / 16, 16, [&](int64_t begin, int64_t end) {
    const int64_t last = end * 16 < count ? end * 16 : count;
    eachVector(last - begin * 16, [&](int64_t offset, auto lanes) {
      const int64_t i = begin * 16 + offset;
      store(dst + i, load(dst + i, lanes) + load(src + i, lanes), lanes);
      store(src + i, zero(), lanes);
    });
  });
}

static double sumOfSquares(Queue& queue, const float* gradient, int64_t count) {
  const int64_t leaves = (count + kSquaresLeaf - 1) / kSquaresLeaf;
  const int64_t tasks = (leaves + kSquaresTaskLeaves - 1) / kSquaresTaskLeaves;
  double* sums = static_cast<double*>(queue.scratch(0, static_cast<size_t>(sumOfSquaresScratchBytes(count))));
  queue.pool().forEach(tasks, [&](int64_t task, int) {
    TreeSum tree;
    const int64_t end = (task + 1) * kSquaresTaskLeaves < leaves ? (task + 1) * kSquaresTaskLeaves : leaves;
    for (int64_t leaf = task * kSquaresTaskLeaves; leaf < end; ++leaf) {
      const float* x = gradient + leaf * kSquaresLeaf;
      const int64_t left = count - leaf * kSquaresLeaf;
      tree.add(
          static_cast<double>(lanesSum(left < kSquaresLeaf ? left : kSquaresLeaf, [&](Vec acc, int64_t i, auto lanes) {
            const Vec value = load(x + i, lanes);
            return fma(value, value, acc);
          })));
    }
    sums[task] = tree.total();
  });
  TreeSum tree;
  for (int64_t task = 0; task < tasks; ++task) tree.add(sums[task]);
  return tree.total();
}

void sumsOfSquares(Queue& queue, const Run* runs, int64_t count, double* sums) {
  for (int64_t r = 0; r < count; ++r) sums[r] = sumOfSquares(queue, runs[r].data, runs[r].count);
}

void adamw(Queue& queue, const AdamW& a, int64_t count, float* parameter, float* m, float* v, float* gradient,
           const WeightLayout* layout, void* weights) {
  const Update update(a, parameter, m, v, gradient);
  if (layout != nullptr) {
    BFloat16* out = static_cast<BFloat16*>(weights);
    forPairs(queue, *layout, [&](int64_t offset, int64_t width) {
      for (int64_t n = 0; n < width; n += 16) {
        const Vec even = update.apply(offset + n, Full{}), odd = update.apply(offset + width + n, Full{});
        storePairs(out + offset + 2 * n, makePairs(even, odd));
      }
    });
    return;
  }
  forRanges(queue, (count + 15) / 16, 16, [&](int64_t begin, int64_t end) {
    const int64_t last = end * 16 < count ? end * 16 : count;
    eachVector(last - begin * 16, [&](int64_t offset, auto lanes) { update.apply(begin * 16 + offset, lanes); });
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
