// Linear layers with int8 weights: one float32 scale per output column, bfloat16 inputs, float32 accumulation.
//
// A weight [N, K] is stored as [ceil(N / 64)][ceil(K / 2)][2][64] bytes, padded with zeros: a step over K reads two
// consecutive cache lines, of 32 columns and a pair of K each. A byte is a sign (bit 7) and a magnitude (0 to 127). Every
// int8 is a bfloat16, so a byte becomes one without rounding, by table, in registers, anew for each tile of rows: that
// goes on beside the multiply-adds. The scale waits for the sum.

#include <bit>
#include <vector>

#include "blocks.h"

#define BATON_INLINE inline __attribute__((always_inline))

namespace baton {
namespace {

using byte = std::uint8_t;
using linear::kBlock;

constexpr int kLineColumns = 32;
constexpr int kLineVectors = kLineColumns / kLanes;
constexpr int kLargest = 127;
constexpr int kInfinity = 0x7F80;  // bfloat16; what is larger, without its sign, is NaN

// Where a line keeps the pair's first value of a column; the second one follows. Interleaving the low, or the high, halves
// of each 128-bit lane with what belongs to them gives sixteen neighbouring columns (`decode`).
constexpr i64 place(i64 column) { return column % kLanes / 4 * 16 + column / kLanes * 8 + column % 4 * 2; }

#if defined(__AVX512VBMI__)

constexpr bf16 to_bf16(unsigned magnitude) {
  if (magnitude == 0) return 0;
  const unsigned exponent = std::bit_width(magnitude) - 1;
  return static_cast<bf16>((127 + exponent) << 7 | (magnitude << (7 - exponent) & 0x7F));
}

struct Table {
  alignas(kLine) byte low[kLargest + 1], high[kLargest + 1];  // bytes of each magnitude's bfloat16
};

constexpr Table kTable = [] {
  Table table{};
  for (unsigned magnitude = 0; magnitude <= kLargest; ++magnitude) {
    table.low[magnitude] = static_cast<byte>(to_bf16(magnitude) & 0xFF);
    table.high[magnitude] = static_cast<byte>(to_bf16(magnitude) >> 8);
  }
  return table;
}();

BATON_INLINE __m512i look_up(const byte* table, __m512i codes) {  // by their low seven bits
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + kLine));
}

BATON_INLINE void decode(const char* line, Pairs (&columns)[kLineVectors]) {
  constexpr int or_with_and = 0xF8;
  const __m512i codes = _mm512_loadu_si512(line);
  const __m512i low = look_up(kTable.low, codes);
  const __m512i high =
      _mm512_ternarylogic_epi32(look_up(kTable.high, codes), codes, _mm512_set1_epi8(-128), or_with_and);
  columns[0] = reinterpret_cast<Pairs>(_mm512_unpacklo_epi8(low, high));
  columns[1] = reinterpret_cast<Pairs>(_mm512_unpackhi_epi8(low, high));
}

#else

inline __m256i to_pairs(__m128i codes) {  // eight columns
  const __m128i values = _mm_sign_epi8(_mm_and_si128(codes, _mm_set1_epi8(kLargest)), codes);
  const __m256i words = _mm256_cvtepi8_epi16(values);
  const __m256 even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16));
  const __m256 odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 16));  // exact: its low half is zero
  return _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(even), 16), _mm256_castps_si256(odd));
}

BATON_INLINE void decode(const char* line, Pairs (&columns)[kLineVectors]) {
  for (int v = 0; v < kLineVectors; ++v) {
    __m256i halves[2];
    for (int h = 0; h < 2; ++h) {
      const auto* from = reinterpret_cast<const __m128i*>(line + h * 32 + v * 8);
      halves[h] = to_pairs(_mm_unpacklo_epi64(_mm_loadl_epi64(from), _mm_loadl_epi64(from + 1)));
    }
    std::memcpy(&columns[v], halves, sizeof(Pairs));
  }
}

#endif

struct Int8Weights {
  static constexpr int kVectors = kTileVectors < kLineVectors ? kLineVectors : kTileVectors;
  static constexpr int kVectorsPerRead = kLineVectors;
  static constexpr int kRows = kTileRows * kTileVectors / kVectors;
  static constexpr i64 kPairBytes = kBlock * 2;

