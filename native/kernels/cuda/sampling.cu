// One token per row of logits: greedy, or by inverse transform with top-k and top-p (Holtzman et al., 2020). A first
// kernel gives a block of threads to every part of every row: softmax statistics, and the sums of blocks of 256
// columns. A second one gives a block to every row: it finds where the prefixes of top-k and top-p end by radix
// selection over keys (the rank of a logit, then its id), which needs no sorting, and walks the running sum. Weights
// are computed anew wherever they are used, which is cheaper than a place for them. Counts and shares are integers, so
// the atomics that add them up show no order; the running sum, whose order counts, is one thread's.
#include <algorithm>
#include <vector>

#include "kernels/cuda/softmax.h"
#include "kernels/philox.h"
#include "kernels/scratch.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int kBlock = static_cast<int>(kSamplingBlock), kBuckets = static_cast<int>(kSamplingBuckets);
constexpr int kRowThreads = 1024;  // of the largest block of a row
constexpr int kDigit = 11;         // bits: 2^kDigit buckets
constexpr int kAhead = 8;          // loads in flight of the thread that walks
static_assert(1 << kDigit == kBuckets && kSoftmaxTile % kBlock == 0);

struct Sampled {
  int32_t token;
  float logprob;
};

__host__ __device__ float inverseTemperatureOf(const Sampling& settings) {
  return settings.temperature == 0 ? 1.0f : 1.0f / settings.temperature;
}

// Sums of the blocks of a tile in shared memory (or of any kBlock-wide blocks), 16 threads a block.
template <class Element>
__device__ float blockSum(int size, const Element& element) {
  return lanesSum16(static_cast<int>(threadIdx.x % 16), size, [&](float acc, int64_t i) { return acc + element(i); });
}

// --- parts -----------------------------------------------------------------------------------------------------------

__global__ void partWeightsKernel(View<const float> logits, const Part* parts, const Sampling* settings,
                                  SoftmaxPart* statistics, float* blocks, int64_t blocksOfRow) {
  const int64_t n = blockIdx.x, p = blockIdx.y;
  const Part part = parts[p];
  float* sums = blocks + n * blocksOfRow;
  for (int64_t q = 0; q < p; ++q) sums += (parts[q].out + kBlock - 1) / kBlock;
  const auto visit = [&](int64_t base, int size, const float* e) {
    const int groups = static_cast<int>(blockDim.x / 16), count = (size + kBlock - 1) / kBlock;
    for (int first = 0; first < count; first += groups) {  // the same for all threads of a warp: they shuffle
      const int block = first + static_cast<int>(threadIdx.x / 16), begin = block * kBlock;
      const int width = block < count ? (size - begin < kBlock ? size - begin : kBlock) : 0;
      const float sum = blockSum(width, [&](int64_t i) { return e[begin + i]; });
      if (block < count && threadIdx.x % 16 == 0) sums[base / kBlock + block] = sum;
    }
  };
  const SoftmaxPart all =
      softmaxPart(logits.row(n) + part.outBegin, inverseTemperatureOf(settings[n]), part.out, visit);
  if (threadIdx.x == 0) statistics[n * gridDim.y + p] = all;
}

// --- rows ------------------------------------------------------------------------------------------------------------

// The order of tokens: the largest logit first, ties by id. NaN counts as -inf, -0 as 0.
struct Keys {
  int idBits;

  __device__ uint64_t key(float x, int64_t id) const {
    const int32_t bits = std::bit_cast<int32_t>(x == x ? x + 0.0f : -std::numeric_limits<float>::infinity());
    const auto rank = static_cast<uint32_t>(bits ^ (~(bits >> 31) & 0x7fffffff));
    return static_cast<uint64_t>(rank) << idBits | static_cast<uint64_t>(id);
  }
  __device__ int64_t id(uint64_t key) const { return static_cast<int64_t>(key & ((uint64_t{1} << idBits) - 1)); }
};

// Of one row, in shared memory, what its threads tell each other.
struct Told {
  uint64_t before, end;  // measures of the keys below the digits `end` that have been found
  uint64_t sums[kWarp];  // of warps
  double sum, total;
  float m, logZ;
  int64_t token, begin, size;  // of the row; first column and width of the block that the walk has reached
  int part;
};

