// Attention of a step's queries over the paged cache: decode and (chunked) prefill in one call.
//
// Online softmax over tiles of 64 keys at fixed positions. For one query every sum has one order, given by positions
// alone: scores are chains over head_dim, outputs chains over keys, and the denominator adds lanes of sixteen, joined at
// the end. Nothing of keys that a query does not see enters its sums, whatever lies there. So neither the other queries
// of its tile, nor the batch, nor threads, nor where blocks lie show in the result.

#include <algorithm>
#include <vector>

#include "../native/kv_layout.h"
#include "../native/parallel.h"

namespace baton {
namespace {

constexpr int kKeyTile = 64;
constexpr int kParts = kKeyTile / kTileTokens;
constexpr i64 kRowsPerTask = 48;  // (token, query head of the group), which share each key tile in the cache
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Step {
  const bf16* query;
  i64 query_stride;
  const bf16* keys;
  const bf16* values;
  bf16* out;  // [T][heads][head_dim]
  const std::int32_t* starts;
  const std::int32_t* seq_lens;
  const std::int32_t* tables;
  i64 table_width, heads;
  KVLayout layout;
  float scale;

  i64 group() const { return heads / layout.kv_heads; }
};

// Some consecutive tokens of one request, and one key-value head.
struct Task {
  i64 request, token, tokens, kv_head;
};

// Where the four quarters of a key tile lie.
struct KeyTile {
  const bf16* keys[kParts];
  const bf16* values[kParts];
};

struct Scratch {
  std::vector<bf16> query, weights, keys, values;
  std::vector<float> maximum, total, sums, decay;

  void fit(i64 rows, i64 head_dim) {
    query.resize(rows * head_dim);
    weights.resize(kTileRows * kKeyTile);
    maximum.assign(rows, kMinusInfinity);
    total.assign(rows * kLanes, 0.0F);
    sums.assign(rows * head_dim, 0.0F);
    keys.resize(kKeyTile * head_dim);
    values.resize(kKeyTile * head_dim);
  }
};

// acc[r][v] += a[r] . lines[v], `steps` pairs in order; what `ahead` points to is brought into the cache meanwhile.
template <int Rows, int Vectors>
inline __attribute__((always_inline)) void dot_rows(const bf16* a, i64 a_stride, const bf16* const* lines,
                                                    const bf16* const* ahead, i64 line_step, i64 steps,
                                                    F32 (&acc)[Rows][Vectors]) {
  for (i64 i = 0; i < steps; ++i) {
    Pairs columns[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      columns[v] = load_pairs(lines[v] + i * line_step);
      if (ahead) _mm_prefetch(reinterpret_cast<const char*>(ahead[v] + i * line_step), _MM_HINT_T1);
    }
    for (int r = 0; r < Rows; ++r) {
      const Pairs value = broadcast_pair(read_pair(a + r * a_stride + i * 2));
      for (int v = 0; v < Vectors; ++v) acc[r][v] = dot_pairs(acc[r][v], value, columns[v]);
    }
  }
}

class Worker {
 public:
  explicit Worker(const Step& step) : step_(step), scratch_(scratch()) {}

  void run(const Task& task) {
    const i64 head_dim = step_.layout.head_dim;
    const i64 group = step_.group();
    const i64 rows = task.tokens * group;
    const i64 first_token = step_.starts[task.request];
    const i64 position = step_.seq_lens[task.request] - (step_.starts[task.request + 1] - first_token) + task.token;
    const i64 end = position + task.tokens;  // keys that any row sees
    scratch_.fit(rows, head_dim);
    for (i64 row = 0; row < rows; ++row) {
      const i64 token = first_token + task.token + row / group;
      std::memcpy(scratch_.query.data() + row * head_dim,
                  step_.query + token * step_.query_stride + (task.kv_head * group + row % group) * head_dim,
                  head_dim * sizeof(bf16));
    }
    const i64 chunks = (rows + kTileRows - 1) / kTileRows;
    for (i64 start = 0; start < end; start += kKeyTile) {
      const KeyTile tile = locate(task, start, end);
      const i64 following = start + kKeyTile < end && step_.layout.tiled() ? start + kKeyTile : start;
      const KeyTile ahead = following == start ? tile : locate(task, following, end);
      i64 row = 0;
      for (i64 chunk = 0; chunk < chunks; ++chunk) {
        const i64 count = rows / chunks + (chunk < rows % chunks);
        if (position + (row + count - 1) / group >= start)
          attend_rows(count, row, position, group, start, end, tile, chunk == 0 ? &ahead : nullptr);
        row += count;
      }
    }
    for (i64 row = 0; row < rows; ++row) {
      const F32 total = broadcast(sum_lanes(load(scratch_.total.data() + row * kLanes)));
      bf16* out = step_.out + ((first_token + task.token + row / group) * step_.heads + task.kv_head * group + row % group) *
                                  head_dim;
      for (i64 i = 0; i < head_dim; i += kLanes)
        store_bf16(out + i, div(load(scratch_.sums.data() + row * head_dim + i), total), kLanes);
    }
  }

