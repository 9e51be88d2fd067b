// Sixteen float32 lanes, `Vec`: one register with AVX-512, two with AVX2. The fast kernels are written against this
// file only. Every function is force-inlined and lives in the namespace of its instruction set, so the linker can never
// put a copy compiled for AVX-512 in the place of one that must run without it.
//
// Conventions: load/store need 64-byte alignment, loadu/storeu none; loadPartial/storePartial touch the first `count`
// lanes only (0..16; the other lanes load as zero). FTZ and DAZ are set on the thread. Comparison and minimum/maximum
// follow the instructions: maximum(a, b) = a > b ? a : b, so the right operand wins when either is NaN.
#pragma once

// GCC 12 takes the deliberately undefined operands inside its own intrinsics for uninitialized variables.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

#include "core/dtype.h"

#ifndef LOCKSTEP_ISA
#error "compile once per instruction set with -DLOCKSTEP_ISA=avx2, avx512 or avx512_bf16"
#endif
#ifndef LOCKSTEP_INLINE
#define LOCKSTEP_INLINE static inline __attribute__((always_inline))
#endif
#define LOCKSTEP_MEMBER inline __attribute__((always_inline))

namespace lockstep::kernels::LOCKSTEP_ISA {

constexpr int64_t kLanes = 16;

// A bfloat16 pair is a dword: the element of even index in the low half, the odd one in the high half.
#ifdef __AVX512F__

struct Vec {
  __m512 v;
  static LOCKSTEP_MEMBER Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
};
struct Pairs {
  __m512i v;
};
// Lanes selected by a comparison or by a count.
struct Mask {
  __mmask16 m;
};

LOCKSTEP_INLINE Mask firstLanes(int64_t count) {
  return {static_cast<__mmask16>(count >= kLanes ? 0xffffu : (1u << count) - 1u)};
}

LOCKSTEP_INLINE Vec zero() {
  return {_mm512_setzero_ps()};
}
LOCKSTEP_INLINE Vec load(const float* p) {
  return {_mm512_load_ps(p)};
}
LOCKSTEP_INLINE Vec loadu(const float* p) {
  return {_mm512_loadu_ps(p)};
}
LOCKSTEP_INLINE Vec loadPartial(const float* p, int64_t count) {
  return {_mm512_maskz_loadu_ps(firstLanes(count).m, p)};
}
LOCKSTEP_INLINE void store(float* p, Vec a) {
  _mm512_store_ps(p, a.v);
}
LOCKSTEP_INLINE void storeu(float* p, Vec a) {
  _mm512_storeu_ps(p, a.v);
}
LOCKSTEP_INLINE void storePartial(float* p, Vec a, int64_t count) {
  _mm512_mask_storeu_ps(p, firstLanes(count).m, a.v);
}

LOCKSTEP_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}
LOCKSTEP_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
LOCKSTEP_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
LOCKSTEP_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}
// a b + c, rounded once.
LOCKSTEP_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
// *a b + c with *a broadcast as an operand of the FMA: one instruction less, one load more where *a is used again.
LOCKSTEP_INLINE Vec fmaBroadcast(const float* a, Vec b, Vec c) {
  __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c.v) : "v"(b.v), "m"(*a));
  return c;
}
LOCKSTEP_INLINE Vec squareRoot(Vec a) {
  return {_mm512_sqrt_ps(a.v)};
}
LOCKSTEP_INLINE Vec minimum(Vec a, Vec b) {
  return {_mm512_min_ps(a.v, b.v)};
}
LOCKSTEP_INLINE Vec maximum(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}

LOCKSTEP_INLINE Mask lessEqual(Vec a, Vec b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
}
LOCKSTEP_INLINE Mask lessThan(Vec a, Vec b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
LOCKSTEP_INLINE Mask equal(Vec a, Vec b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
}
LOCKSTEP_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(m.m, no.v, yes.v)};
}
LOCKSTEP_INLINE bool any(Mask m) {
  return m.m != 0;
}
// Bit l is lane l.
LOCKSTEP_INLINE uint32_t bits(Mask m) {
  return m.m;
}

// The bits of p plus the lowest nine bits of t shifted into sign and exponent.
LOCKSTEP_INLINE Vec addToExponent(Vec p, Vec t) {
  return {
      _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(t.v), 23)))};
}

