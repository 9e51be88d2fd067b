// Forward attention: one task takes a tile of query rows and the query heads of one key/value head through the pages
// they see, in order. Training, prefill and decode are this one function; they differ in how many rows a tile has.
#include <limits>

#include "kernels/cpu/attention_tasks.h"
#include "kernels/cpu/cpu.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

// Rows (query rows times heads) whose queries and outputs a task keeps: with K = 128 they and a widened page are 320
// KiB, within a level-2 cache.
constexpr int64_t kTaskRows = 256;
// Rows of scores at a time: 64 x 64 float32 is half a level-1 cache.
constexpr int64_t kScoreRows = 64;
// From this many rows on, widening a bfloat16 page costs less than splitting its pairs again for each tile of rows.
constexpr int64_t kWideRows = 16;

struct ForwardCall {
  const AttentionShape& shape;
  const Operand &q, &out;
  const KvPages& kv;
  const Sequences& sequences;
  View<float> logSumExp;
};

struct ForwardScratch {
  float *queries, *o, *m, *l, *scores, *panels;
  int32_t* position;  // of each row
  int64_t units;      // of a row of queries
  int64_t ldo;        // of a row of o

  static ForwardScratch make(Carver& carver, const AttentionShape& shape, int64_t rows) {
    const int64_t padded = roundUp(shape.headWidth, kPanelGrain), units = roundUp(shape.headWidth, 2);
    ForwardScratch s{};
    s.units = units;
    s.ldo = padded;
    s.queries = carver.floats(rows * units);
    s.o = carver.floats(rows * padded);
    s.m = carver.floats(rows);
    s.l = carver.floats(rows);
    s.position = reinterpret_cast<int32_t*>(carver.floats(rows));
    s.scores = carver.floats(kScoreRows * kPagePositions);
    s.panels = carver.floats(kPagePositions * (units + padded));
    return s;
  }
};

template <Chain kChain>
LOCKSTEP_INLINE void storeWeights(float* scores, int64_t slot, Vec e) {
  if constexpr (kChain == Chain::kPlain) {
    storeu(scores + slot, e);
  } else if constexpr (kChain == Chain::kSwapped) {
    storeu(scores + slot, rounded(e));
  } else {
    storeu(reinterpret_cast<BFloat16*>(scores) + slot, e);
  }
}

// One row's step of the online softmax over the slots begin..end-1 of a page: scores become rounded weights in place, m
// and l move on, o is rescaled.
template <Chain kChain>
void softmaxStep(float* scores, int64_t begin, int64_t end, float scale, float* m, float* l, float* o, int64_t ldo) {
  constexpr int kVectors = kPagePositions / 16;
  const Vec lowest = Vec::broadcast(-std::numeric_limits<float>::infinity());
  const Vec factor = Vec::broadcast(scale);
  Vec s[kVectors];
  Vec top = lowest;
  const int first = static_cast<int>(begin / 16), last = static_cast<int>((end + 15) / 16);
  for (int c = first; c < last; ++c) {
    s[c] = factor * loadu(scores + 16 * c);
    top = maximum(top, selectSlots(16 * c, begin, end, s[c], lowest));
  }
  const float newMax = maximum(*m, lanesMaximum(top));
  const Vec shift = Vec::broadcast(newMax);
  Vec sum = zero();
  for (int c = first; c < last; ++c) {
    const Vec e = selectSlots(16 * c, begin, end, exp(s[c] - shift), zero());
    sum = sum + e;
    storeWeights<kChain>(scores, 16 * c, e);
  }
  // Before the first page m is -inf and l and o are 0: a is 0, which changes neither.
  const float a = exp(*m - newMax);
  *l = fma(*l, a, lanesSum(sum));
  *m = newMax;
  if (a == 1.0f) return;
  const Vec rescale = Vec::broadcast(a);
  for (int64_t i = 0; i < ldo; i += 16) storeu(o + i, loadu(o + i) * rescale);
}

template <Chain kChain>
void finishRow(const ForwardCall& call, const ForwardScratch& s, int64_t r, int64_t row, int64_t h) {
  const int64_t width = call.shape.headWidth;
  const Vec l = Vec::broadcast(s.l[r]);
  const float* o = s.o + r * s.ldo;
  const auto write = [&](auto* out) {
    eachVector(width, [&](int64_t i, auto lanes) { store(out + i, loadu(o + i) / l, lanes); });
  };
  if constexpr (kChain == Chain::kPlain) {
    write(call.out.row<float>(row) + h * width);
  } else {
    write(call.out.row<BFloat16>(row) + h * width);
  }
  if (!call.logSumExp.empty()) call.logSumExp.row(h)[row] = s.m[r] + log(s.l[r]);
}

