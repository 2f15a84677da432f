// Linear layers in bfloat16 with float32 accumulation.
//
// A weight [N, K] is stored as [ceil(N / 64)][ceil(K / 2)][64][2], padded with zeros: a step over K reads four
// consecutive cache lines, and sixteen output columns come out of each. Every output element is one chain of
// multiply-adds over K, in order, whatever M, tile, pass and thread: a row's bits do not depend on the other rows.
//
// A gated weight [2 * size, K], gates above what they gate, has 32 gates and then their 32 partners in each block: a
// tile holds both, and writes the activation instead of them.

#include "../activation/silu.h"
#include "../native/parallel.h"
#include "../native/simd.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace baton {
namespace {

constexpr int kBlock = 64;  // columns
constexpr int kBlockVectors = kBlock / kLanes;
constexpr i64 kPairsPerPass = 512;   // of K: 128 KiB of a block, of which the second-level cache holds two
constexpr i64 kPairsPerStep = 16;    // passes begin at multiples of it
constexpr i64 kMostRows = 192;       // of a task: their part of x and the sums stay in the second-level cache, too
constexpr i64 kLeastRows = 48;       // of a task, where rows are split only to have more tasks
constexpr i64 kTasksPerThread = 16;  // at least, where rows can be split: threads should end together

enum class Output { kBf16, kFloat, kGated };

struct Linear {
  const bf16* x;
  i64 x_stride;
  const bf16* weight;
  const bf16* bias;  // may be null
  void* out;
  i64 out_stride;
  i64 n, k;  // n: columns of `out`
  Output output;

  i64 block_columns() const { return output == Output::kGated ? kBlock / 2 : kBlock; }  // of `out`
  i64 pairs() const { return (k + 1) / 2; }
  const bf16* block(i64 b) const { return weight + b * pairs() * kBlock * 2; }
};

// What to bring into the second-level cache while a tile is computed: at each step over K as many lines as the tile
// is made for, then on by `stride` bytes.
struct Prefetch {
  const char* from;
  i64 stride;
};

#if defined(__AMX_BF16__)

constexpr int kRowsPerTile = amx::kRows;

void multiply(const Linear& op, i64 row, i64 rows, const bf16* block, i64 first_pair, i64 last_pair, int,
              Prefetch prefetch, float* sums) {
  amx::tile(op.x + row * op.x_stride, op.x_stride, static_cast<int>(rows), op.k, block, first_pair, last_pair,
            prefetch.from, prefetch.stride, sums);
}

#else

constexpr int kRowsPerTile = kTileRows;

// Adds pairs [first_pair, last_pair) of K to `sums` [Rows][64], or, where they are the first, begins `sums` with them.
template <int Rows, int Lines>
void tile(const Linear& op, i64 row, const bf16* block, i64 first_pair, i64 last_pair, Prefetch prefetch, float* sums) {
  const bf16* x = op.x + row * op.x_stride;
  const i64 whole = last_pair * 2 > op.k ? last_pair - 1 : last_pair;
  for (int part = 0; part < kBlockVectors; part += kTileVectors) {
    F32 acc[Rows][kTileVectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kTileVectors; ++v)
        acc[r][v] = first_pair ? load(sums + r * kBlock + (part + v) * kLanes) : zero();
    const char* next = prefetch.from;
    auto step = [&](i64 pair, auto read) __attribute__((always_inline)) {
      const bf16* line = block + (pair * kBlock + part * kLanes) * 2;
      Pairs columns[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) columns[v] = load_pairs(line + v * kLanes * 2);
      for (int l = 0; l < Lines; ++l) _mm_prefetch(next + l * kLine, _MM_HINT_T1);
      next += prefetch.stride;
      for (int r = 0; r < Rows; ++r) {
        const Pairs value = broadcast_pair(read(x + r * op.x_stride + pair * 2));
        for (int v = 0; v < kTileVectors; ++v) acc[r][v] = dot_pairs(acc[r][v], value, columns[v]);
      }
    };
    for (i64 pair = first_pair; pair < whole; ++pair) step(pair, read_pair);
    if (whole < last_pair) step(whole, [](const bf16* p) -> std::uint32_t { return *p; });
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kTileVectors; ++v) store(sums + r * kBlock + (part + v) * kLanes, acc[r][v]);
  }
}

