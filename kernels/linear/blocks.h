// Products of bfloat16 rows with weights in blocks of 64 columns, with float32 accumulation.
//
// A step over K reads a pair of K of all columns of a block, some consecutive cache lines. Every output element is one
// chain of multiply-adds over K, in order, whatever M, tile, pass and thread: a row's bits do not depend on the other
// rows.
//
// What a block's lines hold is up to `Weights`, which has
//   kRows, kVectors         of a register tile; kVectors divides kBlockVectors
//   kVectorsPerRead         that `read(from, columns)` makes of what lies at `from`
//   kPairBytes              of a block and a pair of K
//   at                      the first block; the others follow
//   complete(sum, column, count)  what a sum over K becomes, of `count` columns from `column` on, before the bias.
#pragma once

#include <algorithm>
#include <vector>

#include "../activation/silu.h"
#include "../native/parallel.h"
#include "../native/simd.h"

namespace baton::linear {

constexpr int kBlock = 64;  // columns
constexpr int kBlockVectors = kBlock / kLanes;
constexpr i64 kPairsPerPass = 512;   // of K: of bfloat16 128 KiB of a block; the second-level cache holds several
constexpr i64 kPairsPerStep = 16;    // passes begin at multiples of it
constexpr i64 kMostRows = 192;       // of a task: their part of x and the sums stay in the second-level cache, too
constexpr i64 kLeastRows = 48;       // of a task, where rows are split only to have more tasks
constexpr i64 kMostBlocks = 16;      // of a task
constexpr i64 kMostRowBlocks = 384;  // rows times blocks of a task, unless it is one block
constexpr i64 kTasksPerThread = 16;  // at least, where rows can be split: threads should end together
constexpr i64 kSplitBlocksPerThread = 2;  // the last ones, each in as many tasks as have kLeastRows

enum class Output { kBf16, kFloat, kAdded, kGated };  // as in packed.py; kAdded: to what is there, after rounding

template <typename Weights>
struct Linear {
  const bf16* x;
  i64 x_stride;
  Weights weights;
  const bf16* bias;  // may be null
  void* out;
  i64 out_stride;
  i64 n, k;  // n: columns of `out`
  Output output;

