// The blocked matrix product behind linear and its gradient to the input: strips of columns times blocks of rows, each
// computed from packed operands in cache, chain after chain and leaf after leaf of the tree, then handed to a finish.
#pragma once

#include "core/queue.h"
#include "kernels/cpu/linear_pack.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

namespace {

// Neighbouring columns of a product that one tile width covers.
struct Group {
  int64_t part;    // of the weight
  int64_t column;  // first column within the part
  int64_t at;      // where they stand in the block's accumulators
  int64_t output;  // column of the output matrix
  int64_t count;   // of the 16 * vectors columns, how many exist
  int vectors;
};

// A strip's staged right operand (256 KiB) and the packed left operand (448 KiB) share the second-level cache.
constexpr int64_t kStripColumns = 128;
constexpr int64_t kStripSlack = 48;                   // columns that a strip cut at odd places may cover on top
constexpr int64_t kLeftTiles = 224 / kTileRows;       // tiles whose left operands are in cache together
constexpr int64_t kBlockTiles = 512 / kTileRows + 2;  // tiles for which a strip's right operand is staged once
constexpr int64_t kStripStride = kStripColumns + kStripSlack;
constexpr int kMaxGroups = static_cast<int>(kStripStride / 16);

struct Strip {
  Group groups[kMaxGroups];
  int count = 0;
  int64_t columns = 0;
  // Of a strip that pairs gate with up columns: the gate columns (begin .. end - 1 of the part stand at 0) and where
  // the accumulators of the up columns begin.
  int64_t begin = 0, end = 0, second = 0;

  // Columns begin .. end - 1 of a part, cut at panels and tile widths. Begins at a multiple of 16 at or before `begin`.
  void add(int64_t part, int64_t begin, int64_t end, int64_t output) {
    for (int64_t c = begin / 16 * 16; c < end;) {
      const int64_t room = smaller((kPanel - c % kPanel) / 16, (end - c + 15) / 16);
      const int vectors = room >= kTileVectors ? kTileVectors : 1;
      groups[count++] = {part, c, columns, output + c, smaller(16 * vectors, end - c), vectors};
      columns += 16 * vectors;
      c += 16 * vectors;
    }
  }
};

// Strip `index` of the columns of `parts` parts, counted in tile widths; size(p) columns in part p, output(p) the
// first.
template <class Size, class Output>
LOCKSTEP_INLINE void cutStrip(int64_t index, int64_t parts, const Size& size, const Output& output, Strip& strip) {
  int64_t first = index * (kStripColumns / kTileColumns), left = kStripColumns / kTileColumns;
  for (int64_t p = 0; p < parts && left > 0; ++p) {
    const int64_t units = (size(p) + kTileColumns - 1) / kTileColumns, some = smaller(left, units - first);
    if (some > 0) {
      strip.add(p, first * kTileColumns, smaller((first + some) * kTileColumns, size(p)), output(p));
      left -= some;
    }
    first = first > units ? first - units : 0;
  }
}
template <class Size>
LOCKSTEP_INLINE int64_t countStrips(int64_t parts, const Size& size) {
  int64_t units = 0;
  for (int64_t p = 0; p < parts; ++p) units += (size(p) + kTileColumns - 1) / kTileColumns;
  return (units * kTileColumns + kStripColumns - 1) / kStripColumns;
}

// A tree of leaves: level l of the tree holds the sum of 2^l finished leaves.
LOCKSTEP_INLINE int treeLevels(int64_t leaves) {
  return __builtin_ctzll(static_cast<uint64_t>(leaves));
}

// Scratch of one thread, in floats: staged right operand, packed left operand (where it is not packed once for all
// strips), and the accumulators of every level.
struct BlockScratch {
  float* right;
  float* left;
  float* levels;

  static constexpr int64_t kRightFloats = kDepth * kStripStride;
  static constexpr int64_t kLeftFloats = kLeftTiles * kTileRows * kDepth;
  static constexpr int64_t kLevelFloats = kBlockTiles * kTileRows * kStripStride;
  static size_t bytes(int levels) {
    return static_cast<size_t>(kRightFloats + kLeftFloats + (levels + 1) * kLevelFloats) * sizeof(float);
  }
  explicit BlockScratch(void* memory)
      : right(static_cast<float*>(memory)), left(right + kRightFloats), levels(left + kLeftFloats) {}
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

// The left operand packed once for all strips: block after block of steps, each with its tiles kDepth * their rows
// apart. Null: every task packs what it needs.
struct PackedLeft {
  float* data = nullptr;
  int64_t rows = 0;