struct Row {
  const float* logits;
  float inverseTemperature;
  const Part* parts;
  int partCount;
  const SoftmaxPart* statistics;
  const float* scales;  // a_p
  float* blocks;
  Keys keys;
  uint64_t end;          // the last key that is kept
  unsigned *low, *high;  // the histogram: halves of its buckets' sums
  Told* told;

  __device__ float x(int64_t v) const { return logits[v] * inverseTemperature; }
  // e_v, of a token of part p.
  __device__ float weight(int64_t v, int p) const {
    const float at = x(v);
    return keys.key(at, v) <= end ? exp(below(at, statistics[p].m)) : 0.0f;
  }
  __device__ uint64_t share(int64_t v, int p) const {
    return static_cast<uint64_t>(
        static_cast<int64_t>(static_cast<double>(weight(v, p)) * static_cast<double>(scales[p]) * 0x1p40));
  }
  template <class Body>
  __device__ void eachToken(const Body& body) const {
    for (int p = 0; p < partCount; ++p) {
      const int64_t stop = parts[p].outBegin + parts[p].out;
      for (int64_t v = parts[p].outBegin + threadIdx.x; v < stop; v += blockDim.x) body(v, p);
    }
  }
};

// All threads get the smallest of their values.
__device__ uint64_t smallest(uint64_t value, Told* told) {
  for (int width = kWarp / 2; width >= 1; width /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, value, width);
    if (other < value) value = other;
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) told->sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
    if (told->sums[warp] < value) value = told->sums[warp];
  }
  return value;
}

// The sum of the values of the threads before, and of all.
__device__ uint64_t sumBefore(uint64_t value, uint64_t* all, Told* told) {
  const unsigned lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp;
  uint64_t sum = value;
  for (int by = 1; by < kWarp; by *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, sum, by);
    if (lane >= static_cast<unsigned>(by)) sum += other;
  }
  if (lane == kWarp - 1) told->sums[own] = sum;
  __syncthreads();
  uint64_t result = sum - value;
  *all = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
    if (warp < own) result += told->sums[warp];
    *all += told->sums[warp];
  }
  return result;
}

// The key at which the shortest prefix in the order of keys ends whose measures sum to limit(sum of all of them), or
// the largest key when none does. measure(v, p) of token v in part p is an integer. A pass fixes the next digit of the
// key.
template <class Measure, class Limit>
__device__ uint64_t prefixEnd(const Row& row, const Measure& measure, const Limit& limitOf) {
  const int each = kBuckets / static_cast<int>(blockDim.x);  // buckets of a thread
  const int mine = static_cast<int>(threadIdx.x) * each, bits = 32 + row.keys.idBits;
  uint64_t end = 0, before = 0, limit = 0;
  for (int high = bits; high > 0; high = high > kDigit ? high - kDigit : 0) {
    const int shift = high > kDigit ? high - kDigit : 0;
    const unsigned mask = (1u << (high - shift)) - 1;
    for (int i = static_cast<int>(threadIdx.x); i < kBuckets; i += static_cast<int>(blockDim.x)) {
      row.low[i] = 0;
      row.high[i] = 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) row.told->end = ~uint64_t{0};  // all have read what the last pass found
    row.eachToken([&](int64_t v, int p) {
      const uint64_t key = row.keys.key(row.x(v), v);
      if (high < bits && key >> high != end) return;
      const uint64_t value = measure(v, p);
      if (value == 0) return;
      const auto bucket = static_cast<unsigned>(key >> shift) & mask;
      // Shared memory adds 32 bits at a time; whoever makes the lower half overflow carries.
      const auto lower = static_cast<unsigned>(value);
      const unsigned old = atomicAdd(row.low + bucket, lower);
      const unsigned upper = static_cast<unsigned>(value >> 32) + (old + lower < lower ? 1u : 0u);
      if (upper != 0) atomicAdd(row.high + bucket, upper);
    });
    __syncthreads();
    const auto bucketSum = [&](int i) { return static_cast<uint64_t>(row.high[i]) << 32 | row.low[i]; };
    uint64_t own = 0, all = 0;
    for (int i = mine; i < mine + each; ++i) own += bucketSum(i);
    uint64_t sum = before + sumBefore(own, &all, row.told);
    if (high == bits) limit = limitOf(all);
    if (sum < limit && sum + own >= limit) {  // of one thread
      int i = mine;
      while (sum + bucketSum(i) < limit) sum += bucketSum(i++);
      row.told->before = sum;
      row.told->end = end << (high - shift) | static_cast<uint64_t>(i);
    }
    __syncthreads();
    before = row.told->before;
    end = row.told->end;
    if (end == ~uint64_t{0}) return end;
  }
  return end;
}

