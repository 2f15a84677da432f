// Writing heads of keys and values to their tokens' slots in the paged cache.
//
// A decode's token writes a part of many lines that no cache holds, and stores wait for their lines one after another:
// meanwhile those that the next token will write to are brought into the second-level cache.
#pragma once

#include <algorithm>

#include "../native/kv_layout.h"
#include "../native/parallel.h"

namespace baton {

// Some heads of tokens [begin, end), which follow each other in a tile; where there are no tiles, of one token.
struct Visit {
  i64 begin, end, first_head, last_head;

  i64 heads() const { return last_head - first_head; }
};

struct Slots {
  KVLayout layout;
  bf16* keys;
  bf16* values;
  const i64* slots;  // of each token: block * block_size + offset
  i64 tokens;

  // One head's keys of a visit, `stride` elements apart.
  void write_keys(const Visit& visit, i64 head, const bf16* from, i64 stride) const {
    bf16* to = keys + place(visit.begin, head);
    if (!layout.tiled()) {
      std::memcpy(to, from, layout.head_dim * sizeof(bf16));
      return;
    }
    i64 whole = 0;  // dimensions that are written line by line
    if (visit.end - visit.begin == kTileTokens && aligned())
      for (; whole + kLanes * 2 <= layout.head_dim; whole += kLanes * 2)
        transpose_pairs(from + whole, stride, to + whole * kTileTokens);
    if (whole == layout.head_dim) return;
    const bf16* ahead = visit.end < tokens ? keys + place(visit.end, head) : to;
    for (i64 token = visit.begin; token < visit.end; ++token, from += stride) {
      bf16* pairs = to + layout.key_element(lane(token), 0);
      for (i64 i = whole; i < layout.head_dim; i += 2) {
        prefetch(ahead + i * kTileTokens);
        std::memcpy(pairs + i * kTileTokens, from + i, 2 * sizeof(bf16));
      }
      ahead = to;
    }
  }

  // One head's value of a token; of two tokens that share a tile's lines if `both`, `stride` elements apart.
  void write_values(i64 token, bool both, i64 head, const bf16* from, i64 stride) const {
    bf16* to = values + place(token, head);
    if (!layout.tiled()) {
      std::memcpy(to, from, layout.head_dim * sizeof(bf16));
      return;
    }
    to += first_value(token);
    if (both) {
      for (i64 i = 0; i < layout.head_dim; i += kLanes) interleave(from + i, from + stride + i, to + i * 2);
      return;
    }
    const bf16* ahead = token + 1 < tokens ? values + place(token + 1, head) + first_value(token + 1) : to;
    for (i64 i = 0; i < layout.head_dim; i += kLanes) {
      prefetch(ahead + i * 2);
      store_halves(to + i * 2, from + i, lane(token) & 1);
    }
  }

  // Whether the token's value is written with that of the next one, which shares its lines.
  bool is_paired(const Visit& visit, i64 token) const {
    return layout.tiled() && aligned() && token + 1 < visit.end && lane(token) % 2 == 0;
  }

  // body(visit) for all heads of all tokens, shared among threads in groups of tokens; a visit belongs to the group in
  // which it begins.
  template <typename Body>
  void for_each(int threads, Body&& body) const {
    const i64 groups = (tokens + kTileTokens - 1) / kTileTokens;
    const i64 parts = groups < kGroupsPerThread * threads ? layout.kv_heads : 1, heads = layout.kv_heads / parts;
    parallel_ranges(groups * parts, 1, threads, [&](i64 first, i64 last) {
      for (i64 i = first; i < last; ++i) {
        const i64 head = i % parts * heads, limit = std::min((i / parts + 1) * kTileTokens, tokens);
        i64 begin = i / parts * kTileTokens;
        while (begin < limit && begin > 0 && continues(begin)) ++begin;  // these belong to the group before
        for (i64 end; begin < limit; begin = end) {
          for (end = begin + 1; end < tokens && continues(end);) ++end;
          body(Visit{begin, end, head, head + heads});
        }
      }
      _mm_sfence();  // lines that were streamed come before the news that the loop has ended
    });
  }

 private:
  static constexpr i64 kGroupsPerThread = 4;  // at least: else heads are split

  i64 place(i64 token, i64 head) const {
    return layout.place(slots[token] / layout.block_size, slots[token] % layout.block_size, head);
  }
  // Whether tiles begin with a line. Whole lines are streamed: a prompt's are many, and reading them first, only to
  // overwrite them, takes longer than to fetch them once for attention.
  bool aligned() const {
    return (reinterpret_cast<std::uintptr_t>(keys) | reinterpret_cast<std::uintptr_t>(values)) % kLine == 0;
  }
  // Where in its tile the lines begin that the token's values share with its neighbour's.
  i64 first_value(i64 token) const { return layout.value_element(lane(token) & ~1, 0); }
  i64 lane(i64 token) const { return slots[token] % layout.block_size % kTileTokens; }

  // Whether the token follows the one before it in a tile.
  bool continues(i64 token) const {
    return layout.tiled() && slots[token] == slots[token - 1] + 1 && slots[token] % kTileTokens != 0;
  }
};

}  // namespace baton