 private:
  // The tile of keys from `start`; quarters past `end` repeat the first one, and are masked.
  KeyTile locate(const Task& task, i64 start, i64 end) {
    const std::int32_t* table = step_.tables + task.request * step_.table_width;
    const KVLayout& layout = step_.layout;
    KeyTile tile;
    for (int part = 0; part < kParts; ++part) {
      const i64 position = start + part * kTileTokens;
      if (layout.tiled()) {
        const i64 held = position < end ? position : start;
        const i64 place = layout.place(table[held / layout.block_size], held % layout.block_size, task.kv_head);
        tile.keys[part] = step_.keys + place;
        tile.values[part] = step_.values + place;
      } else {
        bf16* keys = scratch_.keys.data() + part * layout.tile_elements();
        bf16* values = scratch_.values.data() + part * layout.tile_elements();
        for (i64 lane = 0; lane < kTileTokens && position + lane < end; ++lane) {
          const i64 held = position + lane;
          const i64 place = layout.place(table[held / layout.block_size], held % layout.block_size, task.kv_head);
          for (i64 i = 0; i < layout.head_dim; ++i) {
            keys[layout.key_element(lane, i)] = step_.keys[place + i];
            values[layout.value_element(lane, i)] = step_.values[place + i];
          }
        }
        tile.keys[part] = keys;
        tile.values[part] = values;
      }
    }
    return tile;
  }

  void attend_rows(i64 count, i64 row, i64 position, i64 group, i64 start, i64 end, const KeyTile& tile,
                   const KeyTile* ahead) {
    switch (count) {
      case 1: return attend<1>(row, position, group, start, end, tile, ahead);
      case 2: return attend<2>(row, position, group, start, end, tile, ahead);
      case 3: return attend<3>(row, position, group, start, end, tile, ahead);
      case 4: return attend<4>(row, position, group, start, end, tile, ahead);
#if defined(__AVX512BF16__)
      case 5: return attend<5>(row, position, group, start, end, tile, ahead);
      case 6: return attend<6>(row, position, group, start, end, tile, ahead);
#endif
    }
  }

  // One step of the online softmax for `Rows` rows.
  template <int Rows>
  void attend(i64 row, i64 position, i64 group, i64 start, i64 end, const KeyTile& tile, const KeyTile* ahead) {
    const i64 head_dim = step_.layout.head_dim;
    F32 scores[Rows][kParts];
    for (int part = 0; part < kParts; part += kTileVectors) {
      F32 acc[Rows][kTileVectors];
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kTileVectors; ++v) acc[r][v] = zero();
      dot_rows<Rows, kTileVectors>(scratch_.query.data() + row * head_dim, head_dim, tile.keys + part,
                                   ahead ? ahead->keys + part : nullptr, kTileTokens * 2, head_dim / 2, acc);
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kTileVectors; ++v) scores[r][part + v] = acc[r][v];
    }
    const i64 keys = std::min<i64>(end - start, kKeyTile);
    const i64 visible_to_first = position + row / group + 1 - start;
    F32 decay[Rows];
    for (int r = 0; r < Rows; ++r) {
      const i64 visible = std::min(position + (row + r) / group + 1 - start, keys);
      bf16* weights = scratch_.weights.data() + r * kKeyTile;
      if (visible > 0) decay[r] = weigh(row + r, scores[r], visible, weights);
      if (visible > 0 && visible_to_first < keys) add_all_values<1>(row + r, visible, weights, {decay[r]}, tile, ahead);
    }
    if (visible_to_first >= keys) add_all_values<Rows>(row, keys, scratch_.weights.data(), decay, tile, ahead);
  }

