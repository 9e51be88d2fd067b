// Matrix products with prepacked weights: y = x W^T and dx = dy W.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/product.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

const float* at(const Weight& w, int64_t element) {
  return reinterpret_cast<const float*>(static_cast<const char*>(w.data) + element * static_cast<int64_t>(bytesOf(w.dtype)));
}

// Which part and which panel of it a running panel number is.
struct PanelOfPart {
  const Part* part;
  int64_t panel;
};

template <class Count>
PanelOfPart locate(const WeightLayout& layout, int64_t number, const Count& panelsOf) {
  for (const Part& part : layout.parts) {
    const int64_t count = panelsOf(part);
    if (number < count) return {&part, number};
    number -= count;
  }
  return {nullptr, 0};
}

// The right operand of y = x W^T: the panels as they are. Parts of `in` are leaves; parts of `out` follow one another.
struct ForwardRight {
  const Weight& w;
  bool leaves;  // split along in

  Leaf leaf(int64_t l) const {
    if (leaves) return {w.layout->parts[static_cast<size_t>(l)].inBegin, w.layout->parts[static_cast<size_t>(l)].in};
    return {0, w.layout->in};
  }
  PanelOfPart find(int64_t panel, int64_t l) const {
    if (leaves) return {&w.layout->parts[static_cast<size_t>(l)], panel};
    return locate(*w.layout, panel, [](const Part& part) { return part.panels(); });
  }
  OutputPanel panel(int64_t p) const {
    const PanelOfPart at = find(p, 0);
    return {at.part->outBegin + at.panel * kPanel, least(kPanel, at.part->out - at.panel * kPanel)};
  }
  int64_t panels() const {
    int64_t count = 0;
    for (const Part& part : w.layout->parts) count = leaves ? part.panels() : count + part.panels();
    return count;
  }
  const float* prepare(int64_t panel, int64_t l, int64_t begin, int64_t count, Format format, float* buffer, int64_t* step) const {
    const PanelOfPart found = find(panel, l);
    const int64_t width = found.part->panelWidth(found.panel);
    *step = width;
    const float* from = at(w, found.part->panelOffset(found.panel) + begin * width);
    if (format.dtype == DType::kFloat32 || format.steps == Steps::kPairs) return from;
    widenPanel(from, width, (count + 1) / 2, static_cast<int>(width / 16), buffer);
    return buffer;
  }
};

// Rows n, n + 1, n + 2, n + 3 (columns of the panel) by columns k .. k + 3 (rows of the panel), transposed.
struct Block {
  __m128 n[4];
};

LOCKSTEP_INLINE Block transposed(__m128 a, __m128 b, __m128 c, __m128 d) {
  _MM_TRANSPOSE4_PS(a, b, c, d);
  return {{a, b, c, d}};
}

LOCKSTEP_INLINE __m128 evenOf(__m128i pairs) { return _mm_castsi128_ps(_mm_slli_epi32(pairs, 16)); }
LOCKSTEP_INLINE __m128 oddOf(__m128i pairs) { return _mm_castsi128_ps(_mm_and_si128(pairs, _mm_set1_epi32(static_cast<int>(0xffff0000u)))); }

// The right operand of dx = dy W: panels of 64 columns of W, made by transposing blocks of the packed ones. Parts of `out` are
// leaves; parts of `in` follow one another.
struct InputRight {
  const Weight& w;
  bool leaves;  // split along out

