#include "comm/tree_sum.h"

#include <immintrin.h>

#include <algorithm>

namespace lockstep::comm {

namespace {

constexpr int kFan = 8;          // addends that one pass sums in registers
constexpr int64_t kBlock = 512;  // floats of a partial sum: eight of them stay in the first-level cache

constexpr int leftOf(int n) {
  int left = 1;
  while (2 * left < n) left *= 2;
  return left;
}

inline void load(const float* from, float& x) {
  x = *from;
}
inline void load(const float* from, __m256& x) {
  x = _mm256_loadu_ps(from);
}

template <int N, class T>
inline T tree(const float* const* addends, int64_t i) {
  if constexpr (N == 1) {
    T x;
    load(addends[0] + i, x);
    return x;
  } else {
    constexpr int kLeft = leftOf(N);
    return tree<kLeft, T>(addends, i) + tree<N - kLeft, T>(addends + kLeft, i);
  }
}

template <int N>
void sum(const float* const* addends, float* out, int64_t begin, int64_t end) {
  const float* in[N];
  std::copy_n(addends, N, in);
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) {
    const __m256 low = tree<N, __m256>(in, i), high = tree<N, __m256>(in, i + 8);
    _mm256_storeu_ps(out + (i - begin), low);
    _mm256_storeu_ps(out + (i - begin) + 8, high);
  }
  for (; i < end; ++i) out[i - begin] = tree<N, float>(in, i);
}

using Sum = void (*)(const float* const*, float*, int64_t, int64_t);
constexpr Sum kSums[kFan] = {sum<1>, sum<2>, sum<3>, sum<4>, sum<5>, sum<6>, sum<7>, sum<8>};

}  // namespace

void treeSum(const float* const* addends, int n, float* out, int64_t count) {
  if (n <= kFan) return kSums[n - 1](addends, out, 0, count);
  // Eight consecutive addends are a subtree, and so are those left at the end: the tree of the partial sums is the
  // tree.
  alignas(64) float partial[kFan][kBlock];
  const float* partials[kFan];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    int subtrees = 0;
    for (int first = 0; first < n; first += kFan, ++subtrees) {
      kSums[std::min(kFan, n - first) - 1](addends + first, partial[subtrees], begin, end);
      partials[subtrees] = partial[subtrees];
    }
    kSums[subtrees - 1](partials, out + begin, 0, end - begin);
  }
}

}  // namespace lockstep::comm
