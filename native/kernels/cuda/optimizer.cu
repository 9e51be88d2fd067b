// AdamW (Loshchilov and Hutter, 2019) with publishing in one pass over memory, the sum of squares behind gradient
// clipping, and joining two accumulators. Elements are independent, but for the sum of squares: 16 threads take a leaf
// of it, which is their lanes sum, a block the leaves of one subtree; the host joins the subtrees.
#include <cmath>
#include <vector>

#include "kernels/cuda/pairs.h"
#include "kernels/scratch.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int kThreads = 256, kEach = 4;     // a block updates kThreads * kEach elements
constexpr int kBlockLeaves = kThreads / 16;  // a power of two: a whole subtree
constexpr int kAhead = 8;                    // loads in flight of a thread
constexpr int64_t kMostBlocks = 1 << 16;     // whose sums lie in scratch memory, if not of one run

__global__ void accumulateKernel(int64_t count, float* src, float* dst) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads * kEach + threadIdx.x;
  for (int j = 0; j < kEach; ++j) {
    const int64_t i = begin + j * kThreads;
    if (i >= count) return;
    dst[i] = dst[i] + src[i];
    src[i] = 0;
  }
}

__global__ void sumOfSquaresKernel(const float* gradient, int64_t count, double* sums) {
  __shared__ Shared<double[kBlockLeaves]> shared;
  double* leaves = shared;
  const int64_t leaf = static_cast<int64_t>(blockIdx.x) * kBlockLeaves + threadIdx.x / 16;
  const int64_t left = count - leaf * kSquaresLeaf;  // none or less in the last block
  const int lane = static_cast<int>(threadIdx.x % 16),
            size = static_cast<int>(left < kSquaresLeaf ? left : kSquaresLeaf);
  const float* x = gradient + leaf * kSquaresLeaf;
  float sum = 0;
  for (int i = lane; i < size; i += 16 * kAhead) {
    float values[kAhead];
    for (int j = 0; j < kAhead; ++j) values[j] = i + j * 16 < size ? x[i + j * 16] : 0.0f;
    for (int j = 0; j < kAhead; ++j)
      sum = fma(values[j], values[j], sum);  // a square of zero changes no sum of squares
  }
  for (int width = 8; width >= 1; width /= 2) sum = sum + __shfl_xor_sync(kAllLanes, sum, width);
  if (lane == 0) leaves[threadIdx.x / 16] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int64_t rest = (count + kSquaresLeaf - 1) / kSquaresLeaf - static_cast<int64_t>(blockIdx.x) * kBlockLeaves;
  for (int n = static_cast<int>(rest < kBlockLeaves ? rest : kBlockLeaves); n > 1; n = (n + 1) / 2) {
    for (int i = 0; i < n; i += 2) leaves[i / 2] = i + 1 < n ? leaves[i] + leaves[i + 1] : leaves[i];
  }
  sums[blockIdx.x] = leaves[0];
}

struct Update {
  float *parameter, *m, *v, *gradient;
  float scale, beta1, rest1, beta2, rest2, decay, minusStep, root, epsilon;

  Update(const AdamW& a, float* p, float* first, float* second, float* g)
      : parameter(p),
        m(first),
        v(second),
        gradient(g),
        scale(static_cast<float>(a.gradientScale)),
        beta1(static_cast<float>(a.beta1)),
        rest1(static_cast<float>(1 - a.beta1)),
        beta2(static_cast<float>(a.beta2)),
        rest2(static_cast<float>(1 - a.beta2)),
        decay(static_cast<float>(1 - a.learningRate * a.weightDecay)),
        minusStep(-static_cast<float>(a.learningRate / a.correction1)),
        root(static_cast<float>(1 / std::sqrt(a.correction2))),
        epsilon(static_cast<float>(a.epsilon)) {}