  static int64_t blocks(const Part& part) { return (part.in + kPanel - 1) / kPanel; }
  Leaf leaf(int64_t l) const {
    if (leaves) return {w.layout->parts[static_cast<size_t>(l)].outBegin, w.layout->parts[static_cast<size_t>(l)].out};
    return {0, w.layout->out};
  }
  PanelOfPart find(int64_t panel, int64_t l) const {
    if (leaves) return {&w.layout->parts[static_cast<size_t>(l)], panel};
    return locate(*w.layout, panel, blocks);
  }
  OutputPanel panel(int64_t p) const {
    const PanelOfPart at = find(p, 0);
    return {at.part->inBegin + at.panel * kPanel, least(kPanel, at.part->in - at.panel * kPanel)};
  }
  int64_t panels() const {
    if (leaves) return (w.layout->in + kPanel - 1) / kPanel;
    int64_t count = 0;
    for (const Part& part : w.layout->parts) count += blocks(part);
    return count;
  }
  const float* prepare(int64_t panel, int64_t l, int64_t begin, int64_t count, Format format, float* buffer, int64_t* step) const {
    const PanelOfPart found = find(panel, l);
    const Part& part = *found.part;
    const int64_t firstColumn = found.panel * kPanel, columns = least(kPanel, part.inPadded() - firstColumn), width = roundUp(least(kPanel, part.in - firstColumn), 16);
    *step = width;
    if (columns % 16 != 0) std::memset(buffer, 0, static_cast<size_t>(format.of(count) * width) * 4);
    for (int64_t n = 0; n < count; n += 4) {
      const int64_t q = (begin + n) / kPanel, panelWidth = part.panelWidth(q), inPanel = (begin + n) % kPanel;
      const int64_t rows = least(4, roundUp(count, 2) - n);
      for (int64_t k = 0; k < columns; k += 4) {
        const int64_t element = part.panelOffset(q) + (firstColumn + k) * panelWidth;
        store(buffer, read(element, panelWidth, inPanel, columns - k), n, rows, k, least(4, columns - k), width, count, format);
      }
    }
    return buffer;
  }

 private:
  // 4 columns of the panel from `inPanel`, 4 rows from the one at `element` (2 when no more are left).
  LOCKSTEP_MEMBER Block read(int64_t element, int64_t width, int64_t inPanel, int64_t left) const {
    if (w.dtype == DType::kFloat32) {
      const float* p = at(w, element) + inPanel;
      const __m128 zero = _mm_setzero_ps();
      return transposed(_mm_loadu_ps(p), _mm_loadu_ps(p + width), left > 2 ? _mm_loadu_ps(p + 2 * width) : zero, left > 2 ? _mm_loadu_ps(p + 3 * width) : zero);
    }
    const float* p = at(w, element) + inPanel;  // pairs
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i second = left > 2 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + width)) : _mm_setzero_si128();
    return transposed(evenOf(first), oddOf(first), evenOf(second), oddOf(second));
  }

  LOCKSTEP_MEMBER static void storeSome(float* to, __m128 x, int64_t columns) {
    if (columns == 4) return _mm_storeu_ps(to, x);
    _mm_storel_pi(reinterpret_cast<__m64*>(to), x);
  }

  LOCKSTEP_MEMBER void store(float* buffer, const Block& block, int64_t n, int64_t rows, int64_t k, int64_t columns, int64_t width, int64_t count, Format format) const {
    for (int64_t i = 0; i < rows; ++i) {
      const __m128 row = n + i < count ? block.n[i] : _mm_setzero_ps();
      if (format.dtype == DType::kFloat32) {
        if (n + i < count) storeSome(buffer + (n + i) * width + k, row, columns);
      } else if (format.steps == Steps::kPlain) {
        storeSome(buffer + ((n + i) ^ 1) * width + k, row, columns);
      } else if (i % 2 == 1) {
        const __m128i even = _mm_srli_epi32(_mm_castps_si128(block.n[i - 1]), 16);
        const __m128i odd = _mm_and_si128(_mm_castps_si128(row), _mm_set1_epi32(static_cast<int>(0xffff0000u)));
        storeSome(buffer + (n + i) / 2 * width + k, _mm_castsi128_ps(_mm_or_si128(even, odd)), columns);
      }
    }
  }
};

}  // namespace

void linear(Queue& queue, Operand x, const Weight& w, const float* bias, Output y) {
  const ForwardRight right{w, w.layout->split == Split::kIn};
  const int64_t leaves = right.leaves ? static_cast<int64_t>(w.layout->parts.size()) : 1;
  runProduct(queue, Product<ForwardRight>{x, leaves, right.panels(), right, {&y, bias}}, w.layout->elements);
}

void linearBackwardInput(Queue& queue, Operand dy, const Weight& w, Output dx) {
  const InputRight right{w, w.layout->split == Split::kOut};
  const int64_t leaves = right.leaves ? static_cast<int64_t>(w.layout->parts.size()) : 1;
  runProduct(queue, Product<InputRight>{dy, leaves, right.panels(), right, {&dx, nullptr}}, w.layout->elements);
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
