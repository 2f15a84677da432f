// Linear layers in bfloat16 with float32 accumulation.
//
// A weight [N, K] is stored as [ceil(N / 64)][ceil(K / 2)][64][2], padded with zeros: a step over K reads four
// consecutive cache lines, and sixteen output columns come out of each. Every output element is one chain of
// multiply-adds over K, in order, whatever M, tile and thread: a row's bits do not depend on the other rows.

#include <vector>

#include "../native/parallel.h"
#include "../native/simd.h"

namespace baton {
namespace {

constexpr int kBlock = 64;                     // columns
constexpr int kBlockVectors = kBlock / kLanes;
constexpr i64 kPairsPerPass = 2048;            // of K: 512 KiB of a block, half of a usual second-level cache
constexpr i64 kRowsPerTask = 48;               // at least, where rows are split to keep all threads busy

struct Linear {
  const bf16* x;
  i64 x_stride;
  const bf16* weight;
  const bf16* bias;  // may be null
  void* out;
  i64 out_stride;
  i64 n, k;
  bool out_is_float;

  i64 pairs() const { return (k + 1) / 2; }
  const bf16* block(i64 b) const { return weight + b * pairs() * kBlock * 2; }
};

// What to bring into the cache while a tile is computed: `Lines` cache lines per step over K.
struct Prefetch {
  const char* from;
};

template <int Rows, int Lines>
inline __attribute__((always_inline)) void multiply(const Linear& op, i64 row, const bf16* weight, i64 first_pair,
                                                    i64 last_pair, Prefetch prefetch, F32 (&acc)[Rows][kTileVectors]) {
  const bf16* x = op.x + row * op.x_stride;
  const i64 whole = last_pair * 2 > op.k ? last_pair - 1 : last_pair;
  const char* next = prefetch.from;
  auto step = [&](i64 pair, auto read) __attribute__((always_inline)) {
    const bf16* line = weight + pair * kBlock * 2;
    Pairs columns[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) columns[v] = load_pairs(line + v * kLanes * 2);
    for (int l = 0; l < Lines; ++l) _mm_prefetch(next + l * kLine, _MM_HINT_T1);
    next += Lines * kLine;
    for (int r = 0; r < Rows; ++r) {
      const Pairs value = broadcast_pair(read(x + r * op.x_stride + pair * 2));
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = dot_pairs(acc[r][v], value, columns[v]);
    }
  };
  for (i64 pair = first_pair; pair < whole; ++pair) step(pair, read_pair);
  if (whole < last_pair) step(whole, [](const bf16* p) -> std::uint32_t { return *p; });
}

template <int Rows>
inline void finish(const Linear& op, i64 row, i64 column, F32 (&acc)[Rows][kTileVectors]) {
  for (int v = 0; v < kTileVectors; ++v) {
    const i64 start = column + v * kLanes;
    const i64 count = op.n - start;
    if (count <= 0) return;
    const F32 bias = op.bias ? load_bf16(op.bias + start, count) : zero();
    for (int r = 0; r < Rows; ++r) {
      const F32 sum = op.bias ? add(acc[r][v], bias) : acc[r][v];
      const i64 place = (row + r) * op.out_stride + start;
      if (op.out_is_float)
        store_float(static_cast<float*>(op.out) + place, sum, count);
      else
        store_bf16(static_cast<bf16*>(op.out) + place, sum, count);
    }
  }
}

// `partial` holds the tile's sums between passes over K, [Rows][64].
template <int Rows, int Lines>
void tile(const Linear& op, i64 row, i64 block, i64 first_pair, i64 last_pair, Prefetch prefetch, float* partial) {
  for (int part = 0; part < kBlockVectors; part += kTileVectors) {
    F32 acc[Rows][kTileVectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kTileVectors; ++v)
        acc[r][v] = first_pair ? load(partial + r * kBlock + (part + v) * kLanes) : zero();
    multiply<Rows, Lines>(op, row, op.block(block) + part * kLanes * 2, first_pair, last_pair, prefetch, acc);
    if (last_pair == op.pairs()) {
      finish<Rows>(op, row, block * kBlock + part * kLanes, acc);
    } else {
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kTileVectors; ++v) store(partial + r * kBlock + (part + v) * kLanes, acc[r][v]);
    }
  }
}

template <int Lines>
void tile_of(i64 rows, const Linear& op, i64 row, i64 block, i64 first_pair, i64 last_pair, Prefetch prefetch,
             float* partial) {
  switch (rows) {
    case 1: return tile<1, Lines>(op, row, block, first_pair, last_pair, prefetch, partial);
    case 2: return tile<2, Lines>(op, row, block, first_pair, last_pair, prefetch, partial);
    case 3: return tile<3, Lines>(op, row, block, first_pair, last_pair, prefetch, partial);
    case 4: return tile<4, Lines>(op, row, block, first_pair, last_pair, prefetch, partial);
#if defined(__AVX512BF16__)
    case 5: return tile<5, Lines>(op, row, block, first_pair, last_pair, prefetch, partial);
    case 6: return tile<6, Lines>(op, row, block, first_pair, last_pair, prefetch, partial);
#endif
  }
}

// Rows [first_row, last_row) of one block of columns; meanwhile `next`, which this thread will likely work on afterwards,
// is brought into the second-level cache, spread over the tiles so that memory never rests.
void column_block(const Linear& op, i64 first_row, i64 last_row, i64 block, i64 next) {
  const i64 rows = last_row - first_row;
  const i64 tiles = (rows + kTileRows - 1) / kTileRows;
  const i64 pairs = op.pairs();
  const bool single_pass = pairs <= kPairsPerPass;
  thread_local std::vector<float> partial;
  if (!single_pass) partial.resize(rows * kBlock);
  const char* ahead = reinterpret_cast<const char*>(op.block(next));
  for (i64 begin = 0; begin < pairs; begin += kPairsPerPass) {
    const i64 end = begin + kPairsPerPass < pairs ? begin + kPairsPerPass : pairs;
    i64 row = 0;
    for (i64 t = 0; t < tiles; ++t) {
      const i64 count = rows / tiles + (t < rows % tiles);
      float* sums = single_pass ? nullptr : partial.data() + row * kBlock;
      const i64 line = pairs * kLine;  // bytes of a quarter of a block
      if (!single_pass || next == block)
        tile_of<0>(count, op, first_row + row, block, begin, end, {nullptr}, sums);
      else if (tiles == 1)
        tile_of<4>(count, op, first_row + row, block, begin, end, {ahead}, sums);
      else if (tiles < 4 && t < 2)
        tile_of<2>(count, op, first_row + row, block, begin, end, {ahead + t * 2 * line}, sums);
      else if (tiles >= 4 && t < 4)
        tile_of<1>(count, op, first_row + row, block, begin, end, {ahead + t * line}, sums);
      else
        tile_of<0>(count, op, first_row + row, block, begin, end, {nullptr}, sums);
      row += count;
    }
  }
}

}  // namespace
}  // namespace baton