  __device__ void apply(float& p, float& first, float& second, float& g) const {
    const float scaled = g * scale;
    first = fma(beta1, first, rest1 * scaled);
    second = fma(beta2, second, rest2 * (scaled * scaled));
    p = fma(minusStep, first / fma(::sqrtf(second), root, epsilon), p * decay);
    g = 0;
  }
  __device__ float4 apply4(int64_t i) const {
    float4 *const atP = reinterpret_cast<float4*>(parameter + i), *const atM = reinterpret_cast<float4*>(m + i),
                  *const atV = reinterpret_cast<float4*>(v + i), *const atG = reinterpret_cast<float4*>(gradient + i);
    float4 p = *atP, first = *atM, second = *atV, g = *atG;
    apply(p.x, first.x, second.x, g.x);
    apply(p.y, first.y, second.y, g.y);
    apply(p.z, first.z, second.z, g.z);
    apply(p.w, first.w, second.w, g.w);
    *atP = p;
    *atM = first;
    *atV = second;
    *atG = g;
    return p;
  }
};

struct UpdateAndPublish {
  Update update;
  BFloat16* weights;

  __device__ void operator()(int64_t even, int64_t odd, int64_t pairs) const {
    const float4 first = update.apply4(even), second = update.apply4(odd);
    storePairs(weights + pairs, first, second);
  }
};

// Pieces of vectors begin anywhere, so element by element.
__global__ void updateKernel(int64_t count, Update update) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads * kEach + threadIdx.x;
  for (int j = 0; j < kEach; ++j) {
    const int64_t i = begin + j * kThreads;
    if (i < count) update.apply(update.parameter[i], update.m[i], update.v[i], update.gradient[i]);
  }
}

}  // namespace

void accumulate(Queue& queue, int64_t count, float* src, float* dst) {
  if (count == 0) return;
  launch(accumulateKernel, blocksFor(count, kThreads * kEach), kThreads, 0, onGpu(queue).stream(), count, src, dst);
}

// Sums of blocks come to the host for many runs at a time: for each one to be waited for would cost more than its sum.
void sumsOfSquares(Queue& queue, const Run* runs, int64_t count, double* sums) {
  lockstep::cuda::Queue& gpu = onGpu(queue);
  const auto blocksOf = [](const Run& run) { return int64_t{blocksFor(run.count, kSquaresLeaf * kBlockLeaves)}; };
  std::vector<double> partial;
  for (int64_t first = 0, end = 0; first < count; first = end) {
    int64_t blocks = 0;
    while (end < count && (end == first || blocks + blocksOf(runs[end]) <= kMostBlocks))
      blocks += blocksOf(runs[end++]);
    double* const device = gpu.scratchOf<double>(blocks);
    for (int64_t r = first, at = 0; r < end; at += blocksOf(runs[r++])) {
      if (runs[r].count == 0) continue;
      launch(sumOfSquaresKernel, static_cast<unsigned>(blocksOf(runs[r])), kThreads, 0, gpu.stream(), runs[r].data,
             runs[r].count, device + at);
    }
    partial.resize(static_cast<size_t>(blocks));
    if (blocks > 0) gpu.give(partial.data(), device, blocks);
    double* at = partial.data();
    for (int64_t r = first; r < end; ++r) {
      const int64_t own = blocksOf(runs[r]);
      for (int64_t n = own; n > 1; n = (n + 1) / 2) {
        for (int64_t i = 0; i < n; i += 2) at[i / 2] = i + 1 < n ? at[i] + at[i + 1] : at[i];
      }
      sums[r] = own == 0 ? 0 : at[0];
      at += own;
    }
  }
}

void adamw(Queue& queue, const AdamW& a, int64_t count, float* parameter, float* m, float* v, float* gradient,
           const WeightLayout* layout, void* weights) {
  const Update update(a, parameter, m, v, gradient);
  if (layout != nullptr) {
    forPairs(queue, *layout, UpdateAndPublish{update, static_cast<BFloat16*>(weights)});
  } else if (count > 0) {
    launch(updateKernel, blocksFor(count, kThreads * kEach), kThreads, 0, onGpu(queue).stream(), count, update);
  }
}

}  // namespace lockstep::kernels::cuda
