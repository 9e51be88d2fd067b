// Token and position embeddings. A token's vector runs through its panel with a stride of the panel's width. Forward, a
// thread takes an element of a row. Backward, the host groups the rows by what they add to (a token's vector or a
// position's), and a thread adds one element of all rows of a group, ascending: each chain has one owner, no atomics.
#include <algorithm>
#include <vector>

#include "kernels/cuda/cuda.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int kThreads = 256;  // columns of a block
constexpr int kAhead = 8;      // loads in flight of a thread

// Where the vector of a token starts (in the float32 order, k = 0) and the width of its panel.
struct TokenVector {
  int64_t offset;
  int width, slot;  // slot: n within the panel
};

TokenVector findToken(const WeightLayout& layout, int64_t token) {
  const Part* part = layout.parts.data();
  while (token >= part->outBegin + part->out) ++part;
  const int64_t n = token - part->outBegin, panel = n / kPanel;
  return {part->panelOffset(panel), static_cast<int>(part->panelWidth(panel)), static_cast<int>(n % kPanel)};
}

struct EmbeddedRow {
  TokenVector token;  // width 0: padding
  int position;
};

__global__ void embedKernel(const EmbeddedRow* rows, const void* data, DType dtype, const float* positionTable,
                            View<float> x) {
  const int64_t t = blockIdx.x, i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (i >= x.cols) return;
  const auto [token, position] = rows[t];
  float value = 0;
  if (token.width > 0) {
    value = dtype == DType::kFloat32 ? static_cast<const float*>(data)[token.offset + i * token.width + token.slot]
                                     : toFloat(static_cast<const BFloat16*>(
                                           data)[token.offset + i / 2 * 2 * token.width + 2 * token.slot + i % 2]);
    if (positionTable != nullptr) value = value + positionTable[position * x.cols + i];
  }
  x.row(t)[i] = value;
}

// Rows order[begin] .. order[end - 1] are added to the vector at `to`, whose elements are `stride` apart.
struct Group {
  float* to;
  int stride, begin, end;
};

// Appends the groups of rows with equal keys; negative keys have none. target(key): the vector and its stride.
template <class Target>
void addGroups(const int32_t* keys, int64_t rows, const Target& target, std::vector<Group>& groups,
               std::vector<int32_t>& order) {
  std::vector<uint64_t> sorted;  // key and row
  for (int64_t t = 0; t < rows; ++t) {
    if (keys[t] >= 0) sorted.push_back(static_cast<uint64_t>(keys[t]) << 32 | static_cast<uint64_t>(t));
  }
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 0; i < sorted.size(); ++i) {
    const auto key = static_cast<int64_t>(sorted[i] >> 32);
    const auto at = static_cast<int>(order.size());
    if (i == 0 || sorted[i - 1] >> 32 != sorted[i] >> 32) {
      const auto [to, stride] = target(key);
      groups.push_back({to, stride, at, at});
    }
    order.push_back(static_cast<int32_t>(sorted[i]));
    groups.back().end = at + 1;
  }
}

__global__ void addRowsKernel(const Group* groups, const int32_t* order, View<const float> dx) {
  const Group group = groups[blockIdx.x];
  const int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (i >= dx.cols) return;
  float* to = group.to + i * group.stride;
  float sum = *to;
  for (int j = group.begin; j < group.end; j += kAhead) {
    float values[kAhead];
    for (int a = 0; a < kAhead; ++a) values[a] = j + a < group.end ? dx.row(order[j + a])[i] : 0.0f;
    for (int a = 0; a < kAhead; ++a) sum = j + a < group.end ? sum + values[a] : sum;
  }
  *to = sum;
}

}  // namespace

void embed(Queue& queue, const int32_t* tokens, const int32_t* positions, const Weight& e, const float* positionTable,
           View<float> x) {
  if (x.rows == 0 || x.cols == 0) return;
  std::vector<EmbeddedRow> rows;
  rows.reserve(static_cast<size_t>(x.rows));
  for (int64_t t = 0; t < x.rows; ++t) {
    rows.push_back({tokens[t] < 0 ? TokenVector{0, 0, 0} : findToken(*e.layout, tokens[t]),
                    positions == nullptr ? 0 : positions[t]});
  }
  launch(embedKernel, dim3(blocksFor(x.rows, 1), blocksFor(x.cols, kThreads)), kThreads, 0, onGpu(queue).stream(),
         onGpu(queue).stage(rows.data(), x.rows), e.data, e.dtype, positionTable, x);
}

void embedBackward(Queue& queue, const int32_t* tokens, const int32_t* positions, View<const float> dx,
                   WeightGradient dE, float* dPositionTable) {
  std::vector<Group> groups;
  std::vector<int32_t> order;
  addGroups(
      tokens, dx.rows,
      [&](int64_t token) {
        const TokenVector vector = findToken(*dE.layout, token);
        return std::pair{dE.data + vector.offset + vector.slot, vector.width};
      },
      groups, order);
  if (dPositionTable != nullptr) {
    addGroups(
        positions, dx.rows,
        [&](int64_t position) {
          return std::pair{dPositionTable + position * dx.cols, 1};
        },
        groups, order);
  }
  if (groups.empty() || dx.cols == 0) return;
  const auto groupCount = static_cast<int64_t>(groups.size());
  const Group* const staged = onGpu(queue).stage(groups.data(), groupCount);
  launch(addRowsKernel, dim3(blocksFor(groupCount, 1), blocksFor(dx.cols, kThreads)), kThreads, 0,
         onGpu(queue).stream(), staged, onGpu(queue).stage(order.data(), static_cast<int64_t>(order.size())), dx);
}

}  // namespace lockstep::kernels::cuda
