#include "kernels/cpu/linear_block.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

namespace {

// Scratch of one thread, in floats: staged right operand, packed left operand (where it is not packed once for all
// strips), and the accumulators of every level.
struct BlockScratch {
  float* right;
  float* left;
  float* levels;

  static constexpr int64_t kRightFloats = kDepth * kStripStride;
  static constexpr int64_t kLeftBlockFloats = kLeftTiles * kTileRows * kLeftFloats;
  static constexpr int64_t kLevelFloats = kBlockTiles * kTileRows * kStripStride;
  static size_t bytes(int levels) {
    return static_cast<size_t>(kRightFloats + kLeftBlockFloats + (levels + 1) * kLevelFloats) * sizeof(float);
  }
  explicit BlockScratch(void* memory)
      : right(static_cast<float*>(memory)), left(right + kRightFloats), levels(left + kLeftBlockFloats) {}
};

// The steps of a leaf, cut into blocks of nearly equal depth that fit the cache. An empty leaf is one block of no
// steps.
struct Depth {
  int64_t steps, each, blocks;

  explicit Depth(int64_t count) : steps(count) {
    const int64_t fewest = steps > kDepth ? (steps + kDepth - 1) / kDepth : 1;
    each = smaller(roundUp((steps + fewest - 1) / fewest, 32), kDepth);
    blocks = steps > 0 ? (steps + each - 1) / each : 1;
  }
  int64_t first(int64_t block) const { return block * each; }
  int64_t count(int64_t block) const { return smaller(each, steps - first(block)); }
};

// The left operand packed once for all strips: block after block of steps, each with its tiles kLeftFloats * their
// rows apart. Null: every task packs what it needs.
struct PackedLeft {
  float* data = nullptr;
  int64_t origin = 0, rows = 0;

  float* at(int64_t block, int64_t row) const { return data + (block * rows + row - origin) * kLeftFloats; }
};

// Runs tiles against every group of the strip. `call` carries what all of them share; `left` holds the first tile;
// `from` (or null), call.levels and `to` are accumulators of the row `origin` on.
void runTiles(Form form, TileCall call, const float* left, const Tiles& tiles, int64_t origin, const Strip& strip,
              const float* const* rights, const int64_t* rightSteps, float* from, float* to, const Direct& direct) {
  const float* levels = call.levels;
  for (int g = 0; g < strip.count; ++g) {
    const Group& group = strip.groups[g];
    const bool straight = direct.takes(group);
    call.right = rights[g];
    call.rightStep = rightSteps[g];
    call.bias = nullptr;
    call.residual = nullptr;
    for (int64_t i = tiles.first; i < tiles.last; ++i) {
      const int64_t at = (tiles.begin(i) - origin) * kStripStride + group.at;
      call.left = left + (tiles.begin(i) - tiles.origin()) * kLeftFloats;
      call.leftStep = kLeftByRows ? 1 : tiles.count(i);
      call.from = from == nullptr ? nullptr : from + at;
      call.levels = levels + at;
      call.to = to + at;
      call.toStride = kStripStride;
      call.ahead = from == nullptr ? nullptr : call.from + tiles.count(i) * kStripStride;
      call.aheadStride = kStripStride;
      call.aheadLines = from == nullptr ? 0 : group.vectors;
      if (straight) direct.aim(call, tiles, i, group.output);
      runTile(form, static_cast<int>(tiles.count(i)), group.vectors, call);
    }
  }
}

// Tiles (at most kBlockTiles) of a strip.
void multiplyBlock(const BlockedProduct& product, const PackedLeft& packed, const Strip& strip, const Tiles& tiles,
                   BlockScratch scratch) {
  const int64_t leaves = product.leaves();
  float* const result = scratch.levels + treeLevels(leaves) * BlockScratch::kLevelFloats;
  const float* rights[kMaxGroups];
  int64_t rightSteps[kMaxGroups], blocksBefore = 0;
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    const Depth depth(product.steps(leaf));
    for (int64_t block = 0; block < depth.blocks; ++block) {
      const int64_t first = depth.first(block), count = depth.count(block);
      float* stage = scratch.right;
      for (int g = 0; g < strip.count; ++g) {
        rights[g] = product.right(leaf, strip.groups[g], first, count, stage, rightSteps[g]);
        stage += count * 16 * strip.groups[g].vectors;
      }
      const bool last = block == depth.blocks - 1;
      TileCall call{};
      call.steps = count;
      call.leftByRows = kLeftByRows;
      call.stride = kStripStride;
      call.levels = scratch.levels;
      call.levelStride = BlockScratch::kLevelFloats;
      call.levelCount = last ? __builtin_ctzll(~static_cast<uint64_t>(leaf)) : 0;
      float* const from = block == 0 ? nullptr : result;
      float* const to = last ? scratch.levels + call.levelCount * BlockScratch::kLevelFloats : result;
      for (int64_t i = tiles.first; i < tiles.last; i += kLeftTiles) {
        const Tiles some = tiles.range(i, smaller(i + kLeftTiles, tiles.last));
        const float* left = packed.data == nullptr ? scratch.left : packed.at(blocksBefore + block, some.origin());
        for (int64_t t = some.first; t < some.last && packed.data == nullptr; ++t) {
          float* const to = scratch.left + (some.begin(t) - some.origin()) * kLeftFloats;
          product.pack(leaf, first, count, some.begin(t), some.count(t), to);
        }
        const bool finished = last && leaf == leaves - 1;
        runTiles(product.form(), call, left, some, tiles.origin(), strip, rights, rightSteps, from, to,
                 finished ? product.direct : Direct{});
        if (!finished) continue;
        product.finish(result + (some.origin() - tiles.origin()) * kStripStride, kStripStride, strip, some.origin(),
                       some.allRows());
      }
    }
    blocksBefore += depth.blocks;
  }
}