// Tree ((l, l+8), (l, l+4), (l, l+2), (l, l+1)).
LOCKSTEP_INLINE float lanesSum(Vec a) {
  const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
LOCKSTEP_INLINE float lanesMaximum(Vec a) {
  const __m256 s = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

// Round to nearest even; denormals flush to a zero of their sign; NaN stays NaN: toBFloat16 of core/dtype.h, 16 at a
// time.
LOCKSTEP_INLINE __m256i roundToBf16(Vec a) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  // DAZ: a denormal compares equal to zero.
  r = _mm512_mask_and_epi32(r, _mm512_testn_epi32_mask(u, _mm512_set1_epi32(0x7f800000)), u,
                            _mm512_set1_epi32(static_cast<int>(0x80000000u)));
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
#endif
}
LOCKSTEP_INLINE Vec widen(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
LOCKSTEP_INLINE Vec loadu(const BFloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LOCKSTEP_INLINE Vec loadPartial(const BFloat16* p, int64_t count) {
  return widen(_mm256_maskz_loadu_epi16(firstLanes(count).m, p));
}
LOCKSTEP_INLINE void storeu(BFloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), roundToBf16(a));
}
LOCKSTEP_INLINE void storePartial(BFloat16* p, Vec a, int64_t count) {
  _mm256_mask_storeu_epi16(p, firstLanes(count).m, roundToBf16(a));
}

LOCKSTEP_INLINE Pairs loadPairs(const void* p) {
  return {_mm512_loadu_si512(p)};
}
LOCKSTEP_INLINE void storePairs(void* p, Pairs a) {
  _mm512_storeu_si512(p, a.v);
}
// The first `count` pairs; the other lanes are zero (load) or untouched (store).
LOCKSTEP_INLINE Pairs loadPairsPartial(const void* p, int64_t count) {
  return {_mm512_maskz_loadu_epi32(firstLanes(count).m, p)};
}
LOCKSTEP_INLINE void storePairsPartial(void* p, Pairs a, int64_t count) {
  _mm512_mask_storeu_epi32(p, firstLanes(count).m, a.v);
}
LOCKSTEP_INLINE Pairs broadcastPair(uint32_t pair) {
  return {_mm512_set1_epi32(static_cast<int>(pair))};
}
LOCKSTEP_INLINE Vec even(Pairs a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))};
}
LOCKSTEP_INLINE Vec odd(Pairs a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
// Pair l is (round(even lane l), round(odd lane l)).
LOCKSTEP_INLINE Pairs makePairs(Vec even, Vec odd) {
  const __m512i low = _mm512_cvtepu16_epi32(roundToBf16(even));
  return {_mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(roundToBf16(odd)), 16))};
}
LOCKSTEP_INLINE Vec asFloats(Pairs a) {
  return {_mm512_castsi512_ps(a.v)};
}
LOCKSTEP_INLINE Pairs asPairs(Vec a) {
  return {_mm512_castps_si512(a.v)};
}

// fma(a.even, b.even, fma(a.odd, b.odd, acc)).
LOCKSTEP_INLINE Vec dotPair(Vec acc, Pairs a, Pairs b) {
#ifdef __AVX512BF16__
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
  return fma(even(a), even(b), fma(odd(a), odd(b), acc));
#endif
}

// Pairs of `count` (0..32) neighbouring elements; what is missing is zero.
LOCKSTEP_INLINE Pairs loadPairsOf(const BFloat16* p, int64_t count) {
  const __mmask32 mask = count >= 32 ? 0xffffffffu : (uint32_t{1} << count) - 1u;
  return {_mm512_maskz_loadu_epi16(mask, p)};
}
// Pair l is (even[l], odd[l]) for the first `count` lanes, zero after; a null row counts as zeros.
LOCKSTEP_INLINE Pairs interleave(const BFloat16* even, const BFloat16* odd, int64_t count) {
  const __mmask16 mask = firstLanes(count).m, oddMask = odd == nullptr ? static_cast<__mmask16>(0) : mask;
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(oddMask, odd));
  return {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
}
// Pair l is (low half of a, low half of b), or the high halves.
LOCKSTEP_INLINE Pairs lowHalves(Pairs a, Pairs b) {
  return {_mm512_or_si512(_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(b.v, 16))};
}
LOCKSTEP_INLINE Pairs highHalves(Pairs a, Pairs b) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_or_si512(_mm512_srli_epi32(a.v, 16), _mm512_and_si512(b.v, high))};
}

// 16 x 16 transpose in place of dwords: out[i] lane j = in[j] lane i.
LOCKSTEP_INLINE void transpose(Vec (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  __m512 u[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), b = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd), d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(a, b, 0x88);
    r[8 + i].v = _mm512_shuffle_f32x4(a, b, 0xdd);
    r[4 + i].v = _mm512_shuffle_f32x4(c, d, 0x88);
    r[12 + i].v = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

// Lanes 0, 2, 4, ... of (a, b) and lanes 1, 3, 5, ...: (first 8 from a, last 8 from b).
LOCKSTEP_INLINE Vec evenLanes(Vec a, Vec b) {
  const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a.v, index, b.v)};
}
LOCKSTEP_INLINE Vec oddLanes(Vec a, Vec b) {
  const __m512i index = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_ps(a.v, index, b.v)};
}
// Lanes 2i and 2i + 1 exchanged.
LOCKSTEP_INLINE Vec swapNeighbours(Vec a) {
  return {_mm512_permute_ps(a.v, 0xb1)};
}