// The sums of blocks of what is kept, 16 threads a block.
__device__ void sumBlocks(const Row& row) {
  const int groups = static_cast<int>(blockDim.x / 16);
  float* sums = row.blocks;
  for (int p = 0; p < row.partCount; ++p) {
    const Part part = row.parts[p];
    const int64_t count = (part.out + kBlock - 1) / kBlock;
    for (int64_t first = 0; first < count; first += groups) {
      const int64_t block = first + threadIdx.x / 16, begin = block * kBlock, left = part.out - begin;
      const int width = block < count ? static_cast<int>(left < kBlock ? left : kBlock) : 0;
      const float sum = blockSum(width, [&](int64_t i) { return row.weight(part.outBegin + begin + i, p); });
      if (block < count && threadIdx.x % 16 == 0) sums[block] = sum;
    }
    sums += count;
  }
  __syncthreads();
}

// One thread: the running sum over blocks, which `told` gets as it stands before the block that passes `target`, or in
// the end; and the last block with any weight that it has entered.
__device__ void walkBlocks(const Row& row, double target) {
  Told& told = *row.told;
  const float* sums = row.blocks;
  double sum = 0;
  told.part = 0;
  told.begin = 0;
  told.size = 0;
  for (int p = 0; p < row.partCount; ++p) {
    const int64_t out = row.parts[p].out, count = (out + kBlock - 1) / kBlock;
    const double scale = static_cast<double>(row.scales[p]);
    for (int64_t first = 0; first < count; first += kAhead) {
      double weights[kAhead];
      for (int j = 0; j < kAhead; ++j) {
        weights[j] = first + j < count ? static_cast<double>(sums[first + j]) * scale : 0.0;
      }
      for (int j = 0; j < kAhead; ++j) {
        const double after = sum + weights[j];
        if (weights[j] > 0) {
          const int64_t begin = (first + j) * kBlock;
          told.part = p;
          told.begin = row.parts[p].outBegin + begin;
          told.size = out - begin < kBlock ? out - begin : kBlock;
        }
        if (after > target) {
          told.sum = sum;
          return;
        }
        sum = after;
      }
    }
    sums += count;
  }
  told.sum = sum;
}

// The sum of all weights that are kept, to all threads.
__device__ double totalWeight(const Row& row) {
  if (threadIdx.x == 0) {
    walkBlocks(row, std::numeric_limits<double>::infinity());
    row.told->total = row.told->sum;
  }
  __syncthreads();
  return row.told->total;
}

// The first token whose running sum exceeds target; rounding may leave none inside the last block entered, whose last
// token with weight it is then. To thread 0.
__device__ int64_t findToken(const Row& row, double target, float* e) {
  if (threadIdx.x == 0) walkBlocks(row, target);
  __syncthreads();
  const Told& told = *row.told;
  for (int i = static_cast<int>(threadIdx.x); i < told.size; i += static_cast<int>(blockDim.x)) {
    e[i] = row.weight(told.begin + i, told.part);
  }
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  const double scale = static_cast<double>(row.scales[told.part]);
  double sum = told.sum;
  int last = 0;
  for (int i = 0; i < told.size; ++i) {
    if (e[i] > 0) last = i;
    sum += static_cast<double>(e[i]) * scale;
    if (sum > target) return told.begin + i;
  }
  return told.begin + last;
}

