// Attention of a step's queries over the paged cache: decode and (chunked) prefill in one call.
//
// Online softmax over tiles of 64 keys at fixed positions. For one query every sum has one order, given by positions
// alone: scores are chains over head_dim, outputs chains over keys, as are the denominator's sixteen lanes, joined at
// the end. Nothing of keys that a query does not see enters its sums, whatever lies there. So neither the other queries
// of its tile, nor the batch, nor threads, nor where blocks lie show in the result.
//
// Memory is read in the order in which it lies: while a task works on one tile of keys, head by head, it brings the
// next one into the second-level cache, block by block.

#include <algorithm>
#include <vector>

#include "../native/parallel.h"
#include "tasks.h"

namespace baton {
namespace {

constexpr int kParts = kKeyTile / kTileTokens;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341F;

// Where the four quarters of one head's key tile lie.
struct KeyTile {
  const bf16* keys[kParts];
  const bf16* values[kParts];
};

struct Scratch {
  std::vector<bf16> query, weights, keys, values;
  std::vector<float> maximum, total, sums;

  void fit(i64 rows, i64 head_dim) {
    query.resize(rows * head_dim);
    weights.resize(kTileRows * kKeyTile);
    maximum.assign(rows + kLanes, kMinusInfinity);
    total.assign(rows * kLanes, 0.0F);
    sums.assign(rows * head_dim, 0.0F);
    keys.resize(kKeyTile * head_dim);
    values.resize(kKeyTile * head_dim);
  }
};

inline void prefetch(const bf16* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

// acc[r][v] += row(r) . column(v); the fewer stay in registers, the others are read as they are needed.
template <int Rows, int Vectors, typename Row, typename Column>
inline __attribute__((always_inline)) void multiply_add(Row row, Column column, F32 (&acc)[Rows][Vectors]) {
  if constexpr (Rows < Vectors) {
    Pairs rows[Rows];
    for (int r = 0; r < Rows; ++r) rows[r] = row(r);
    for (int v = 0; v < Vectors; ++v) {
      const Pairs values = column(v);
      for (int r = 0; r < Rows; ++r) acc[r][v] = dot_pairs(acc[r][v], rows[r], values);
    }
  } else {
    Pairs columns[Vectors];
    for (int v = 0; v < Vectors; ++v) columns[v] = column(v);
    for (int r = 0; r < Rows; ++r) {
      const Pairs values = row(r);
      for (int v = 0; v < Vectors; ++v) acc[r][v] = dot_pairs(acc[r][v], values, columns[v]);
    }
  }
}

// Some rows of one head, the first of which sees `visible[0]` keys of a tile, all of them at least one.
template <int Rows>
struct Chunk {
  i64 row;  // place among the task's rows
  i64 visible[Rows];
};

class Worker {
 public:
  explicit Worker(const Step& step) : step_(step), scratch_(scratch()) {}

  // `next` (may be null) is what this thread does afterwards.
  void run(const Task& task, const Task* next) {
    const i64 rows = task.tokens * step_.group();
    scratch_.fit(rows * task.heads, step_.layout.head_dim);
    read_queries(task);
    for (i64 start = 0; start < task.end(); start += kKeyTile) {
      const bool last = start + kKeyTile >= task.end();
      for (i64 head = 0; head < task.heads; ++head) {
        const KeyTile tile = locate(task, start, head);
        const KeyTile ahead = last ? next ? locate_ahead(*next, 0, head, tile) : tile
                                   : locate_ahead(task, start + kKeyTile, head, tile);
        attend_head(task, head, start, tile, ahead);
      }
    }
    write_outputs(task);
  }

 private:
  // body(row, token, query head) for each row: heads, then tokens, then query heads of the group.
  template <typename Body>
  void for_each_row(const Task& task, Body&& body) {
    const i64 first = step_.starts[task.request] + task.token;
    i64 row = 0;
    for (i64 head = task.head; head < task.head + task.heads; ++head)
      for (i64 token = first; token < first + task.tokens; ++token)
        for (i64 i = 0; i < step_.group(); ++i) body(row++, token, head * step_.group() + i);
  }

  void read_queries(const Task& task) {
    const i64 head_dim = step_.layout.head_dim;
    for_each_row(task, [&](i64 row, i64 token, i64 head) {
      std::memcpy(scratch_.query.data() + row * head_dim, step_.query + token * step_.query_stride + head * head_dim,
                  head_dim * sizeof(bf16));
    });
  }

  void write_outputs(const Task& task) {
    const i64 head_dim = step_.layout.head_dim;
    for_each_row(task, [&](i64 row, i64 token, i64 head) {
      const F32 total = broadcast(sum_lanes(load(scratch_.total.data() + row * kLanes)));
      bf16* out = step_.out + (token * step_.heads + head) * head_dim;
      for (i64 i = 0; i < head_dim; i += kLanes)
        store_bf16(out + i, div(load(scratch_.sums.data() + row * head_dim + i), total), kLanes);
    });
  }

  i64 place(const Task& task, i64 position, i64 head) const {
    const i64 size = step_.layout.block_size;
    const i64 block = step_.tables[task.request * step_.table_width + position / size];
    return step_.layout.place(block, position % size, task.head + head);
  }

  // The tile of keys from `start`; quarters past the last key repeat the first one, and are masked.
  KeyTile locate(const Task& task, i64 start, i64 head) {
    const KVLayout& layout = step_.layout;
    KeyTile tile;
    for (int part = 0; part < kParts; ++part) {
      const i64 position = start + part * kTileTokens;
      if (layout.tiled()) {
        const i64 at = place(task, position < task.end() ? position : start, head);
        tile.keys[part] = step_.keys + at;
        tile.values[part] = step_.values + at;
      } else {
        bf16* keys = scratch_.keys.data() + part * layout.tile_elements();
        bf16* values = scratch_.values.data() + part * layout.tile_elements();
        for (i64 lane = 0; lane < kTileTokens && position + lane < task.end(); ++lane) {
          const i64 at = place(task, position + lane, head);
          for (i64 i = 0; i < layout.head_dim; ++i) {
            keys[layout.key_element(lane, i)] = step_.keys[at + i];
            values[layout.value_element(lane, i)] = step_.values[at + i];
          }
        }
        tile.keys[part] = keys;
        tile.values[part] = values;
      }
    }
    return tile;
  }

  // What to bring in while the `turn`-th head is worked on: its share of the tile from `start`, in the order of memory,
  // where a block's heads are adjacent. `none` is in the cache already.
  KeyTile locate_ahead(const Task& task, i64 start, i64 turn, const KeyTile& none) {
    KeyTile tile = none;
    if (!step_.layout.tiled()) return tile;
    for (int i = 0; i < kParts; ++i) {
      const i64 share = turn * kParts + i;
      const i64 position = start + share / task.heads * kTileTokens;
      if (position >= std::min(start + kKeyTile, task.end())) break;
      const i64 at = place(task, position, share % task.heads);
      tile.keys[i] = step_.keys + at;
      tile.values[i] = step_.values + at;
    }
    return tile;
  }

  // One step of the online softmax for all rows of a head that see any key of the tile.
  void attend_head(const Task& task, i64 head, i64 start, const KeyTile& tile, const KeyTile& ahead) {
    const i64 group = step_.group();
    const i64 blind = std::max<i64>(0, start - task.position) * group;
    const i64 rows = task.tokens * group - blind;
    const i64 chunks = (rows + kTileRows - 1) / kTileRows;
    i64 row = blind;
    for (i64 i = 0; i < chunks; ++i) {
      const i64 count = rows / chunks + (i < rows % chunks);
      attend_rows(count, head * task.tokens * group, row, task.position + 1 - start, tile, i == 0 ? &ahead : nullptr);
      row += count;
    }
  }

  void attend_rows(i64 count, i64 base, i64 row, i64 seen, const KeyTile& tile, const KeyTile* ahead) {
    switch (count) {
      case 1: return attend<1>(base, row, seen, tile, ahead);
      case 2: return attend<2>(base, row, seen, tile, ahead);
      case 3: return attend<3>(base, row, seen, tile, ahead);
      case 4: return attend<4>(base, row, seen, tile, ahead);
#if defined(__AVX512BF16__)
      case 5: return attend<5>(base, row, seen, tile, ahead);
      case 6: return attend<6>(base, row, seen, tile, ahead);
#endif
    }
  }

  template <int Rows>
  void attend(i64 base, i64 row, i64 seen, const KeyTile& tile, const KeyTile* ahead) {
    Chunk<Rows> chunk{base + row, {}};
    for (int r = 0; r < Rows; ++r) chunk.visible[r] = std::min<i64>(seen + (row + r) / step_.group(), kKeyTile);
    F32 scores[Rows][kParts];
    score<Rows>(chunk, tile, ahead, scores);
    float decay[kLanes];
    weigh<Rows>(chunk, scores, decay);
    add_values<Rows, kWidest<Rows>>(chunk, decay, 0, tile, ahead);
  }

  // scores[r][part] = query r . keys of the part. Not inlined, nor is add_columns: the registers are all theirs.
  template <int Rows>
  __attribute__((noinline)) void score(const Chunk<Rows>& chunk, const KeyTile& tile, const KeyTile* ahead,
                                       F32 (&scores)[Rows][kParts]) {
    const i64 head_dim = step_.layout.head_dim;
    const bf16* query = scratch_.query.data() + chunk.row * head_dim;
    for (int part = 0; part < kParts; part += kTileVectors) {
      F32 acc[Rows][kTileVectors];
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kTileVectors; ++v) acc[r][v] = zero();
      for (i64 i = 0; i < head_dim; i += 2) {
        multiply_add([&](int r) { return broadcast_pair(read_pair(query + r * head_dim + i)); },
                     [&](int v) { return load_pairs(tile.keys[part + v] + i * kTileTokens); }, acc);
        if (ahead)
          for (int v = 0; v < kTileVectors; ++v) prefetch(ahead->keys[part + v] + i * kTileTokens);
      }
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kTileVectors; ++v) scores[r][part + v] = acc[r][v];
    }
  }