// The heads headBegin..headBegin+heads-1, all of key/value head g, of one tile of query rows.
template <Chain kChain>
void attendTile(const ForwardCall& call, const QueryTile& tile, int64_t g, int64_t headBegin, int64_t heads,
                const ForwardScratch& s) {
  const AttentionShape& shape = call.shape;
  const int64_t width = shape.headWidth, rows = tile.count * heads, units = unitsOf<kChain>(width);
  for (int64_t head = 0, r = 0; head < heads; ++head) {
    for (int64_t i = 0; i < tile.count; ++i, ++r) {
      packRow<kChain>(call.q, tile.row + i, (headBegin + head) * width, width, s.queries + r * units);
      s.m[r] = -std::numeric_limits<float>::infinity();
      s.l[r] = 0.0f;
      s.position[r] = static_cast<int32_t>(tile.position + i);
    }
  }
  memset(s.o, 0, rows * s.ldo * sizeof(float));

  const int32_t* pages = call.sequences.pages + tile.sequence * call.sequences.pageStride;
  const int64_t lastPage = (tile.position + tile.count - 1) / kPagePositions;
  for (int64_t page = firstVisible(shape, tile.position) / kPagePositions; page <= lastPage; ++page) {
    const PagePanels panels = pagePanels<kChain>(call.kv, pages[page], g, s.panels);
    const int64_t base = page * kPagePositions;
    for (int64_t block = 0; block < rows; block += kScoreRows) {
      const int64_t count = rows - block < kScoreRows ? rows - block : kScoreRows;
      int32_t begin[kScoreRows], end[kScoreRows];
      for (int64_t r = 0; r < count; ++r) {
        const int64_t first = firstVisible(shape, s.position[block + r]), last = s.position[block + r] - base + 1;
        begin[r] = static_cast<int32_t>(first > base ? first - base : 0);
        end[r] = static_cast<int32_t>(last < kPagePositions ? last : kPagePositions);
        if (begin[r] >= end[r]) begin[r] = end[r] = 0;
      }
      const Rows queries{s.queries + block * units, units, 1};
      multiply<kChain>(queries, count, {panels.key, kPagePositions}, kPagePositions / 16, groupsOf<kChain>(width), end,
                       s.scores, kPagePositions);
      for (int64_t r = 0; r < count; ++r) {
        if (begin[r] == end[r]) continue;
        softmaxStep<kChain>(s.scores + r * kPagePositions, begin[r], end[r], shape.scale, s.m + block + r,
                            s.l + block + r, s.o + (block + r) * s.ldo, s.ldo);
      }
      for (int64_t n = 0; n < s.ldo; n += kPanel) {
        const int64_t w = s.ldo - n < kPanel ? s.ldo - n : kPanel;
        accumulate<kChain>({s.scores, kPagePositions, 1}, count,
                           {panels.value + unitsOf<kChain>(kPagePositions) * n, w}, w / 16, begin, end,
                           s.o + block * s.ldo + n, s.ldo);
      }
    }
  }
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t i = 0; i < tile.count; ++i)
      finishRow<kChain>(call, s, head * tile.count + i, tile.row + i, headBegin + head);
  }
}

// Query heads per task: as many of a key/value head's as fit, fewer when there would be too few tasks for the threads.
int64_t headsPerTask(int64_t group, int64_t tileRows, int64_t tilesOfAllHeads, int64_t threads) {
  int64_t heads = kTaskRows / tileRows < group ? kTaskRows / tileRows : group;
  while (heads > 1 && tilesOfAllHeads * ((group + heads - 1) / heads) < 2 * threads) heads = (heads + 1) / 2;
  return heads;
}

}  // namespace

void attention(Queue& queue, const AttentionShape& shape, Operand q, const KvPages& kv, const Sequences& sequences,
               Operand out, View<float> logSumExp) {
  const ForwardCall call{shape, q, out, kv, sequences, logSumExp};
  forEachPaddingRow(sequences, out.rows, [&](int64_t row) {
    memset(out.rowBytes(row), 0, shape.heads * shape.headWidth * bytesOf(out.dtype));
  });
  const size_t head = QueryTiles::bytes(sequences);
  Carver sizes;
  ForwardScratch::make(sizes, shape, kTaskRows);
  const size_t bytes = head + sizes.used;
  const QueryTiles tiles{sequences, kPagePositions, static_cast<int32_t*>(queue.scratch(0, bytes))};
  tiles.fill();

  int64_t longest = 1;
  for (int64_t b = 0; b < sequences.count; ++b) longest = sequences.length[b] > longest ? sequences.length[b] : longest;
  const int64_t group = shape.heads / shape.keyValueHeads;
  const int64_t tileRows = longest < kPagePositions ? longest : kPagePositions;
  const int64_t heads = headsPerTask(group, tileRows, tiles.total() * shape.keyValueHeads, queue.threads());
  const int64_t splits = (group + heads - 1) / heads, perTile = shape.keyValueHeads * splits;
  const int64_t tasks = tiles.total() * perTile;
  queue.pool().forEach(tasks, [&](int64_t index, int thread) {
    Carver carver{static_cast<char*>(queue.scratch(thread, bytes)) + head};
    const ForwardScratch scratch = ForwardScratch::make(carver, shape, kTaskRows);
    // Later tiles of a sequence see more keys: they go first, so that threads finish together.
    const QueryTile tile = tiles.at(tiles.total() - 1 - index / perTile);
    const int64_t g = index % perTile / splits, headBegin = index % splits * heads;
    const int64_t count = headBegin + heads < group ? heads : group - headBegin;
    if (q.dtype == DType::kFloat32) {
      attendTile<Chain::kPlain>(call, tile, g, g * group + headBegin, count, scratch);
    } else if (tile.count * count < kWideRows) {
      attendTile<Chain::kPairs>(call, tile, g, g * group + headBegin, count, scratch);
    } else {
      attendTile<kWideBFloat16>(call, tile, g, g * group + headBegin, count, scratch);
    }
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