  float* at(int64_t block, int64_t row) const { return data + (block * rows + row) * kDepth; }
};

// Where finished tiles may go without passing by a finish: float32 with an optional bias and residual. Null: nowhere.
struct Direct {
  View<float> y;
  View<const float> residual;
  const float* bias = nullptr;

  // Only whole vectors can be stored by a tile.
  LOCKSTEP_MEMBER bool takes(const Group& group) const { return !y.empty() && group.count == 16 * group.vectors; }
  LOCKSTEP_MEMBER void aim(TileCall& call, const Tiles& tiles, int64_t i, int64_t column) const {
    const int64_t row = tiles.begin(i);
    call.bias = bias == nullptr ? nullptr : bias + column;
    call.residual = residual.empty() ? nullptr : residual.row(row) + column;
    call.residualStride = residual.stride;
    call.to = y.row(row) + column;
    call.toStride = y.stride;
  }
};

LOCKSTEP_INLINE Direct directOutput(const Output& y, const float* bias) {
  if (y.kind == Output::Kind::kAdd) return {y.f32, y.residual, bias};
  if (y.kind == Output::Kind::kStore) return {y.f32, {}, bias};
  if (y.operand.dtype != DType::kFloat32) return {};
  return {{y.operand.row<float>(0), y.operand.rows, y.operand.cols, y.operand.stride}, {}, bias};
}

// Runs tiles against every group of the strip. `call` carries what all of them share; `left` holds the first tile;
// `from` (or null), call.levels and `to` are accumulators of the row `origin` on.
inline void runTiles(Form form, TileCall call, const float* left, const Tiles& tiles, int64_t origin,
                     const Strip& strip, const float* const* rights, const int64_t* rightSteps, float* from, float* to,
                     const Direct& direct) {
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
      call.left = left + (tiles.begin(i) - tiles.origin()) * kDepth;
      call.leftStep = tiles.count(i);
      call.from = from == nullptr ? nullptr : from + at;
      call.levels = levels + at;
      call.to = to + at;
      call.toStride = kStripStride;
      if (straight) direct.aim(call, tiles, i, group.output);
      runTile(form, static_cast<int>(call.leftStep), group.vectors, call);
    }
  }
}

// Tiles (at most kBlockTiles) of a strip; finish(accumulators, strip, row, rows) takes finished rows, kStripStride
// apart. A product says: leaves(); steps(leaf); pack(leaf, first, steps, row, rows, to), which packs one tile; and
// right(leaf, group, first, steps, stage, rightStep): where the right operand lies, staged into `stage` or not.
template <class Product, class Finish>
void multiplyBlock(const Product& product, const PackedLeft& packed, const Strip& strip, const Tiles& tiles,
                   BlockScratch scratch, const Finish& finish) {
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
        stage += kDepth * 16 * strip.groups[g].vectors;
      }
      const bool last = block == depth.blocks - 1;
      TileCall call{};
      call.steps = count;
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
          float* const to = scratch.left + (some.begin(t) - some.origin()) * kDepth;
          product.pack(leaf, first, count, some.begin(t), some.count(t), to);
        }
        const bool finished = last && leaf == leaves - 1;
        runTiles(product.form(), call, left, some, tiles.origin(), strip, rights, rightSteps, from, to,
                 finished ? product.direct : Direct{});
        if (!finished) continue;
        finish(result + (some.origin() - tiles.origin()) * kStripStride, strip, some.origin(), some.allRows());
      }
    }
    blocksBefore += depth.blocks;
  }
}

// Products below this many FMAs run on the caller alone: waking a thread would cost more.
constexpr int64_t kTinyProduct = 50'000;