  // Turns scores into weights, 0 for keys that a row does not see, and writes what earlier sums decay by.
  template <int Rows>
  void weigh(const Chunk<Rows>& chunk, F32 (&scores)[Rows][kParts], float* decay) {
    const F32 scale = broadcast(step_.scale * kLog2E);
    float* maximum = scratch_.maximum.data() + chunk.row;
    float highest[kLanes] = {};
    for (int r = 0; r < Rows; ++r) {
      if (chunk.visible[r] < kKeyTile)
        for (int part = 0; part < kParts; ++part) {
          const i64 count = std::clamp<i64>(chunk.visible[r] - part * kTileTokens, 0, kTileTokens);
          scores[r][part] = keep_first(scores[r][part], count, kMinusInfinity);
        }
      F32 high = scores[r][0];
      for (int part = 1; part < kParts; ++part) high = max(high, scores[r][part]);
      highest[r] = max_lanes(high);
    }
    const F32 before = load(maximum), after = max(before, load(highest));
    store_float(maximum, after, Rows);
    store(decay, exp2(mul(sub(before, after), scale)));
    float shift[kLanes];
    store(shift, sub(zero(), mul(after, scale)));
    bf16* weights = scratch_.weights.data();
    float* total = scratch_.total.data() + chunk.row * kLanes;
    for (int r = 0; r < Rows; ++r) {
      F32 sum = mul(load(total + r * kLanes), broadcast(decay[r]));
      for (int part = 0; part < kParts; ++part) {
        const F32 weight = exp2(fma(scores[r][part], scale, broadcast(shift[r])));
        store_bf16(weights + r * kKeyTile + part * kTileTokens, weight, kTileTokens);
        sum = add(sum, round_to_bf16(weight));
      }
      store(total + r * kLanes, sum);
    }
  }