#else  // AVX2

struct Vec {
  __m256 lo, hi;
  static LOCKSTEP_MEMBER Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
};
struct Pairs {
  __m256i lo, hi;
};
struct Mask {
  __m256 lo, hi;
};

LOCKSTEP_INLINE __m256i firstOfEight(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LOCKSTEP_INLINE Mask firstLanes(int64_t count) {
  return {_mm256_castsi256_ps(firstOfEight(count)), _mm256_castsi256_ps(firstOfEight(count - 8))};
}

LOCKSTEP_INLINE Vec zero() {
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
LOCKSTEP_INLINE Vec load(const float* p) {
  return {_mm256_load_ps(p), _mm256_load_ps(p + 8)};
}
LOCKSTEP_INLINE Vec loadu(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
LOCKSTEP_INLINE Vec loadPartial(const float* p, int64_t count) {
  return {_mm256_maskload_ps(p, firstOfEight(count)), _mm256_maskload_ps(p + 8, firstOfEight(count - 8))};
}
LOCKSTEP_INLINE void store(float* p, Vec a) {
  _mm256_store_ps(p, a.lo);
  _mm256_store_ps(p + 8, a.hi);
}
LOCKSTEP_INLINE void storeu(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
LOCKSTEP_INLINE void storePartial(float* p, Vec a, int64_t count) {
  _mm256_maskstore_ps(p, firstOfEight(count), a.lo);
  _mm256_maskstore_ps(p + 8, firstOfEight(count - 8), a.hi);
}

LOCKSTEP_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
LOCKSTEP_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
LOCKSTEP_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
LOCKSTEP_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
LOCKSTEP_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
LOCKSTEP_INLINE Vec fmaBroadcast(const float* a, Vec b, Vec c) {
  return fma(Vec::broadcast(*a), b, c);
}
LOCKSTEP_INLINE Vec squareRoot(Vec a) {
  return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)};
}
LOCKSTEP_INLINE Vec minimum(Vec a, Vec b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
LOCKSTEP_INLINE Vec maximum(Vec a, Vec b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}

LOCKSTEP_INLINE Mask lessEqual(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LE_OQ)};
}
LOCKSTEP_INLINE Mask lessThan(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
LOCKSTEP_INLINE Mask equal(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
LOCKSTEP_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
LOCKSTEP_INLINE uint32_t bits(Mask m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) | static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8;
}
LOCKSTEP_INLINE bool any(Mask m) {
  return bits(m) != 0;
}

LOCKSTEP_INLINE __m256 addToExponentOfEight(__m256 p, __m256 t) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
LOCKSTEP_INLINE Vec addToExponent(Vec p, Vec t) {
  return {addToExponentOfEight(p.lo, t.lo), addToExponentOfEight(p.hi, t.hi)};
}

LOCKSTEP_INLINE float lanesSum(Vec a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
LOCKSTEP_INLINE float lanesMaximum(Vec a) {
  const __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

// The bfloat16 bits of eight floats, in the high halves of their dwords; the low halves are not cleared.
LOCKSTEP_INLINE __m256i roundEight(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i exponent = _mm256_and_si256(u, _mm256_set1_epi32(0x7f800000));
  const __m256i small = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
  const __m256i sign = _mm256_and_si256(u, _mm256_set1_epi32(static_cast<int>(0x80000000u)));
  r = _mm256_blendv_epi8(r, sign, small);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x00400000)), nan);
}
LOCKSTEP_INLINE __m256i roundToBf16(Vec a) {
  const __m256i lo = _mm256_srli_epi32(roundEight(a.lo), 16), hi = _mm256_srli_epi32(roundEight(a.hi), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
}
LOCKSTEP_INLINE Vec widen(__m256i h) {
  const __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(h));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
LOCKSTEP_INLINE Vec loadu(const BFloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LOCKSTEP_INLINE Vec loadPartial(const BFloat16* p, int64_t count) {
  alignas(32) uint16_t lanes[16] = {};
  for (int64_t i = 0; i < count && i < kLanes; ++i) lanes[i] = p[i].bits;
  return widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)));
}
LOCKSTEP_INLINE void storeu(BFloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), roundToBf16(a));
}
LOCKSTEP_INLINE void storePartial(BFloat16* p, Vec a, int64_t count) {
  alignas(32) uint16_t lanes[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), roundToBf16(a));
  for (int64_t i = 0; i < count && i < kLanes; ++i) p[i].bits = lanes[i];
}