  const char* at;
  const float* scales;

  static BATON_INLINE void read(const char* from, Pairs (&columns)[kVectorsPerRead]) { decode(from, columns); }
  F32 complete(F32 sum, i64 column, i64 count) const { return mul(sum, load_float(scales + column, count)); }
};

inline float widen(bf16 value) { return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16); }

// The scale of one output column, absmax / 127, and its codes: quotients rounded to nearest, ties to even. A column of
// zeros has scale 0. One with a value that is not finite has scale NaN: whatever it computes shows that.
float quantize(const bf16* weight, i64 k, byte* codes) {
  int largest = 0;
  for (i64 i = 0; i < k; ++i) largest = std::max(largest, weight[i] & 0x7FFF);
  if (largest == 0 || largest >= kInfinity) {
    std::fill_n(codes, k, byte{0});
    return largest == 0 ? 0.0F : std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = widen(static_cast<bf16>(largest)) / kLargest;
  for (i64 i = 0; i < k; ++i) {
    const float quotient = std::nearbyint(std::fabs(widen(weight[i])) / scale);
    const int magnitude = static_cast<int>(quotient < kLargest ? quotient : static_cast<float>(kLargest));
    codes[i] = static_cast<byte>(magnitude | (weight[i] >> 15 << 7));
  }
  return scale;
}

}  // namespace
}  // namespace baton

using namespace baton;

// out[M, N] = (x[M, K] codes^T) * scales + bias; strides in elements, columns adjacent. `output` as of baton_linear.
extern "C" void baton_int8_linear(const bf16* x, i64 x_stride, const byte* weight, const float* scales,
                                  const bf16* bias, void* out, i64 out_stride, i64 m, i64 n, i64 k, int output,
                                  int threads) {
  const Int8Weights weights{reinterpret_cast<const char*>(weight), scales};
  linear::run(linear::Linear<Int8Weights>{x, x_stride, weights, bias, out, out_stride, n, k, linear::Output{output}},
              m, threads);
}

// weight[N, K] (rows `stride` elements apart), quantised, to the blocked layout and scales[N].
extern "C" void baton_int8_pack(const bf16* weight, i64 stride, byte* packed, float* scales, i64 n, i64 k,
                                int threads) {
  const i64 pairs = (k + 1) / 2;
  parallel_for((n + kBlock - 1) / kBlock, threads, [&](i64 block) {
    std::vector<byte> codes(k);
    byte* to = packed + block * pairs * kBlock * 2;
    std::memset(to, 0, pairs * kBlock * 2);
    for (i64 column = 0; column < kBlock && block * kBlock + column < n; ++column) {
      const i64 row = block * kBlock + column;
      scales[row] = quantize(weight + row * stride, k, codes.data());
      byte* first = to + column / kLineColumns * kLine + place(column % kLineColumns);
      for (i64 i = 0; i < k; ++i) first[i / 2 * kBlock * 2 + i % 2] = codes[i];
    }
  });
}

// Rows `ids` of a packed weight, times their scales: out[T, K].
extern "C" void baton_int8_rows(const i64* ids, const byte* packed, const float* scales, bf16* out, i64 t, i64 k,
                                int threads) {
  const i64 pairs = (k + 1) / 2;
  parallel_ranges(t, 16, threads, [&](i64 begin, i64 end) {
    for (i64 token = begin; token < end; ++token) {
      const i64 column = ids[token] % kBlock;
      const byte* block = packed + ids[token] / kBlock * pairs * kBlock * 2;
      const byte* first = block + column / kLineColumns * kLine + place(column % kLineColumns);
      const F32 scale = broadcast(scales[ids[token]]);
      for (i64 start = 0; start < k; start += kLanes) {
        const i64 count = std::min<i64>(kLanes, k - start);
        float values[kLanes] = {};
        for (i64 i = 0; i < count; ++i) {
          const int code = first[(start + i) / 2 * kBlock * 2 + i % 2];
          values[i] = static_cast<float>(code > kLargest ? kLargest + 1 - code : code);
        }
        store_bf16(out + token * k + start, mul(load(values), scale), count);
      }
    }
  });
}