  // Vectors of a row's outputs that are summed at a time, as many as registers allow.
  template <int Rows>
  static constexpr int kWidest = Rows * 8 <= kTileRows * kTileVectors ? 8 : kTileVectors;

  // sums = sums * decay + weights . values, from `column` on.
  template <int Rows, int Vectors>
  void add_values(const Chunk<Rows>& chunk, const float* decay, i64 column, const KeyTile& tile, const KeyTile* ahead) {
    const i64 head_dim = step_.layout.head_dim;
    for (; column + Vectors * kLanes <= head_dim; column += Vectors * kLanes)
      add_columns<Rows, Vectors>(chunk, decay, column, tile, ahead);
    if constexpr (Vectors > 1) add_values<Rows, Vectors / 2>(chunk, decay, column, tile, ahead);
  }

  template <int Rows, int Vectors>
  __attribute__((noinline)) void add_columns(const Chunk<Rows>& chunk, const float* decay, i64 column,
                                             const KeyTile& tile, const KeyTile* ahead) {
    const i64 head_dim = step_.layout.head_dim;
    const bf16* weights = scratch_.weights.data();
    float* sums = scratch_.sums.data() + chunk.row * head_dim + column;
    F32 acc[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v)
        acc[r][v] = mul(load(sums + r * head_dim + v * kLanes), broadcast(decay[r]));
    // Pairs of keys that all rows see, which are those that the first one sees.
    const i64 common = chunk.visible[0] / 2;
    for (int part = 0; part < kParts; ++part) {
      const bf16* lines = tile.values[part] + column * 2;
      const bf16* next = ahead ? ahead->values[part] + column * 2 : nullptr;
      const bf16* pairs = weights + part * kTileTokens;
      const i64 count = std::clamp<i64>(common - part * kTileTokens / 2, 0, kTileTokens / 2);
      for (i64 i = 0; i < count; ++i) {
        multiply_add([&](int r) { return broadcast_pair(read_pair(pairs + r * kKeyTile + i * 2)); },
                     [&](int v) { return load_pairs(lines + (i * head_dim + v * kLanes) * 2); }, acc);
        if (ahead)
          for (int v = 0; v < Vectors; ++v) prefetch(next + (i * head_dim + v * kLanes) * 2);
      }
      if (ahead)
        for (i64 i = count; i < kTileTokens / 2; ++i)
          for (int v = 0; v < Vectors; ++v) prefetch(next + (i * head_dim + v * kLanes) * 2);
    }
    // Then each row's own.
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      for (i64 key = common * 2; key < chunk.visible[r]; key += 2) {
        const Pairs pair = broadcast_pair(read_pair(weights + r * kKeyTile + key));
        const bf16* lines = tile.values[key / kTileTokens] + (key % kTileTokens / 2 * head_dim + column) * 2;
        for (int v = 0; v < Vectors; ++v) {
          const Pairs values = load_pairs(lines + v * kLanes * 2);
          acc[r][v] = dot_pairs(acc[r][v], pair, key + 1 < chunk.visible[r] ? values : even_half(values));
        }
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) store(sums + r * head_dim + v * kLanes, acc[r][v]);
  }