// body(task, thread) for every task.
template <class Body>
void deal(Queue& queue, int64_t tasks, int64_t fmas, const Body& body) {
  if (fmas < kTinyProduct) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  queue.pool().forEach(tasks, body);
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

// Packs the left operand once, on all threads, when several strips read it and it is small enough to stay near.
constexpr int64_t kPackedLeftBytes = int64_t{24} << 20;
template <class Product>
PackedLeft packLeft(Queue& queue, const Product& product, const Tiles& tiles, int64_t strips) {
  int64_t blocks = 0;
  for (int64_t leaf = 0; leaf < product.leaves(); ++leaf) blocks += Depth(product.steps(leaf)).blocks;
  const int64_t bytes = blocks * tiles.rows * kDepth * static_cast<int64_t>(sizeof(float));
  if (strips < 2 || bytes > smaller(kPackedLeftBytes, static_cast<int64_t>(queue.scratchBytes()))) return {};
  const PackedLeft packed{static_cast<float*>(queue.shared(static_cast<size_t>(bytes))), tiles.rows};
  deal(queue, tiles.last, product.fmas(tiles.rows), [&](int64_t i, int) {
    int64_t index = 0;
    for (int64_t leaf = 0; leaf < product.leaves(); ++leaf) {
      const Depth depth(product.steps(leaf));
      for (int64_t block = 0; block < depth.blocks; ++block, ++index) {
        float* const to = packed.at(index, tiles.begin(i));
        product.pack(leaf, depth.first(block), depth.count(block), tiles.begin(i), tiles.count(i), to);
      }
    }
  });
  return packed;
}

// All rows of a product. finish(accumulators, strip, row, rows) takes a finished block; product.strip(i, strip) fills
// the i-th of product.strips().
template <class Product, class Finish>
void multiply(Queue& queue, const Product& product, int64_t rows, const Finish& finish) {
  const size_t bytes = BlockScratch::bytes(treeLevels(product.leaves()));
  const Tiles all(rows);
  const int64_t strips = product.strips(), blocks = rowBlocks(all.last, strips, queue.threads());
  queue.scratch(0, bytes);
  const PackedLeft packed = packLeft(queue, product, all, strips);
  deal(queue, strips * blocks, product.fmas(rows), [&](int64_t task, int thread) {
    const int64_t block = task % blocks;
    const Tiles tiles = all.range(all.last * block / blocks, all.last * (block + 1) / blocks);
    Strip strip;
    product.strip(task / blocks, strip);
    const BlockScratch scratch(queue.scratch(thread, bytes));
    multiplyBlock(product, packed, strip, tiles, scratch, finish);
  });
}

// --- where results go ------------------------------------------------------------------------------------

LOCKSTEP_INLINE void putOperand(const Operand& y, int64_t row, int64_t col, Vec x, int64_t count) {
  if (y.dtype == DType::kFloat32) {
    storeUpTo(y.row<float>(row) + col, x, count);
  } else {
    storeUpTo(y.row<BFloat16>(row) + col, x, count);
  }
}

LOCKSTEP_INLINE void put(const Output& y, int64_t row, int64_t col, Vec x, int64_t count) {
  switch (y.kind) {
    case Output::Kind::kStore:
      return storeUpTo(y.f32.row(row) + col, x, count);
    case Output::Kind::kRound:
      return putOperand(y.operand, row, col, x, count);
    case Output::Kind::kAdd:
      return storeUpTo(y.f32.row(row) + col, loadUpTo(y.residual.row(row) + col, count) + x, count);
  }
}

// put(row, column, value + bias, count) for every vector of a finished block that has not gone its way directly.
template <class Put>
LOCKSTEP_INLINE void finishBlock(const float* accumulators, int64_t stride, const Strip& strip, int64_t row,
                                 int64_t rows, const Direct& direct, const float* bias, const Put& put) {
  for (int g = 0; g < strip.count; ++g) {
    const Group& group = strip.groups[g];
    if (direct.takes(group)) continue;
    for (int64_t c = 0; c < group.count; c += 16) {
      const int64_t count = smaller(16, group.count - c), column = group.output + c;
      const Vec offset = bias == nullptr ? zero() : loadUpTo(bias + column, count);
      const float* from = accumulators + group.at + c;
      for (int64_t r = 0; r < rows; ++r, from += stride) {
        put(row + r, column, bias == nullptr ? loadu(from) : loadu(from) + offset, count);
      }
    }
  }
}

}  // namespace

}  // namespace lockstep::kernels::LOCKSTEP_ISA
