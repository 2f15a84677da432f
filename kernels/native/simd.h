// Sixteen lanes of float32 and sixteen pairs of bfloat16, on AVX512-BF16 or AVX2.
//
// Every function is elementwise or has one fixed order of operations, so kernels written with it give an element the
// same bits in whatever lane, row, tile or thread it is computed.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace baton {

using bf16 = std::uint16_t;  // bit pattern
using i64 = std::int64_t;

constexpr int kLanes = 16;
constexpr int kLine = 64;  // bytes of a cache line, and of sixteen pairs

// Brings the line of `p` into the second-level cache.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

#if defined(__AVX512BF16__)

using F32 = __m512;
using Pairs = __m512bh;
constexpr int kTileVectors = 4;  // vectors per row of a register tile
constexpr int kTileRows = 6;     // 24 accumulators, 4 loads and a broadcast fit into 32 registers

inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 broadcast(float x) { return _mm512_set1_ps(x); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }  // b where either is NaN
inline F32 round(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 scale_by_power(F32 a, F32 n) { return _mm512_scalef_ps(a, n); }

inline __mmask16 first(i64 count) { return count >= kLanes ? 0xFFFF : (1U << count) - 1; }
inline F32 keep_first(F32 v, i64 count, float other) { return _mm512_mask_mov_ps(broadcast(other), first(count), v); }
// A bit per lane: whether a > b, false where either is NaN.
inline unsigned greater(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline F32 keep(F32 v, unsigned lanes, float other) { return _mm512_mask_mov_ps(broadcast(other), lanes, v); }
// Moves the chosen lanes to the front, and stores all sixteen: what follows them means nothing.
inline void store_chosen(float* p, F32 v, unsigned lanes) { store(p, _mm512_maskz_compress_ps(lanes, v)); }

inline F32 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
// Masks only where they are needed: they cost a third of a norm's time.
inline F32 load_bf16(const bf16* p, i64 count) {
  if (count >= kLanes) return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return widen(_mm256_maskz_loadu_epi16(first(count), p));
}
inline void store_bf16(bf16* p, F32 v, i64 count) {
  const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  if (count >= kLanes) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
  _mm256_mask_storeu_epi16(p, first(count), narrow);
}
inline F32 round_to_bf16(F32 v) { return widen(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v))); }
inline F32 load_float(const float* p, i64 count) {
  return count >= kLanes ? load(p) : _mm512_maskz_loadu_ps(first(count), p);
}
inline void store_float(float* p, F32 v, i64 count) { _mm512_mask_storeu_ps(p, first(count), v); }

// Writes sixteen values as the first or the second (`second`) of as many pairs; the others stay as they are.
inline void store_halves(bf16* pairs, const bf16* values, bool second) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  if (second)
    _mm512_mask_storeu_epi16(pairs, 0xAAAAAAAA, _mm512_slli_epi32(wide, 16));
  else
    _mm512_mask_storeu_epi16(pairs, 0x55555555, wide);
}

// An aligned line, past the caches: it need not be read first. Other threads see it after a fence.
inline void stream_line(void* p, __m512i line) { _mm512_stream_si512(static_cast<__m512i*>(p), line); }

// Sixteen rows of sixteen pairs, `stride` elements apart, to the aligned lines that hold all first pairs, all second
// ones, ...; streamed.
inline void transpose_pairs(const bf16* rows, i64 stride, bf16* lines) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * stride);
  for (int i = 0; i < 16; i += 2) {  // quarters of a line hold pairs of 2 rows, then of 4
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // then quarters of 8 rows, then of 16
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    stream_line(lines + i * 32, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    stream_line(lines + (i + 8) * 32, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD));
    stream_line(lines + (i + 4) * 32, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    stream_line(lines + (i + 12) * 32, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xDD));
  }
}

// Sixteen pairs of the first's and the second's values, an aligned line; streamed.
inline void interleave(const bf16* first, const bf16* second, bf16* pairs) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
  stream_line(pairs, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

inline Pairs load_pairs(const void* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
inline void store_pairs(void* p, Pairs a) { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(a)); }
inline Pairs broadcast_pair(std::uint32_t pair) { return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)); }
// The 32 values in their order, those of `a` first.
inline Pairs round_to_pairs(F32 a, F32 b) { return _mm512_cvtne2ps_pbh(b, a); }
inline Pairs even_half(Pairs a) {  // the second of each pair becomes 0
  return reinterpret_cast<__m512bh>(_mm512_and_si512(reinterpret_cast<__m512i>(a), _mm512_set1_epi32(0xFFFF)));
}
inline F32 dot_pairs(F32 sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }

#elif defined(__AVX2__) && defined(__FMA__)

struct F32 {
  __m256 lo, hi;
};
struct Pairs {
  __m256i lo, hi;
};
constexpr int kTileVectors = 1;
constexpr int kTileRows = 4;  // 8 accumulators in 16 registers

#define BATON_EACH(name, intrinsic) \
  inline F32 name(F32 a, F32 b) { return {intrinsic(a.lo, b.lo), intrinsic(a.hi, b.hi)}; }
BATON_EACH(add, _mm256_add_ps)
BATON_EACH(sub, _mm256_sub_ps)
BATON_EACH(mul, _mm256_mul_ps)
BATON_EACH(div, _mm256_div_ps)
BATON_EACH(max, _mm256_max_ps)  // b where either is NaN
BATON_EACH(min, _mm256_min_ps)  // b where either is NaN
#undef BATON_EACH

inline F32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32 v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline F32 round(F32 a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline F32 floor(F32 a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
inline __m256 scale_by_power(__m256 a, __m256 n) {  // for n up to 128; 2^128 is infinite, below 2^-126 are zeros
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  const __m256i exponent = _mm256_max_epi32(biased, _mm256_setzero_si256());
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline F32 scale_by_power(F32 a, F32 n) { return {scale_by_power(a.lo, n.lo), scale_by_power(a.hi, n.hi)}; }

inline void store_float(float* p, F32 v, i64 count) {
  if (count >= kLanes) return store(p, v);
  float lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(float));
}
inline F32 load_float(const float* p, i64 count) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(float));
  return load(lanes);
}
inline F32 keep_first(F32 v, i64 count, float other) {
  if (count >= kLanes) return v;
  float lanes[kLanes];
  store(lanes, broadcast(other));
  store_float(lanes, v, count);
  return load(lanes);
}

// A bit per lane: whether a > b, false where either is NaN.
inline unsigned greater(F32 a, F32 b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)) |
         _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)) << 8;
}
inline __m256 keep(__m256 v, unsigned lanes, float other) {  // of the eight low bits
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bits), bits);
  return _mm256_blendv_ps(_mm256_set1_ps(other), v, _mm256_castsi256_ps(chosen));
}
inline F32 keep(F32 v, unsigned lanes, float other) {
  return {keep(v.lo, lanes, other), keep(v.hi, lanes >> 8, other)};
}
// Moves the chosen lanes to the front, and stores all sixteen: what follows them means nothing.
inline void store_chosen(float* p, F32 v, unsigned lanes) {
  float given[kLanes], moved[kLanes] = {};
  store(given, v);
  for (int lane = 0, next = 0; lane < kLanes; ++lane) {
    moved[next] = given[lane];
    next += lanes >> lane & 1;
  }
  store(p, load(moved));
}

inline __m256 widen(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
inline F32 widen(const bf16* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline F32 load_bf16(const bf16* p, i64 count) {
  if (count >= kLanes) return widen(p);
  bf16 lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(bf16));
  return widen(lanes);
}
inline __m256i narrow(__m256 v) {  // to nearest, ties to even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan), 16);
}
inline F32 round_to_bf16(F32 v) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(narrow(v.lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(narrow(v.hi), 16))};
}
inline __m256i narrow(F32 v) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow(v.lo), narrow(v.hi)), 0xD8); }
inline void store_bf16(bf16* p, F32 v, i64 count) {
  const __m256i packed = narrow(v);
  if (count >= kLanes) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  bf16 lanes[kLanes];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), packed);
  std::memcpy(p, lanes, count * sizeof(bf16));
}

// Writes sixteen values as the first or the second (`second`) of as many pairs; the others stay as they are.
inline void store_halves(bf16* pairs, const bf16* values, bool second) {
  for (int i = 0; i < kLanes; ++i) pairs[i * 2 + second] = values[i];
}

// Sixteen rows of sixteen pairs, `stride` elements apart, to the lines that hold all first pairs, all second ones, ...
inline void transpose_pairs(const bf16* rows, i64 stride, bf16* lines) {
  for (int row = 0; row < kLanes; ++row)
    for (int pair = 0; pair < kLanes; ++pair)
      std::memcpy(lines + (pair * kLanes + row) * 2, rows + row * stride + pair * 2, 2 * sizeof(bf16));
}

// Sixteen pairs of the first's and the second's values.
inline void interleave(const bf16* first, const bf16* second, bf16* pairs) {
  store_halves(pairs, first, false);
  store_halves(pairs, second, true);
}