// Blocks of rows. Staging a strip costs about as much as one tile of it; the fewest blocks that keep every thread busy
// to the end cost the least.
LOCKSTEP_INLINE int64_t rowBlocks(int64_t tiles, int64_t strips, int64_t threads) {
  const int64_t fewest = (tiles + kBlockTiles - 1) / kBlockTiles;
  int64_t best = fewest, bestCost = INT64_MAX;
  for (int64_t blocks = fewest; blocks <= smaller(tiles, fewest + 2 * threads); ++blocks) {
    const int64_t each = (tiles + blocks - 1) / blocks;
    const int64_t cost = (strips * blocks + threads - 1) / threads * (each + 1);
    if (cost < bestCost) {
      best = blocks;
      bestCost = cost;
    }
  }
  return best;
}

// The left operand is packed once for all strips; so many rows at a time that it stays near.
constexpr int64_t kPackedLeftBytes = int64_t{8} << 20;

// Bytes of a packed row of the left operand.
int64_t packedRowBytes(const BlockedProduct& product) {
  int64_t blocks = 0;
  for (int64_t leaf = 0; leaf < product.leaves(); ++leaf) blocks += Depth(product.steps(leaf)).blocks;
  return blocks * kLeftFloats * static_cast<int64_t>(sizeof(float));
}

// Packs the left operand of some tiles, on all threads, when several strips read it.
PackedLeft packLeft(Queue& queue, const BlockedProduct& product, const Tiles& tiles, int64_t strips) {
  const int64_t bytes = tiles.allRows() * packedRowBytes(product);
  if (strips < 2 || bytes > static_cast<int64_t>(queue.scratchBytes())) return {};
  const PackedLeft packed{static_cast<float*>(queue.shared(static_cast<size_t>(bytes))), tiles.origin(),
                          tiles.allRows()};
  deal(queue, tiles.size(), product.fmas(tiles.allRows()), [&](int64_t index, int) {
    const int64_t i = tiles.first + index;
    int64_t before = 0;
    for (int64_t leaf = 0; leaf < product.leaves(); ++leaf) {
      const Depth depth(product.steps(leaf));
      for (int64_t block = 0; block < depth.blocks; ++block, ++before) {
        float* const to = packed.at(before, tiles.begin(i));
        product.pack(leaf, depth.first(block), depth.count(block), tiles.begin(i), tiles.count(i), to);
      }
    }
  });
  return packed;
}

}  // namespace

void multiply(Queue& queue, const BlockedProduct& product, int64_t rows) {
  const size_t bytes = BlockScratch::bytes(treeLevels(product.leaves()));
  const Tiles all(rows);
  const int64_t strips = product.strips();
  const int64_t passes = rows * packedRowBytes(product) / kPackedLeftBytes + 1;
  queue.scratch(0, bytes);
  for (int64_t pass = 0; pass < passes; ++pass) {
    const Tiles some = all.range(all.last * pass / passes, all.last * (pass + 1) / passes);
    const int64_t blocks = rowBlocks(some.size(), strips, queue.threads());
    const PackedLeft packed = packLeft(queue, product, some, strips);
    deal(queue, strips * blocks, product.fmas(some.allRows()), [&](int64_t task, int thread) {
      const int64_t block = task % blocks, tiles = some.size();
      Strip strip;
      product.strip(task / blocks, strip);
      const BlockScratch scratch(queue.scratch(thread, bytes));
      multiplyBlock(product, packed, strip,
                    all.range(some.first + tiles * block / blocks, some.first + tiles * (block + 1) / blocks), scratch);
    });
  }
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
