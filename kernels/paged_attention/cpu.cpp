// Attention of a step's queries over the paged cache: decode and (chunked) prefill in one call.
//
// Online softmax over tiles of 64 keys at fixed positions (online_softmax.h): neither the other queries of a tile, nor
// the batch, nor threads, nor where blocks lie show in a query's result.
//
// A prefill is bound by arithmetic: rows work chunk by chunk on a tile's keys, then on its values, which so stay in the
// first-level cache. A decode is bound by memory: see `fetch`.

#include <algorithm>
#include <vector>

#include "../native/parallel.h"
#include "scratch.h"
#include "tasks.h"

namespace baton {
namespace {

constexpr float kLog2E = 1.44269504088896341F;
constexpr i64 kMemoryBoundRows = kTileVectors == 1 ? 1 : 4;  // of a head: computing more takes as long as reading keys

// Reads the line of `p`. A prefetch may be dropped, this is not.
inline void touch(const bf16* p) { static_cast<void>(*static_cast<const volatile bf16*>(p)); }

class Worker {
 public:
  explicit Worker(const Step& step) : step_(step), scratch_(scratch()) {}

  // `next` (may be null) is what this thread does afterwards.
  void run(const Task& task, const Task* next) {
    scratch_.fit(task.heads, rows_per_head(task), step_.layout.head_dim);
    read_queries(task);
    for (i64 start = 0; start < task.end(); start += kKeyTile)
      for (i64 head = 0; head < task.heads; ++head) {
        const KeyTile tile = locate(task, start, head);
        const KeyTile ahead = step_.layout.tiled() ? locate_ahead(task, start, head, next, tile) : tile;
        if (rows_per_head(task) <= kMemoryBoundRows) fetch(tile, ahead);
        attend(task, start, head_state(head, start == 0), tile, ahead);
      }
    write_outputs(task);
  }

 private:
  i64 rows_per_head(const Task& task) const { return task.tokens * step_.group(); }
  Head head_state(i64 head, bool first) { return scratch_.head(head, step_.scale * kLog2E, first); }

  // body(row, token, query head) for each row of the task's `head`: by tokens, then by query heads of the group.
  template <typename Body>
  void for_each_row(const Task& task, i64 head, Body&& body) {
    const i64 first = step_.starts[task.request] + task.token;
    i64 row = 0;
    for (i64 token = first; token < first + task.tokens; ++token)
      for (i64 i = 0; i < step_.group(); ++i) body(row++, token, (task.head + head) * step_.group() + i);
  }

  void read_queries(const Task& task) {
    const i64 head_dim = step_.layout.head_dim;
    for (i64 head = 0; head < task.heads; ++head) {
      bf16* rows = scratch_.query.data() + head * rows_per_head(task) * head_dim;
      for_each_row(task, head, [&](i64 row, i64 token, i64 query_head) {
        std::memcpy(rows + row * head_dim, step_.query + token * step_.query_stride + query_head * head_dim,
                    head_dim * sizeof(bf16));
      });
    }
  }

  void write_outputs(const Task& task) {
    const i64 head_dim = step_.layout.head_dim;
    for (i64 index = 0; index < task.heads; ++index) {
      const Head head = head_state(index, false);
      for_each_row(task, index, [&](i64 row, i64 token, i64 query_head) {
        const F32 inverse = broadcast(1.0F / sum_lanes(load(head.total + row * kLanes)));
        bf16* out = step_.out + (token * step_.heads + query_head) * head_dim;
        for (i64 i = 0; i < head_dim; i += kLanes)
          store_bf16(out + i, mul(load(head.sum(row, i)), inverse), kLanes);
      });
    }
  }

  i64 place(const Task& task, i64 position, i64 head) const {
    const i64 size = step_.layout.block_size;
    const i64 block = step_.tables[task.request * step_.table_width + position / size];
    return step_.layout.place(block, position % size, task.head + head);
  }

  // The tile of keys from `start`; parts past the last key repeat the first one, and are masked.
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

  // The tile of keys that this thread works on after `tile`; this one if it is the last.
  KeyTile locate_ahead(const Task& task, i64 start, i64 head, const Task* next, const KeyTile& tile) {
    if (head + 1 < task.heads) return locate(task, start, head + 1);
    if (start + kKeyTile < task.end()) return locate(task, start + kKeyTile, 0);
    return next ? locate(*next, 0, 0) : tile;
  }

  // Reads a tile into the caches at the memory's speed, just before it is worked on. A core takes more prefetches in
  // than it can have in flight, and drops the others: those spread over the work on a tile bring in a part of the next
  // one. The rest is loaded here, with nothing in between that would fill the core's window, from eight places at once,
  // as one alone would stall at the end of each page; what is prefetched meanwhile keeps pace with what arrives.
  void fetch(const KeyTile& tile, const KeyTile& ahead) {
    for (i64 i = 0; i < step_.layout.tile_elements(); i += kLine / sizeof(bf16))
      for (int part = 0; part < kParts; ++part) {
        touch(tile.keys[part] + i);
        touch(tile.values[part] + i);
        prefetch(ahead.keys[part] + i);
        prefetch(ahead.values[part] + i);
      }
  }

  // All rows of a head that see any key of the tile.
  void attend(const Task& task, i64 start, const Head& head, const KeyTile& tile, const KeyTile& ahead) {
    const i64 blind = std::max<i64>(0, start - task.position) * step_.group();
    const i64 rows = head.rows - blind;
    const i64 count = (rows + kTileRows - 1) / kTileRows;
    i64 row = blind;
    for (i64 i = 0; i < count; ++i) {
      Chunk& chunk = scratch_.chunks[i];
      chunk.row = row;
      chunk.rows = rows / count + (i < rows % count);
      see(task.position + 1 - start, chunk);
      with_count<kTileRows>(chunk.rows, [&]<int Rows>() {
        F32 scores[Rows][kParts];
        score<Rows>(head, chunk, tile, i == 0 ? &ahead : nullptr, scores);
        weigh<Rows>(head, chunk, scores);
      });
      row += chunk.rows;
    }
    for (i64 i = 0; i < count; ++i) {
      const Chunk& chunk = scratch_.chunks[i];
      with_count<kTileRows>(chunk.rows, [&]<int Rows>() {
        add_values<Rows>(head, chunk, tile, i == 0 ? &ahead : nullptr);
      });
    }
  }

  // `seen`: keys from the tile's first on that the task's first token sees; not positive if it sees none of them.
  void see(i64 seen, Chunk& chunk) const {
    for (i64 r = 0; r < chunk.rows; ++r)
      chunk.visible[r] = seen >= kKeyTile ? kKeyTile : std::min<i64>(seen + (chunk.row + r) / step_.group(), kKeyTile);
    chunk.parts = (chunk.visible[chunk.rows - 1] + kTileTokens - 1) / kTileTokens;
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
