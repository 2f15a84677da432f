// Linear layers with int8 weights: one float32 scale per output column, bfloat16 inputs, float32 accumulation.
//
// A weight [N, K] is stored as [ceil(N / 64)][ceil(K / 2)][2][64] bytes, padded with zeros: a step over K reads two
// consecutive cache lines, of 32 columns and a pair of K each. A byte is a sign (bit 7) and a magnitude (0 to 127). Every
// int8 is a bfloat16, so a byte becomes one without rounding, by table, in registers, anew for each tile of rows: that
// goes on beside the multiply-adds. The scale waits for the sum. Every output element is one chain of multiply-adds over
// K, in order, whatever M, tile and thread, then a product with the scale: a row's bits do not depend on the other rows.

#include <algorithm>
#include <bit>
#include <vector>

#include "../native/parallel.h"
#include "../native/simd.h"

#define BATON_INLINE inline __attribute__((always_inline))

namespace baton {
namespace {

using byte = std::uint8_t;

constexpr int kColumns = 64;  // of a block
constexpr int kLineColumns = 32;
constexpr int kLinesPerStep = kColumns / kLineColumns;
constexpr int kLineVectors = kLineColumns / kLanes;
constexpr int kBlockVectors = kColumns / kLanes;
constexpr int kVectors = kTileVectors < kLineVectors ? kLineVectors : kTileVectors;  // per row of a register tile
constexpr int kRows = kTileRows * kTileVectors / kVectors;                           // of a register tile
constexpr i64 kPairsPerPass = 4096;  // of K: 512 KiB of a block, half of a usual second-level cache
constexpr i64 kTasksPerThread = 16;  // at least, where rows can be split: threads should end together
constexpr i64 kRowsPerTask = 48;     // at least, where rows are split
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

BATON_INLINE void decode(const byte* line, Pairs (&columns)[kLineVectors]) {
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

BATON_INLINE void decode(const byte* line, Pairs (&columns)[kLineVectors]) {
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

struct Linear {
  const bf16* x;
  i64 x_stride;
  const byte* weight;
  const float* scales;
  const bf16* bias;  // may be null
  void* out;
  i64 out_stride;
  i64 n, k;
  bool out_is_float;

  i64 pairs() const { return (k + 1) / 2; }
  const byte* block(i64 b) const { return weight + b * pairs() * kColumns * 2; }
};

// `weight`: the line with the first pair of the tile's columns. `Lines`: of `ahead`, brought into the second-level cache
// with each step over K.
template <int Rows, int Lines>
BATON_INLINE void multiply(const Linear& op, i64 row, const byte* weight, i64 first_pair, i64 last_pair,
                           const byte* ahead, F32 (&acc)[Rows][kVectors]) {
  const bf16* x = op.x + row * op.x_stride;
  const i64 whole = last_pair * 2 > op.k ? last_pair - 1 : last_pair;
  auto step = [&](i64 pair, auto read) __attribute__((always_inline)) {
    for (int l = 0; l < Lines; ++l) _mm_prefetch(ahead + (pair * Lines + l) * kLine, _MM_HINT_T1);
    for (int from = 0; from < kVectors; from += kLineVectors) {
      Pairs columns[kLineVectors];
      decode(weight + (pair * kLinesPerStep + from / kLineVectors) * kLine, columns);
      i64 start = pair * 2;
      asm volatile("" : "+r"(start));  // x anew for each line: kept in registers, it would push sums out of them
      for (int r = 0; r < Rows; ++r) {
        const Pairs value = broadcast_pair(read(x + r * op.x_stride + start));
        for (int v = 0; v < kLineVectors; ++v) acc[r][from + v] = dot_pairs(acc[r][from + v], value, columns[v]);
      }
    }
  };
  for (i64 pair = first_pair; pair < whole; ++pair) step(pair, read_pair);
  if (whole < last_pair) step(whole, [](const bf16* p) -> std::uint32_t { return *p; });
}

template <int Rows>
inline void finish(const Linear& op, i64 row, i64 column, F32 (&acc)[Rows][kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    const i64 start = column + v * kLanes;
    const i64 count = op.n - start;
    if (count <= 0) return;
    const F32 scale = load_float(op.scales + start, count);
    const F32 bias = op.bias ? load_bf16(op.bias + start, count) : zero();
    for (int r = 0; r < Rows; ++r) {
      F32 sum = mul(acc[r][v], scale);
      if (op.bias) sum = add(sum, bias);
      const i64 to = (row + r) * op.out_stride + start;
      if (op.out_is_float)
        store_float(static_cast<float*>(op.out) + to, sum, count);
      else
        store_bf16(static_cast<bf16*>(op.out) + to, sum, count);
    }
  }
}

// `partial` holds the tile's sums between passes over K, [Rows][64].
template <int Rows, int Lines>
void tile(const Linear& op, i64 row, i64 block, i64 first_pair, i64 last_pair, const byte* ahead, float* partial) {
  for (int part = 0; part < kBlockVectors; part += kVectors) {
    F32 acc[Rows][kVectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = first_pair ? load(partial + r * kColumns + (part + v) * kLanes) : zero();
    const byte* weight = op.block(block) + part / kLineVectors * kLine;
    multiply<Rows, Lines>(op, row, weight, first_pair, last_pair, ahead, acc);
    if (last_pair == op.pairs()) {
      finish<Rows>(op, row, block * kColumns + part * kLanes, acc);
    } else {
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kVectors; ++v) store(partial + r * kColumns + (part + v) * kLanes, acc[r][v]);
    }
  }
}

template <int Lines>
void tile_of(i64 rows, const Linear& op, i64 row, i64 block, i64 first_pair, i64 last_pair, const byte* ahead,
             float* partial) {
  switch (rows) {
    case 1: return tile<1, Lines>(op, row, block, first_pair, last_pair, ahead, partial);
    case 2: return tile<2, Lines>(op, row, block, first_pair, last_pair, ahead, partial);
#if defined(__AVX512BF16__)
    case 3: return tile<3, Lines>(op, row, block, first_pair, last_pair, ahead, partial);
    case 4: return tile<4, Lines>(op, row, block, first_pair, last_pair, ahead, partial);
    case 5: return tile<5, Lines>(op, row, block, first_pair, last_pair, ahead, partial);
    case 6: return tile<6, Lines>(op, row, block, first_pair, last_pair, ahead, partial);
#endif
  }
}

// Rows [first_row, last_row) of one block of columns; meanwhile `next`, which this thread will likely work on afterwards,
// is brought into the second-level cache, by the first tile or half by each of the first two: memory never rests. A single
// row leaves that to the hardware, which does it best where there is little else to do.
void column_block(const Linear& op, i64 first_row, i64 last_row, i64 block, i64 next) {
  const i64 rows = last_row - first_row;
  const i64 tiles = (rows + kRows - 1) / kRows;
  const i64 pairs = op.pairs();
  const bool single_pass = tiles == 1 || pairs <= kPairsPerPass;  // a single tile reads every line once anyway
  const i64 pairs_per_pass = single_pass ? pairs : kPairsPerPass;
  const i64 fetching_tiles = rows > 1 && single_pass && next != block ? kLinesPerStep : 0;
  thread_local std::vector<float> partial;
  if (!single_pass) partial.resize(rows * kColumns);
  for (i64 begin = 0; begin < pairs; begin += pairs_per_pass) {
    const i64 end = std::min(begin + pairs_per_pass, pairs);
    for (i64 t = 0; t < tiles; ++t) {
      const i64 row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
      float* sums = single_pass ? nullptr : partial.data() + row * kColumns;
      const byte* ahead = op.block(next) + t * pairs * kLine;
      if (t >= fetching_tiles)
        tile_of<0>(count, op, first_row + row, block, begin, end, nullptr, sums);
      else if (tiles == 1)
        tile_of<kLinesPerStep>(count, op, first_row + row, block, begin, end, ahead, sums);
      else
        tile_of<1>(count, op, first_row + row, block, begin, end, ahead, sums);
    }
  }
}

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

// out[M, N] = (x[M, K] codes^T) * scales + bias; strides in elements, columns adjacent.
extern "C" void baton_int8_linear(const bf16* x, i64 x_stride, const byte* weight, const float* scales,
                                  const bf16* bias, void* out, i64 out_stride, i64 m, i64 n, i64 k, int out_is_float,
                                  int threads) {
  const Linear op{x, x_stride, weight, scales, bias, out, out_stride, n, k, out_is_float != 0};
  const i64 blocks = (n + kColumns - 1) / kColumns;
  i64 row_parts = 1;
  while (blocks * row_parts < kTasksPerThread * threads && m / (row_parts + 1) >= kRowsPerTask) ++row_parts;
  const i64 tasks = blocks * row_parts;
  parallel_for(tasks, threads, [&](i64 task) {
    const i64 block = task / row_parts, part = task % row_parts;
    const i64 next = task + threads < tasks ? (task + threads) / row_parts : block;
    column_block(op, part * m / row_parts, (part + 1) * m / row_parts, block, next);
  });
}

// weight[N, K] (rows `stride` elements apart), quantised, to the blocked layout and scales[N].
extern "C" void baton_int8_pack(const bf16* weight, i64 stride, byte* packed, float* scales, i64 n, i64 k,
                                int threads) {
  const i64 pairs = (k + 1) / 2;
  parallel_for((n + kColumns - 1) / kColumns, threads, [&](i64 block) {
    std::vector<byte> codes(k);
    byte* to = packed + block * pairs * kColumns * 2;
    std::memset(to, 0, pairs * kColumns * 2);
    for (i64 column = 0; column < kColumns && block * kColumns + column < n; ++column) {
      const i64 row = block * kColumns + column;
      scales[row] = quantize(weight + row * stride, k, codes.data());
      byte* first = to + column / kLineColumns * kLine + place(column % kLineColumns);
      for (i64 i = 0; i < k; ++i) first[i / 2 * kColumns * 2 + i % 2] = codes[i];
    }
  });
}

// Rows `ids` of a packed weight, times their scales: out[T, K].
extern "C" void baton_int8_rows(const i64* ids, const byte* packed, const float* scales, bf16* out, i64 t, i64 k,
                                int threads) {
  const i64 pairs = (k + 1) / 2;
  parallel_ranges(t, 16, threads, [&](i64 begin, i64 end) {
    for (i64 token = begin; token < end; ++token) {
      const i64 column = ids[token] % kColumns;
      const byte* block = packed + ids[token] / kColumns * pairs * kColumns * 2;
      const byte* first = block + column / kLineColumns * kLine + place(column % kLineColumns);
      const F32 scale = broadcast(scales[ids[token]]);
      for (i64 start = 0; start < k; start += kLanes) {
        const i64 count = std::min<i64>(kLanes, k - start);
        float values[kLanes] = {};
        for (i64 i = 0; i < count; ++i) {
          const int code = first[(start + i) / 2 * kColumns * 2 + i % 2];
          values[i] = static_cast<float>(code > kLargest ? kLargest + 1 - code : code);
        }
        store_bf16(out + token * k + start, mul(load(values), scale), count);
      }
    }
  });
}
