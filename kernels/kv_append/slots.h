// Writing heads of keys and values to a token's slot in the paged cache.
#pragma once

#include <algorithm>

#include "../native/kv_layout.h"
#include "../native/parallel.h"

namespace baton {

struct Slots {
  KVLayout layout;
  bf16* keys;
  bf16* values;
  const i64* slots;  // of each token: block * block_size + offset

  i64 place(i64 token, i64 head) const {
    return layout.place(slots[token] / layout.block_size, slots[token] % layout.block_size, head);
  }
  i64 lane(i64 token) const { return slots[token] % layout.block_size % kTileTokens; }

  void write_key(i64 token, i64 head, const bf16* key) const {
    bf16* to = keys + place(token, head);
    if (!layout.tiled()) {
      std::memcpy(to, key, layout.head_dim * sizeof(bf16));
      return;
    }
    to += layout.key_element(lane(token), 0);
    for (i64 i = 0; i < layout.head_dim; i += 2) std::memcpy(to + i * kTileTokens, key + i, 2 * sizeof(bf16));
  }

  void write_value(i64 token, i64 head, const bf16* value) const {
    bf16* to = values + place(token, head);
    if (!layout.tiled()) {
      std::memcpy(to, value, layout.head_dim * sizeof(bf16));
      return;
    }
    to += layout.value_element(lane(token) & ~1, 0);
    for (i64 i = 0; i < layout.head_dim; i += kLanes) store_halves(to + i * 2, value + i, lane(token) & 1);
  }

  // body(token, head) for each, shared among threads. Tokens that follow each other in a tile are written head by head:
  // they share cache lines. Lines are brought in two heads ahead, in the order of memory.
  template <typename Body>
  void for_each(i64 tokens, int threads, Body&& body) const {
    const i64 visits = (tokens + kTileTokens - 1) / kTileTokens;
    const i64 parts = visits < kVisitsPerThread * threads ? layout.kv_heads : 1;
    parallel_ranges(visits * parts, 1, threads, [&](i64 begin, i64 end) {
      for (i64 i = begin; i < end; ++i) {
        const i64 heads = layout.kv_heads / parts, head = i % parts * heads, first = i / parts * kTileTokens;
        visit(first, std::min(first + kTileTokens, tokens), head, head + heads, body);
      }
    });
  }

 private:
  static constexpr i64 kVisitsPerThread = 4;  // at least: else heads are split
  static constexpr i64 kHeadsAhead = 2;

  template <typename Body>
  void visit(i64 first, i64 last, i64 first_head, i64 last_head, Body& body) const {
    for (i64 begin = first, end; begin < last; begin = end) {
      end = end_of_run(begin, last);
      for (i64 head = first_head; head < last_head; ++head) {
        const i64 left = last_head - head - kHeadsAhead;  // heads of this run after the one to bring in, and itself
        if (left > 0)
          prefetch(begin, head + kHeadsAhead);
        else if (end < last && first_head - left < last_head)
          prefetch(end, first_head - left);
        for (i64 token = begin; token < end; ++token) body(token, head);
      }
    }
  }

  // Where the tokens end that lie in the tile of token `begin`.
  i64 end_of_run(i64 begin, i64 last) const {
    i64 end = begin + 1;
    while (end < last && slots[end] / kTileTokens == slots[begin] / kTileTokens) ++end;
    return end;
  }

  void prefetch(i64 token, i64 head) const {
    if (!layout.tiled()) return;
    const bf16* key = keys + place(token, head);
    for (i64 i = 0; i < layout.tile_elements(); i += kTileTokens * 2) _mm_prefetch(key + i, _MM_HINT_T1);
    const bf16* value = values + place(token, head) + layout.value_element(lane(token) & ~1, 0);
    for (i64 i = 0; i < layout.head_dim * 2; i += kLanes * 2) _mm_prefetch(value + i, _MM_HINT_T1);
  }
};

}  // namespace baton