  i64 block_columns() const { return output == Output::kGated ? kBlock / 2 : kBlock; }  // of `out`
  i64 element_bytes() const { return output == Output::kFloat ? sizeof(float) : sizeof(bf16); }
  i64 pairs() const { return (k + 1) / 2; }
  const char* block(i64 b) const { return weights.at + b * pairs() * Weights::kPairBytes; }
};

// What to bring into the second-level cache while a tile is computed: at each step over K as many lines as the tile
// is made for, then on by `stride` bytes.
struct Prefetch {
  const char* from;
  i64 stride;
};

// Adds pairs [first_pair, last_pair) of K to `sums` [Rows][64], or, where they are the first, begins `sums` with them.
template <typename Weights, int Rows, int Lines>
void tile(const Linear<Weights>& op, i64 row, const char* block, i64 first_pair, i64 last_pair, Prefetch prefetch,
          float* sums) {
  constexpr int kVectors = Weights::kVectors, kVectorsPerRead = Weights::kVectorsPerRead;
  constexpr i64 kVectorBytes = Weights::kPairBytes / kBlockVectors;
  const bf16* x = op.x + row * op.x_stride;
  const i64 whole = last_pair * 2 > op.k ? last_pair - 1 : last_pair;
  for (int part = 0; part < kBlockVectors; part += kVectors) {
    F32 acc[Rows][kVectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = first_pair ? load(sums + r * kBlock + (part + v) * kLanes) : zero();
    const char* next = prefetch.from;
    auto step = [&](i64 pair, auto read) __attribute__((always_inline)) {
      for (int l = 0; l < Lines; ++l) _mm_prefetch(next + l * kLine, _MM_HINT_T1);
      next += prefetch.stride;
      for (int first = 0; first < kVectors; first += kVectorsPerRead) {
        Pairs columns[kVectorsPerRead];
        Weights::read(block + pair * Weights::kPairBytes + (part + first) * kVectorBytes, columns);
        i64 start = pair * 2;
        // x anew for each read: kept in registers, it would push sums out of them.
        if constexpr (kVectorsPerRead < kVectors) asm volatile("" : "+r"(start));
        for (int r = 0; r < Rows; ++r) {
          const Pairs value = broadcast_pair(read(x + r * op.x_stride + start));
          for (int v = 0; v < kVectorsPerRead; ++v) acc[r][first + v] = dot_pairs(acc[r][first + v], value, columns[v]);
        }
      }
    };
    for (i64 pair = first_pair; pair < whole; ++pair) step(pair, read_pair);
    if (whole < last_pair) step(whole, [](const bf16* p) -> std::uint32_t { return *p; });
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kVectors; ++v) store(sums + r * kBlock + (part + v) * kLanes, acc[r][v]);
  }
}

template <typename Weights>
using TileOf = void (*)(const Linear<Weights>&, i64, const char*, i64, i64, Prefetch, float*);

template <typename Weights, int Lines>
TileOf<Weights> tile_of(i64 rows) {
  constexpr auto upto = [](int count) { return std::min(count, Weights::kRows); };
  switch (rows) {
    case 1: return tile<Weights, 1, Lines>;
    case 2: return tile<Weights, upto(2), Lines>;
    case 3: return tile<Weights, upto(3), Lines>;
    case 4: return tile<Weights, upto(4), Lines>;
    case 5: return tile<Weights, upto(5), Lines>;
    default: return tile<Weights, upto(6), Lines>;
  }
}

template <typename Weights>
void multiply(const Linear<Weights>& op, i64 row, i64 rows, const char* block, i64 first_pair, i64 last_pair, int lines,
              Prefetch prefetch, float* sums) {
  static_assert(Weights::kRows <= 6);
  const auto run = lines == 0   ? tile_of<Weights, 0>(rows)
                   : lines == 1 ? tile_of<Weights, 1>(rows)
                                : tile_of<Weights, 2>(rows);
  run(op, row, block, first_pair, last_pair, prefetch, sums);
}

// Writes `rows` rows of `sums` [rows][64], which are complete.
template <Output kOutput, typename Weights>
void finish(const Linear<Weights>& op, i64 row, i64 rows, i64 block, const float* sums) {
  const i64 columns = op.block_columns();
  for (i64 first = 0; first < columns; first += kLanes) {
    const i64 column = block * columns + first;
    const i64 count = op.n - column;
    if (count <= 0) break;
    const i64 place = row * op.out_stride + column;
    for (i64 r = 0; r < rows; ++r) {
      const auto sum = [&](i64 half) {
        const i64 from = half * op.n + column;
        const F32 total = op.weights.complete(load(sums + r * kBlock + half * columns + first), from, count);
        return op.bias ? add(total, load_bf16(op.bias + from, count)) : total;
      };
      const i64 to = place + r * op.out_stride;
      if constexpr (kOutput == Output::kBf16) store_bf16(static_cast<bf16*>(op.out) + to, sum(0), count);
      if constexpr (kOutput == Output::kFloat) store_float(static_cast<float*>(op.out) + to, sum(0), count);
      if constexpr (kOutput == Output::kAdded) {
        bf16* there = static_cast<bf16*>(op.out) + to;
        store_bf16(there, add(round_to_bf16(sum(0)), load_bf16(there, count)), count);
      }
      if constexpr (kOutput == Output::kGated) {
        const F32 gated = silu_and_mul(round_to_bf16(sum(0)), round_to_bf16(sum(1)));
        store_bf16(static_cast<bf16*>(op.out) + to, gated, count);
      }
    }
  }
}

template <typename Weights>
void finish(const Linear<Weights>& op, i64 row, i64 rows, i64 block, const float* sums) {
  switch (op.output) {
    case Output::kBf16: return finish<Output::kBf16>(op, row, rows, block, sums);
    case Output::kFloat: return finish<Output::kFloat>(op, row, rows, block, sums);
    case Output::kAdded: return finish<Output::kAdded>(op, row, rows, block, sums);
    case Output::kGated: return finish<Output::kGated>(op, row, rows, block, sums);
  }
}

// Brings the lines into the second-level cache that `finish` will write: they come while the sums are computed.
template <typename Weights>
void prefetch_outputs(const Linear<Weights>& op, i64 row, i64 rows, i64 block) {
  const i64 columns = std::min(op.block_columns(), op.n - block * op.block_columns());
  for (i64 r = 0; r < rows; ++r) {
    const i64 first = (row + r) * op.out_stride + block * op.block_columns();
    const char* from = static_cast<const char*>(op.out) + first * op.element_bytes();
    for (i64 at = 0; at < columns * op.element_bytes(); at += kLine) _mm_prefetch(from + at, _MM_HINT_T1);
  }
}

// Rows [first_row, last_row), at most kMostRows, of one block of columns, K in passes that the second-level cache
// holds. Meanwhile the next pass, in the end that of `next`, which this thread will likely work on afterwards, is brought
// there too, spread over the tiles so that memory never rests. A single tile reads each line once: the hardware's own
// prefetching does that best, and does it for as long as lines follow each other.
template <typename Weights>
void column_block(const Linear<Weights>& op, i64 first_row, i64 last_row, i64 block, i64 next) {
  const i64 rows = last_row - first_row;
  const i64 tiles = (rows + Weights::kRows - 1) / Weights::kRows;
  const i64 passes = tiles == 1 ? 1 : (op.pairs() + kPairsPerPass - 1) / kPairsPerPass;
  alignas(kLine) float sums[kMostRows * kBlock];
  const auto start = [&](i64 pass) {
    return pass == passes ? op.pairs() : op.pairs() * pass / passes / kPairsPerStep * kPairsPerStep;
  };
  for (i64 pass = 0; pass < passes; ++pass) {
    const i64 begin = start(pass), end = start(pass + 1);
    const bool last = pass + 1 == passes;
    const char* ahead = last ? op.block(next) : op.block(block) + end * Weights::kPairBytes;
    const i64 ahead_bytes = (last ? start(1) : start(pass + 2) - end) * Weights::kPairBytes;
    const bool idle = tiles == 1 || (last && next == block);
    const i64 stride = idle ? 0 : (ahead_bytes + tiles * (end - begin) - 1) / (tiles * (end - begin));
    const int lines = static_cast<int>((stride + kLine - 1) / kLine);
    for (i64 t = 0; t < tiles; ++t) {
      const i64 row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
      if (last && tiles > 1) prefetch_outputs(op, first_row + row, count, block);
      multiply(op, first_row + row, count, op.block(block), begin, end, lines,
               {ahead + ahead_bytes * t / tiles, stride}, sums + row * kBlock);
      if (last) finish(op, first_row + row, count, block, sums + row * kBlock);
    }
  }
}

// Some consecutive blocks of columns, of some rows.
struct Task {
  i64 first_row, last_row, first, last;
};

// Threads take tasks as they come. The last ones are shorter, a thread's share of what is left, and in the end some of
// a block's rows, so that threads end together, but no more of them: a jump to another place costs what the hardware's
// prefetching needs to find its way again, about a microsecond. `row_of(part)`: where a part of the rows begins.
template <i64 kRows, typename RowOf>
void split(i64 row_parts, RowOf row_of, i64 blocks, i64 most_blocks, int threads, std::vector<Task>& tasks) {
  i64 left = row_parts * blocks;
  for (i64 part = 0; part < row_parts; ++part)
    for (i64 first = 0; first < blocks; first = tasks.back().last + 1) {
      const i64 count = std::clamp(left / threads, i64{1}, std::min(most_blocks, blocks - first));
      const i64 row = row_of(part), rows = row_of(part + 1) - row;
      const i64 pieces = left > kSplitBlocksPerThread * threads ? 1 : std::max(rows / kLeastRows, i64{1});
      const auto piece_at = [&](i64 piece) {
        return row + (piece == pieces ? rows : rows * piece / pieces / kRows * kRows);
      };
      for (i64 piece = 0; piece < pieces; ++piece)
        tasks.push_back({piece_at(piece), piece_at(piece + 1), first, first + count - 1});
      left -= count;
    }
}

// All of the product.
template <typename Weights>
void run(const Linear<Weights>& op, i64 m, int threads) {
  if (m == 0) return;
  const i64 blocks = (op.n + op.block_columns() - 1) / op.block_columns();
  i64 row_parts = (m + kMostRows - 1) / kMostRows;
  while (blocks * row_parts < kTasksPerThread * threads && m / (row_parts + 1) >= kLeastRows) ++row_parts;
  const i64 most_blocks = std::clamp(kMostRowBlocks * row_parts / m, i64{1}, kMostBlocks);
  // Parts end where tiles do, as a row takes longer in a tile that has fewer; so none is larger than kMostRows.
  static_assert(kMostRows % Weights::kRows == 0);
  const i64 tiles = (m + Weights::kRows - 1) / Weights::kRows;
  const auto row_of = [&](i64 part) { return std::min(m, tiles * part / row_parts * Weights::kRows); };
  std::vector<Task> tasks;
  split<Weights::kRows>(row_parts, row_of, blocks, most_blocks, threads, tasks);
  const i64 count = static_cast<i64>(tasks.size());
  parallel_for(count, threads, [&](i64 index) {
    const Task& task = tasks[index];
    const i64 after = index + threads < count ? tasks[index + threads].first : task.last;
    for (i64 block = task.first; block <= task.last; ++block)
      column_block(op, task.first_row, task.last_row, block, block < task.last ? block + 1 : after);
  });
}

}  // namespace baton::linear