using namespace baton;

// out[M, N] = x[M, K] weight^T + bias; strides in elements, columns adjacent.
extern "C" void baton_linear(const bf16* x, i64 x_stride, const bf16* weight, const bf16* bias, void* out,
                             i64 out_stride, i64 m, i64 n, i64 k, int out_is_float, int threads) {
  const Linear op{x, x_stride, weight, bias, out, out_stride, n, k, out_is_float != 0};
  const i64 blocks = (n + kBlock - 1) / kBlock;
  i64 row_parts = 1;
  while (blocks * row_parts < 4 * threads && m / (row_parts + 1) >= kRowsPerTask) ++row_parts;
  const i64 tasks = blocks * row_parts;
  parallel_for(tasks, threads, [&](i64 task) {
    const i64 part = task / blocks, block = task % blocks;
    const i64 next = task + threads < tasks ? (task + threads) % blocks : block;
    column_block(op, part * m / row_parts, (part + 1) * m / row_parts, block, next);
  });
}

// weight[N, K] (rows `stride` elements apart) to the blocked layout.
extern "C" void baton_linear_pack(const bf16* weight, i64 stride, bf16* packed, i64 n, i64 k, int threads) {
  const i64 pairs = (k + 1) / 2;
  parallel_for((n + kBlock - 1) / kBlock, threads, [&](i64 block) {
    bf16* to = packed + block * pairs * kBlock * 2;
    std::memset(to, 0, pairs * kBlock * 2 * sizeof(bf16));
    for (i64 column = 0; column < kBlock && block * kBlock + column < n; ++column) {
      const bf16* from = weight + (block * kBlock + column) * stride;
      for (i64 i = 0; i < k; ++i) to[(i / 2 * kBlock + column) * 2 + i % 2] = from[i];
    }
  });
}

// Rows `ids` of a packed weight: out[T, K].
extern "C" void baton_linear_rows(const i64* ids, const bf16* packed, bf16* out, i64 t, i64 k, int threads) {
  const i64 pairs = (k + 1) / 2;
  parallel_ranges(t, 16, threads, [&](i64 begin, i64 end) {
    for (i64 token = begin; token < end; ++token) {
      const bf16* from = packed + (ids[token] / kBlock * pairs * kBlock + ids[token] % kBlock) * 2;
      for (i64 i = 0; i < k; ++i) out[token * k + i] = from[i / 2 * kBlock * 2 + i % 2];
    }
  });
}