inline Pairs load_pairs(const void* p) {
  const auto* halves = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline void store_pairs(void* p, Pairs a) {
  auto* halves = static_cast<__m256i*>(p);
  _mm256_storeu_si256(halves, a.lo);
  _mm256_storeu_si256(halves + 1, a.hi);
}
// The 32 values in their order, those of `a` first.
inline Pairs round_to_pairs(F32 a, F32 b) { return {narrow(a), narrow(b)}; }
inline Pairs broadcast_pair(std::uint32_t pair) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(pair));
  return {all, all};
}
inline Pairs even_half(Pairs a) {
  const __m256i mask = _mm256_set1_epi32(0xFFFF);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline __m256 dot_pairs(__m256 sum, __m256i a, __m256i b) {
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
  sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a, odd)), _mm256_castsi256_ps(_mm256_and_si256(b, odd)),
                        sum);
  return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
                         _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), sum);
}
inline F32 dot_pairs(F32 sum, Pairs a, Pairs b) {
  return {dot_pairs(sum.lo, a.lo, b.lo), dot_pairs(sum.hi, a.hi, b.hi)};
}

#else
#error "needs AVX512-BF16, or AVX2 and FMA"
#endif

// Pairwise, always in this order.
#if defined(__AVX512BF16__)
inline float sum_lanes(F32 v) { return _mm512_reduce_add_ps(v); }
inline float max_lanes(F32 v) { return _mm512_reduce_max_ps(v); }
#else
inline float sum_lanes(F32 v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline float max_lanes(F32 v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] < lanes[i + width] ? lanes[i + width] : lanes[i];
  return lanes[0];
}
#endif

// exp by Cody-Waite reduction and a polynomial of degree 6 (coefficients of Cephes' expf, S. L. Moshier), about 2 ulp.
// exp(0) is exactly 1; below -87 it is exactly 0; above 88.8 it is infinite; NaN stays NaN.
inline F32 exp(F32 x) {
  const F32 lowest = broadcast(-87.0F);
  const F32 clamped = max(lowest, min(broadcast(88.9F), x));
  const F32 n = round(mul(clamped, broadcast(1.44269504088896341F)));
  F32 r = fma(n, broadcast(-0.693359375F), clamped);
  r = fma(n, broadcast(2.12194440e-4F), r);
  F32 p = broadcast(1.9875691500e-4F);
  p = fma(p, r, broadcast(1.3981999507e-3F));
  p = fma(p, r, broadcast(8.3334519073e-3F));
  p = fma(p, r, broadcast(4.1665795894e-2F));
  p = fma(p, r, broadcast(1.6666665459e-1F));
  p = fma(p, r, broadcast(5.0000001201e-1F));
  p = fma(mul(r, r), p, add(r, broadcast(1.0F)));
  p = scale_by_power(p, n);
#if defined(__AVX512BF16__)
  return _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, lowest, _CMP_LT_OQ), zero());
#else
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.lo, lowest.lo, _CMP_LT_OQ), p.lo),
          _mm256_andnot_ps(_mm256_cmp_ps(x.hi, lowest.hi, _CMP_LT_OQ), p.hi)};
#endif
}

// 2^x by a polynomial in x - floor(x), whose last coefficient is 1; the others are given, the highest power's first.
// 2^0 is exactly 1; below -150 it is exactly 0; from 128 on it is infinite; NaN stays NaN.
template <std::size_t Degree>
inline F32 exp2(F32 x, const float (&coefficients)[Degree]) {
#if defined(__AVX512BF16__)
  const F32 n = x;  // scale_by_power takes the integral part of it
  const F32 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x), 0 for infinities
#else
  const F32 clamped = max(broadcast(-200.0F), min(broadcast(128.0F), x));
  const F32 n = floor(clamped);
  const F32 r = sub(clamped, n);
#endif
  F32 p = broadcast(coefficients[0]);
  for (std::size_t i = 1; i < Degree; ++i) p = fma(p, r, broadcast(coefficients[i]));
  return scale_by_power(fma(p, r, broadcast(1.0F)), n);
}

// Polynomials fitted with the least relative error: of 8e-8 before rounding, and of 9e-5, which bfloat16 hardly shows.
inline F32 exp2(F32 x) {
  return exp2(x, {1.867130192e-3F, 9.017030063e-3F, 5.579991329e-2F, 2.401644501e-1F, 6.931513118e-1F});
}
inline F32 exp2_for_bf16(F32 x) { return exp2(x, {7.706719722e-2F, 2.276448222e-1F, 6.951168245e-1F}); }

inline std::uint32_t read_pair(const bf16* p) {
  std::uint32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return pair;
}

}  // namespace baton
