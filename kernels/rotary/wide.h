// Thirty-two values, as pairs of bfloat16 and as two vectors of float32, in whichever order is the cheapest.
//
// On AVX512 a shift and a mask widen the first and the second of each pair, without a shuffle; rounded again, all first
// ones lie before all second ones. Each such turn rotates the five bits of every value's number by one, which
// elementwise work does not notice as long as both sides have been turned equally often.
#pragma once

#include <array>

#include "../native/simd.h"

namespace baton {

constexpr int kWide = 2 * kLanes;
constexpr int kHeadsAtOnce = 8;  // whose squares are summed together

struct Wide {
  F32 first, second;
};

inline Wide add(Wide a, Wide b) { return {add(a.first, b.first), add(a.second, b.second)}; }
inline Wide sub(Wide a, Wide b) { return {sub(a.first, b.first), sub(a.second, b.second)}; }
inline Wide mul(Wide a, Wide b) { return {mul(a.first, b.first), mul(a.second, b.second)}; }
inline Wide mul(Wide a, F32 b) { return {mul(a.first, b), mul(a.second, b)}; }
inline Pairs round_to_pairs(Wide a) { return round_to_pairs(a.first, a.second); }
inline Wide load_wide(const float* p, i64 count) {
  return {load_float(p, count), count > kLanes ? load_float(p + kLanes, count - kLanes) : zero()};
}
inline Wide load_wide(const bf16* p, i64 count) {
  return {load_bf16(p, count), count > kLanes ? load_bf16(p + kLanes, count - kLanes) : zero()};
}

inline float sum_squares(const bf16* head, i64 head_dim) {
  F32 squares = zero();
  for (i64 i = 0; i < head_dim; i += kLanes) {
    const F32 value = load_bf16(head + i, head_dim - i);
    squares = fma(value, value, squares);
  }
  return sum_lanes(squares);
}

#if defined(__AVX512BF16__)

inline Pairs load_pairs(const bf16* p, i64 count) {
  if (count >= kWide) return load_pairs(p);
  return reinterpret_cast<Pairs>(_mm512_maskz_loadu_epi16((1U << count) - 1, p));
}
inline void store_pairs(bf16* p, Pairs v, i64 count) {
  if (count >= kWide) return store_pairs(p, v);
  _mm512_mask_storeu_epi16(p, (1U << count) - 1, reinterpret_cast<__m512i>(v));
}

inline Wide widen(Pairs pairs) {
  const __m512i both = reinterpret_cast<__m512i>(pairs);
  const __m512i second = _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(second)};
}

template <typename Integer, int kBits>
constexpr std::array<Integer, kWide> kRotatedNumbers = [] {
  std::array<Integer, kWide> numbers{};
  for (int i = 0; i < kWide; ++i) numbers[i] = (i << kBits | i >> (5 - kBits)) % kWide;
  return numbers;
}();

// Values in their order as `widen` leaves such as were turned kTurns times before.
template <int kTurns>
inline Wide turn(Wide a) {
  const auto& numbers = kRotatedNumbers<std::int32_t, kTurns + 1>;
  return {_mm512_permutex2var_ps(a.first, _mm512_loadu_si512(&numbers[0]), a.second),
          _mm512_permutex2var_ps(a.first, _mm512_loadu_si512(&numbers[kLanes]), a.second)};
}
// Values that were turned kTurns times in their order.
template <int kTurns>
inline Pairs turn_back(Pairs a) {
  const __m512i numbers = _mm512_loadu_si512(&kRotatedNumbers<std::uint16_t, 5 - kTurns>);
  return reinterpret_cast<Pairs>(_mm512_permutexvar_epi16(numbers, reinterpret_cast<__m512i>(a)));
}

// sum_squares of adjacent heads, bit for bit.
inline void sum_squares_at_once(const bf16* heads, i64 head_dim, float* sums) {
  if (head_dim % kLanes) {
    for (int head = 0; head < kHeadsAtOnce; ++head) sums[head] = sum_squares(heads + head * head_dim, head_dim);
    return;
  }
  F32 eighths[4];
  for (int i = 0; i < 4; ++i) {  // heads i and i + 4, each in a half of the vectors, which have its even and odd lanes
    const bf16 *low = heads + i * head_dim, *high = heads + (i + 4) * head_dim;
    Wide squares{zero(), zero()};
    for (i64 dim = 0; dim < head_dim; dim += kLanes) {
      const __m512i half = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + dim)));
      const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + dim));
      const Wide values = widen(reinterpret_cast<Pairs>(_mm512_inserti64x4(half, other, 1)));
      squares = {fma(values.first, values.first, squares.first), fma(values.second, values.second, squares.second)};
    }
    eighths[i] = add(_mm512_shuffle_f32x4(squares.first, squares.second, 0x88),
                     _mm512_shuffle_f32x4(squares.first, squares.second, 0xDD));  // lanes l and l + 8
  }
  const auto add_halves = [](F32 a, F32 b) {  // of 128-bit quarters: lanes l and l + 4
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const F32 a = add_halves(eighths[0], eighths[1]), b = add_halves(eighths[2], eighths[3]);
  const F32 halves = add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));  // lanes l and l + 2
  _mm256_storeu_ps(sums, _mm256_add_ps(_mm512_castps512_ps256(halves), _mm512_extractf32x8_ps(halves, 1)));
}

#else

inline Pairs load_pairs(const bf16* p, i64 count) {
  if (count >= kWide) return load_pairs(p);
  bf16 values[kWide] = {};
  std::memcpy(values, p, count * sizeof(bf16));
  return load_pairs(values);
}
inline void store_pairs(bf16* p, Pairs v, i64 count) {
  if (count >= kWide) return store_pairs(p, v);
  bf16 values[kWide];
  store_pairs(values, v);
  std::memcpy(p, values, count * sizeof(bf16));
}

// Here values keep their order.
inline F32 widen(__m256i v) { return {widen(_mm256_castsi256_si128(v)), widen(_mm256_extracti128_si256(v, 1))}; }
inline Wide widen(Pairs pairs) { return {widen(pairs.lo), widen(pairs.hi)}; }
template <int kTurns>
inline Wide turn(Wide a) {
  return a;
}
template <int kTurns>
inline Pairs turn_back(Pairs a) {
  return a;
}

inline void sum_squares_at_once(const bf16* heads, i64 head_dim, float* sums) {
  for (int head = 0; head < kHeadsAtOnce; ++head) sums[head] = sum_squares(heads + head * head_dim, head_dim);
}

#endif

}  // namespace baton