  static Scratch& scratch() {
    thread_local Scratch scratch;  // kept from step to step
    return scratch;
  }

  const Step& step_;
  Scratch& scratch_;
};

}  // namespace
}  // namespace baton

using namespace baton;

// query: token t's heads lie at t * query_stride, adjacent; out is contiguous. tables: [requests][table_width] blocks.
// Request r has tokens starts[r] to starts[r + 1], at positions that end at seq_lens[r] - 1. head_dim: a multiple of 16.
extern "C" void baton_paged_attention(const bf16* query, i64 query_stride, const bf16* keys, const bf16* values,
                                      bf16* out, const std::int32_t* starts, const std::int32_t* seq_lens,
                                      const std::int32_t* tables, i64 table_width, i64 requests, i64 heads,
                                      i64 block_size, i64 kv_heads, i64 head_dim, float scale, int threads) {
  const Step step{query,  query_stride, keys,        values, out, starts, seq_lens,
                  tables, table_width,  heads,       {block_size, kv_heads, head_dim}, scale};
  const std::vector<Task> tasks = split(step, requests, threads);
  const std::vector<i64> ends = balance(tasks, threads);
  parallel_for(static_cast<i64>(ends.size()), threads, [&](i64 range) {
    for (i64 i = range ? ends[range - 1] : 0; i < ends[range]; ++i)
      Worker(step).run(tasks[i], i + 1 < ends[range] ? &tasks[i + 1] : nullptr);
  });
}