  template <int Rows>
  void add_all_values(i64 row, i64 keys, const bf16* weights, const F32 (&decay)[Rows], const KeyTile& tile,
                      const KeyTile* ahead) {
    const i64 head_dim = step_.layout.head_dim;
    i64 column = 0;
    for (; column + kTileVectors * kLanes <= head_dim; column += kTileVectors * kLanes)
      add_values<Rows, kTileVectors>(row, column, keys, weights, decay, tile, ahead);
    for (; column < head_dim; column += kLanes)
      add_values<Rows, 1>(row, column, keys, weights, decay, tile, ahead);
  }

  // Turn a row's scores of one tile into weights, of which the first `visible` count; returns what earlier sums decay by.
  F32 weigh(i64 row, F32 (&scores)[kParts], i64 visible, bf16* weights) {
    F32 highest = broadcast(scratch_.maximum[row]);
    for (int part = 0; part < kParts; ++part) {
      const i64 count = std::clamp<i64>(visible - part * kTileTokens, 0, kTileTokens);
      scores[part] = keep_first(mul(scores[part], broadcast(step_.scale)), count, kMinusInfinity);
      highest = max(highest, scores[part]);
    }
    const float maximum = max_lanes(highest);
    const F32 decay = exp(broadcast(scratch_.maximum[row] - maximum));
    scratch_.maximum[row] = maximum;
    F32 part_weights[kParts];
    for (int part = 0; part < kParts; ++part) {
      part_weights[part] = round_to_bf16(exp(sub(scores[part], broadcast(maximum))));
      store_bf16(weights + part * kTileTokens, part_weights[part], kTileTokens);
    }
    float* total = scratch_.total.data() + row * kLanes;
    const F32 sum = add(add(part_weights[0], part_weights[1]), add(part_weights[2], part_weights[3]));
    store(total, fma(load(total), decay, sum));
    return decay;
  }

  template <int Rows, int Vectors>
  inline __attribute__((always_inline)) void add_values(i64 row, i64 column, i64 keys,
                                                        const bf16* tile_weights, const F32 (&decay)[Rows],
                                                        const KeyTile& tile, const KeyTile* ahead) {
    const i64 head_dim = step_.layout.head_dim;
    float* sums = scratch_.sums.data() + row * head_dim + column;
    F32 acc[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) acc[r][v] = mul(load(sums + r * head_dim + v * kLanes), decay[r]);
    for (int part = 0; part * kTileTokens < keys; ++part) {
      const bf16* lines[Vectors];
      const bf16* next[Vectors];
      for (int v = 0; v < Vectors; ++v) {
        lines[v] = tile.values[part] + (column + v * kLanes) * 2;
        next[v] = ahead ? ahead->values[part] + (column + v * kLanes) * 2 : nullptr;
      }
      const i64 count = std::min<i64>(keys - part * kTileTokens, kTileTokens);
      const bf16* weights = tile_weights + part * kTileTokens;
      dot_rows<Rows, Vectors>(weights, kKeyTile, lines, ahead ? next : nullptr, head_dim * 2, count / 2, acc);
      if (count % 2) {  // the second token of the last pair may never have been written
        for (int r = 0; r < Rows; ++r) {
          const Pairs weight = broadcast_pair(read_pair(weights + r * kKeyTile + count - 1));
          for (int v = 0; v < Vectors; ++v)
            acc[r][v] = dot_pairs(acc[r][v], weight, even_half(load_pairs(lines[v] + count / 2 * head_dim * 2)));
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

std::vector<Task> split(const Step& step, i64 requests) {
  const i64 tokens_per_task = std::max<i64>(1, kRowsPerTask / step.group());
  std::vector<Task> tasks;
  for (i64 request = 0; request < requests; ++request) {
    const i64 count = step.starts[request + 1] - step.starts[request];
    for (i64 kv_head = 0; kv_head < step.layout.kv_heads; ++kv_head)
      for (i64 token = 0; token < count; token += tokens_per_task)
        tasks.push_back({request, token, std::min(tokens_per_task, count - token), kv_head});
  }
  return tasks;
}

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
  const std::vector<Task> tasks = split(step, requests);
  parallel_for(static_cast<i64>(tasks.size()), threads, [&](i64 i) { Worker(step).run(tasks[i]); });
}