__global__ void __launch_bounds__(kRowThreads)
    sampleKernel(View<const float> logits, const Part* parts, int partCount, const Sampling* settings,
                 const SoftmaxPart* statistics, float* blocks, int64_t blocksOfRow, int idBits, Sampled* sampled) {
  __shared__ Shared<unsigned[kBuckets]> low;
  __shared__ Shared<unsigned[kBuckets]> high;
  __shared__ Shared<float[kBlock]> weights;
  __shared__ Shared<Told> shared;
  Told& told = shared;
  const int64_t n = blockIdx.x, vocabulary = logits.cols;
  const Sampling own = settings[n];
  SoftmaxPart* tree = shared_memory<SoftmaxPart>();            // [parts]
  float* scales = reinterpret_cast<float*>(tree + partCount);  // [parts]
  Row row{logits.row(n),
          inverseTemperatureOf(own),
          parts,
          partCount,
          statistics + n * partCount,
          scales,
          blocks + n * blocksOfRow,
          Keys{idBits},
          ~uint64_t{0},
          low,
          high,
          &told};

  for (int p = static_cast<int>(threadIdx.x); p < partCount; p += static_cast<int>(blockDim.x)) {
    tree[p] = row.statistics[p];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const SoftmaxPart all = mergeTree(tree, partCount);
    told.m = all.m;
    told.logZ = all.m + log(all.s);
  }
  __syncthreads();
  for (int p = static_cast<int>(threadIdx.x); p < partCount; p += static_cast<int>(blockDim.x)) {
    scales[p] = exp(below(row.statistics[p].m, told.m));
  }
  __syncthreads();

  double total = own.temperature == 0 ? 0.0 : totalWeight(row);
  int64_t token = 0;
  if (total > 0) {
    const bool byCount = own.topK > 0 && own.topK < vocabulary, byShare = own.topP < 1;
    if (byCount) {
      row.end = prefixEnd(
          row, [](int64_t, int) { return uint64_t{1}; }, [&](uint64_t) { return static_cast<uint64_t>(own.topK); });
    }
    if (byShare) {
      row.end = prefixEnd(
          row, [&](int64_t v, int p) { return row.share(v, p); },
          [&](uint64_t all) {
            const auto enough = static_cast<int64_t>(static_cast<double>(own.topP) * static_cast<double>(all));
            return static_cast<uint64_t>(enough > 1 ? enough : 1);
          });
    }
    if (byCount || byShare) {
      sumBlocks(row);
      total = totalWeight(row);
    }
    token = findToken(row, uniform(own.seed, own.request, own.position) * total, weights);
  } else {  // greedy, or no weights to speak of: the argmax
    uint64_t first = ~uint64_t{0};
    row.eachToken([&](int64_t v, int) {
      const uint64_t key = row.keys.key(row.x(v), v);
      if (key < first) first = key;
    });
    token = row.keys.id(smallest(first, &told));
  }
  if (threadIdx.x == 0) {
    sampled[n] = {static_cast<int32_t>(token), row.x(token) - told.logZ};
  }
}

}  // namespace

void sample(Queue& queue, View<const float> logits, const WeightLayout& vocabulary, const Sampling* settings,
            int32_t* tokens, float* logprobs) {
  if (logits.rows == 0) return;
  lockstep::cuda::Queue& gpu = onGpu(queue);
  const int64_t rows = logits.rows, blocksOfRow = samplingBlocks(vocabulary);
  const auto parts = static_cast<int64_t>(vocabulary.parts.size());
  int idBits = 1;
  while ((int64_t{1} << idBits) < vocabulary.out) ++idBits;
  // A row has one block of threads: a large one when its vocabulary has work for it.
  const bool large = vocabulary.out >= kRowThreads;
  const unsigned partThreads = large ? 256 : 64, rowThreads = large ? kRowThreads : 64;

  static_assert(sizeof(Sampled) == 8 && sizeof(SoftmaxPart) == 12);
  auto* const sampled =
      static_cast<Sampled*>(gpu.scratch(static_cast<size_t>(rows * (8 + parts * 12 + blocksOfRow * 4))));
  auto* const statistics = reinterpret_cast<SoftmaxPart*>(sampled + rows);
  auto* const blocks = reinterpret_cast<float*>(statistics + rows * parts);
  const Part* const stagedParts = gpu.stage(vocabulary.parts.data(), parts);
  const Sampling* const stagedSettings = gpu.stage(settings, rows);
  launch(partWeightsKernel, dim3(blocksFor(rows, 1), blocksFor(parts, 1)), partThreads, 0, gpu.stream(), logits,
         stagedParts, stagedSettings, statistics, blocks, blocksOfRow);
  launch(sampleKernel, blocksFor(rows, 1), rowThreads,
         static_cast<size_t>(parts) * (sizeof(SoftmaxPart) + sizeof(float)), gpu.stream(), logits, stagedParts,
         static_cast<int>(parts), stagedSettings, statistics, blocks, blocksOfRow, idBits, sampled);
  std::vector<Sampled> result(static_cast<size_t>(rows));
  gpu.give(result.data(), sampled, rows);
  for (int64_t n = 0; n < rows; ++n) {
    tokens[n] = result[static_cast<size_t>(n)].token;
    logprobs[n] = result[static_cast<size_t>(n)].logprob;
  }
}

}  // namespace lockstep::kernels::cuda