using TileOf = void (*)(const Linear&, i64, const bf16*, i64, i64, Prefetch, float*);

template <int Lines>
TileOf tile_of(i64 rows) {
  switch (rows) {
    case 1: return tile<1, Lines>;
    case 2: return tile<2, Lines>;
    case 3: return tile<3, Lines>;
    default: return tile<4, Lines>;
#if defined(__AVX512BF16__)
    case 5: return tile<5, Lines>;
    case 6: return tile<6, Lines>;
#endif
  }
}

void multiply(const Linear& op, i64 row, i64 rows, const bf16* block, i64 first_pair, i64 last_pair, int lines,
              Prefetch prefetch, float* sums) {
  const TileOf run = lines == 0 ? tile_of<0>(rows) : lines == 1 ? tile_of<1>(rows) : tile_of<2>(rows);
  run(op, row, block, first_pair, last_pair, prefetch, sums);
}

#endif

// Writes `rows` rows of `sums` [rows][64], which are complete.
void finish(const Linear& op, i64 row, i64 rows, i64 block, const float* sums) {
  const i64 columns = op.block_columns();
  for (i64 r = row; r < row + rows; ++r, sums += kBlock)
    for (i64 first = 0; first < columns; first += kLanes) {
      const i64 column = block * columns + first;
      const i64 count = op.n - column;
      if (count <= 0) break;
      const auto sum = [&](i64 half) {
        const F32 total = load(sums + half * columns + first);
        return op.bias ? add(total, load_bf16(op.bias + half * op.n + column, count)) : total;
      };
      const i64 place = r * op.out_stride + column;
      switch (op.output) {
        case Output::kBf16: store_bf16(static_cast<bf16*>(op.out) + place, sum(0), count); break;
        case Output::kFloat: store_float(static_cast<float*>(op.out) + place, sum(0), count); break;
        case Output::kGated: {
          const F32 gated = silu_and_mul(round_to_bf16(sum(0)), round_to_bf16(sum(1)));
          store_bf16(static_cast<bf16*>(op.out) + place, gated, count);
          break;
        }
      }
    }
}

// Rows [first_row, last_row), at most kMostRows, of one block of columns, K in passes that the second-level cache holds.
// Meanwhile the next pass, in the end that of `next`, which this thread will likely work on afterwards, is brought there
// too, spread over the tiles so that memory never rests. A single tile reads each line once: the hardware's own
// prefetching does that best.
void column_block(const Linear& op, i64 first_row, i64 last_row, i64 block, i64 next) {
  const i64 rows = last_row - first_row;
  const i64 tiles = (rows + kRowsPerTile - 1) / kRowsPerTile;
  const i64 passes = tiles == 1 ? 1 : (op.pairs() + kPairsPerPass - 1) / kPairsPerPass;
  alignas(kLine) float sums[kMostRows * kBlock];
  const auto start = [&](i64 pass) {
    return pass == passes ? op.pairs() : op.pairs() * pass / passes / kPairsPerStep * kPairsPerStep;
  };
  for (i64 pass = 0; pass < passes; ++pass) {
    const i64 begin = start(pass), end = start(pass + 1);
    const bool last = pass + 1 == passes;
    const char* ahead = reinterpret_cast<const char*>(last ? op.block(next) : op.block(block) + end * kBlock * 2);
    const i64 ahead_bytes = (last ? start(1) : start(pass + 2) - end) * kBlock * 2 * sizeof(bf16);
    const bool idle = tiles == 1 || (last && next == block);
    const i64 stride = idle ? 0 : (ahead_bytes + tiles * (end - begin) - 1) / (tiles * (end - begin));
    const int lines = static_cast<int>((stride + kLine - 1) / kLine);
    for (i64 t = 0; t < tiles; ++t) {
      const i64 row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
      multiply(op, first_row + row, count, op.block(block), begin, end, lines,
               {ahead + ahead_bytes * t / tiles, stride}, sums + row * kBlock);
      if (last) finish(op, first_row + row, count, block, sums + row * kBlock);
    }
  }
}

