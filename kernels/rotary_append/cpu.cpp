// Rotary embedding of queries and keys, and the append of keys and values, in one visit to each token.

#include <vector>

#include "../kv_append/slots.h"
#include "../rotary/rotate.h"

using namespace baton;

// query, key, value: token t's heads lie at t * stride, adjacent; queries are rotated in place. cos, sin:
// [T, head_dim / 2]. Norms may be null. slots[t] = block * block_size + offset.
extern "C" void baton_rotary_append(bf16* query, i64 query_stride, const bf16* key, i64 key_stride,
                                    const bf16* value, i64 value_stride, const bf16* query_norm, const bf16* key_norm,
                                    float eps, const float* cos, const float* sin, bf16* keys, bf16* values,
                                    const i64* slots, i64 t, i64 heads, i64 block_size, i64 kv_heads, i64 head_dim,
                                    int threads) {
  const Slots to{{block_size, kv_heads, head_dim}, keys, values, slots, t};
  const i64 group = heads / kv_heads, half = head_dim / 2, tile = kTileTokens * head_dim;
  to.for_each(threads, [&](const Visit& visit) {
    thread_local std::vector<bf16> rotated;  // keys [heads of the visit][16 tokens][head_dim]
    rotated.resize(visit.heads() * tile);
    // Token by token, as they lie in memory; their keys then go to the cache a tile at a time.
    for (i64 token = visit.begin; token < visit.end; ++token) {
      const float *c = cos + token * half, *s = sin + token * half;
      const i64 first = visit.first_head * head_dim;
      bf16* queries = query + token * query_stride + first * group;
      rotate_heads(queries, visit.heads() * group, query_norm, eps, c, s, queries, head_dim, head_dim, query_stride);
      rotate_heads(key + token * key_stride + first, visit.heads(), key_norm, eps, c, s,
                   rotated.data() + (token - visit.begin) * head_dim, tile, head_dim, key_stride);
      const bf16* next = value + (token + 1) * value_stride + first;  // if there is one
      for (i64 i = 0; i < visit.heads() * head_dim; i += kWide) __builtin_prefetch(next + i);
      const bool is_second = token > visit.begin && to.is_paired(visit, token - 1);
      if (is_second || !to.is_paired(visit, token))
        for (i64 head = visit.first_head; head < visit.last_head; ++head)
          to.write_values(token - is_second, is_second, head,
                          value + (token - is_second) * value_stride + head * head_dim, value_stride);
    }
    for (i64 head = visit.first_head; head < visit.last_head; ++head)
      to.write_keys(visit, head, rotated.data() + (head - visit.first_head) * tile, head_dim);
  });
}
