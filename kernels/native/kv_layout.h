// Where keys and values of bfloat16 caches lie inside a block of `block_size` tokens.
//
// Blocks of a multiple of 16 tokens are cut into tiles of 16, made for pairwise multiply-adds, [kv_heads][tiles] of
//   keys [head_dim / 2][16 tokens][2]: a line holds two dimensions of sixteen tokens, sixteen scores come out of it;
//   values [16 / 2][head_dim][2]: a line holds sixteen dimensions of two tokens.
// Other blocks are plain, [block_size][kv_heads][head_dim].
#pragma once

#include "simd.h"

namespace baton {

constexpr int kTileTokens = 16;

struct KVLayout {
  i64 block_size, kv_heads, head_dim;

  bool tiled() const { return block_size % kTileTokens == 0; }
  i64 tile_elements() const { return kTileTokens * head_dim; }
  // Offset of the tile that holds `offset` (tiled), or of the token's head (plain).
  i64 place(i64 block, i64 offset, i64 head) const {
    if (!tiled()) return ((block * block_size + offset) * kv_heads + head) * head_dim;
    const i64 tiles = block_size / kTileTokens;
    return ((block * kv_heads + head) * tiles + offset / kTileTokens) * tile_elements();
  }
  i64 key_element(i64 token, i64 dim) const { return (dim / 2 * kTileTokens + token) * 2 + dim % 2; }
  i64 value_element(i64 token, i64 dim) const { return (token / 2 * head_dim + dim) * 2 + token % 2; }
};

}  // namespace baton