void run(const Linear& op, i64 m, int threads) {
  if (m == 0) return;
  const i64 blocks = (op.n + op.block_columns() - 1) / op.block_columns();
  i64 row_parts = (m + kMostRows - 1) / kMostRows;
  while (blocks * row_parts < kTasksPerThread * threads && m / (row_parts + 1) >= kLeastRows) ++row_parts;
  const i64 tasks = blocks * row_parts;
  parallel_for(tasks, threads, [&](i64 task) {
    const i64 part = task / blocks, block = task % blocks;
    const i64 next = task + threads < tasks ? (task + threads) % blocks : block;
    column_block(op, part * m / row_parts, (part + 1) * m / row_parts, block, next);
  });
}

// row(block, column): the row of `weight` that is there, or -1.
template <typename Row>
void pack(const bf16* weight, i64 stride, bf16* packed, i64 blocks, i64 k, int threads, Row row) {
  const i64 pairs = (k + 1) / 2;
  parallel_for(blocks, threads, [&](i64 block) {
    bf16* to = packed + block * pairs * kBlock * 2;
    std::memset(to, 0, pairs * kBlock * 2 * sizeof(bf16));
    for (i64 column = 0; column < kBlock; ++column) {
      if (row(block, column) < 0) continue;
      const bf16* from = weight + row(block, column) * stride;
      for (i64 i = 0; i < k; ++i) to[(i / 2 * kBlock + column) * 2 + i % 2] = from[i];
    }
  });
}

}  // namespace
}  // namespace baton

using namespace baton;

// out[M, N] = x[M, K] weight^T + bias; strides in elements, columns adjacent.
extern "C" void baton_linear(const bf16* x, i64 x_stride, const bf16* weight, const bf16* bias, void* out,
                             i64 out_stride, i64 m, i64 n, i64 k, int out_is_float, int threads) {
  run({x, x_stride, weight, bias, out, out_stride, n, k, out_is_float ? Output::kFloat : Output::kBf16}, m, threads);
}

// out[M, size] = silu(gates) * partners of the linear layer with a gated weight, bias [2 * size], both rounded first.
extern "C" void baton_linear_silu_and_mul(const bf16* x, i64 x_stride, const bf16* weight, const bf16* bias, bf16* out,
                                          i64 out_stride, i64 m, i64 size, i64 k, int threads) {
  run({x, x_stride, weight, bias, out, out_stride, size, k, Output::kGated}, m, threads);
}

// weight[N, K] (rows `stride` elements apart) to the blocked layout.
extern "C" void baton_linear_pack(const bf16* weight, i64 stride, bf16* packed, i64 n, i64 k, int threads) {
  pack(weight, stride, packed, (n + kBlock - 1) / kBlock, k, threads, [&](i64 block, i64 column) {
    const i64 row = block * kBlock + column;
    return row < n ? row : -1;
  });
}

// weight[2 * size, K] (rows `stride` elements apart) to the blocked layout of a gated one.
extern "C" void baton_linear_pack_gated(const bf16* weight, i64 stride, bf16* packed, i64 size, i64 k, int threads) {
  constexpr i64 kHalf = kBlock / 2;
  pack(weight, stride, packed, (size + kHalf - 1) / kHalf, k, threads, [&](i64 block, i64 column) {
    const i64 gate = block * kHalf + column % kHalf;
    return gate < size ? column / kHalf * size + gate : -1;
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