LOCKSTEP_INLINE Pairs loadPairs(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
LOCKSTEP_INLINE void storePairs(void* p, Pairs a) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, a.lo);
  _mm256_storeu_si256(q + 1, a.hi);
}
LOCKSTEP_INLINE Pairs loadPairsPartial(const void* p, int64_t count) {
  const int* q = static_cast<const int*>(p);
  return {_mm256_maskload_epi32(q, firstOfEight(count)), _mm256_maskload_epi32(q + 8, firstOfEight(count - 8))};
}
LOCKSTEP_INLINE void storePairsPartial(void* p, Pairs a, int64_t count) {
  int* q = static_cast<int*>(p);
  _mm256_maskstore_epi32(q, firstOfEight(count), a.lo);
  _mm256_maskstore_epi32(q + 8, firstOfEight(count - 8), a.hi);
}
LOCKSTEP_INLINE Pairs broadcastPair(uint32_t pair) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(pair));
  return {v, v};
}
LOCKSTEP_INLINE Vec even(Pairs a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.hi, 16))};
}
LOCKSTEP_INLINE Vec odd(Pairs a) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(a.lo, high)), _mm256_castsi256_ps(_mm256_and_si256(a.hi, high))};
}
LOCKSTEP_INLINE Pairs makePairs(Vec even, Vec odd) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_or_si256(_mm256_srli_epi32(roundEight(even.lo), 16), _mm256_and_si256(roundEight(odd.lo), high)),
          _mm256_or_si256(_mm256_srli_epi32(roundEight(even.hi), 16), _mm256_and_si256(roundEight(odd.hi), high))};
}
LOCKSTEP_INLINE Vec asFloats(Pairs a) {
  return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
LOCKSTEP_INLINE Pairs asPairs(Vec a) {
  return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
}
LOCKSTEP_INLINE Vec dotPair(Vec acc, Pairs a, Pairs b) {
  return fma(even(a), even(b), fma(odd(a), odd(b), acc));
}

LOCKSTEP_INLINE Pairs loadPairsOf(const BFloat16* p, int64_t count) {
  alignas(32) BFloat16 elements[32] = {};
  for (int64_t i = 0; i < count && i < 32; ++i) elements[i] = p[i];
  return loadPairs(elements);
}
LOCKSTEP_INLINE Pairs interleave(const BFloat16* even, const BFloat16* odd, int64_t count) {
  alignas(32) BFloat16 elements[32] = {};
  for (int64_t i = 0; i < count && i < 16; ++i) {
    elements[2 * i] = even[i];
    if (odd != nullptr) elements[2 * i + 1] = odd[i];
  }
  return loadPairs(elements);
}
LOCKSTEP_INLINE __m256i lowOfEight(__m256i a, __m256i b) {
  return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
}
LOCKSTEP_INLINE __m256i highOfEight(__m256i a, __m256i b) {
  return _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
}
LOCKSTEP_INLINE Pairs lowHalves(Pairs a, Pairs b) {
  return {lowOfEight(a.lo, b.lo), lowOfEight(a.hi, b.hi)};
}
LOCKSTEP_INLINE Pairs highHalves(Pairs a, Pairs b) {
  return {highOfEight(a.lo, b.lo), highOfEight(a.hi, b.hi)};
}

// 8 x 8, in place.
LOCKSTEP_INLINE void transposeEight(__m256 (&r)[8]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}
LOCKSTEP_INLINE void transpose(Vec (&r)[16]) {
  __m256 topLeft[8], topRight[8], bottomLeft[8], bottomRight[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    topLeft[i] = r[i].lo;
    topRight[i] = r[i].hi;
    bottomLeft[i] = r[8 + i].lo;
    bottomRight[i] = r[8 + i].hi;
  }
  transposeEight(topLeft);
  transposeEight(topRight);
  transposeEight(bottomLeft);
  transposeEight(bottomRight);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = {topLeft[i], bottomLeft[i]};
    r[8 + i] = {topRight[i], bottomRight[i]};
  }
}

LOCKSTEP_INLINE __m256 evenOfEight(__m256 a, __m256 b) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), 0xd8));
}
LOCKSTEP_INLINE __m256 oddOfEight(__m256 a, __m256 b) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8));
}
LOCKSTEP_INLINE Vec evenLanes(Vec a, Vec b) {
  return {evenOfEight(a.lo, a.hi), evenOfEight(b.lo, b.hi)};
}
LOCKSTEP_INLINE Vec oddLanes(Vec a, Vec b) {
  return {oddOfEight(a.lo, a.hi), oddOfEight(b.lo, b.hi)};
}
LOCKSTEP_INLINE Vec swapNeighbours(Vec a) {
  return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)};
}

#endif

// a <= b ? x : y per lane; y where a or b is NaN.
LOCKSTEP_INLINE Vec selectLessEqual(Vec a, Vec b, Vec x, Vec y) {
  return select(lessEqual(a, b), x, y);
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
