// Rotary embedding of queries and keys, and the append of keys and values, in one visit to each head.

#include <vector>

#include "../kv_append/slots.h"
#include "../rotary/rotate.h"

using namespace baton;

// query, key, value: token t's heads lie at t * stride, adjacent; out is contiguous. cos, sin: [T, head_dim / 2].
// Norms may be null. slots[t] = block * block_size + offset.
extern "C" void baton_rotary_append(const bf16* query, i64 query_stride, const bf16* key, i64 key_stride,
                                    const bf16* value, i64 value_stride, const bf16* query_norm, const bf16* key_norm,
                                    float eps, const float* cos, const float* sin, bf16* out, bf16* keys, bf16* values,
                                    const i64* slots, i64 t, i64 heads, i64 block_size, i64 kv_heads, i64 head_dim,
                                    int threads) {
  const Slots to{{block_size, kv_heads, head_dim}, keys, values, slots};
  const i64 group = heads / kv_heads, half = head_dim / 2;
  to.for_each(t, threads, [&](i64 token, i64 head) {
    const float *c = cos + token * half, *s = sin + token * half;
    for (i64 i = head * group; i < (head + 1) * group; ++i)
      rotate_head(query + token * query_stride + i * head_dim, query_norm, eps, c, s,
                  out + (token * heads + i) * head_dim, head_dim);
    thread_local std::vector<bf16> rotated;
    rotated.resize(head_dim);
    rotate_head(key + token * key_stride + head * head_dim, key_norm, eps, c, s, rotated.data(), head_dim);
    to.write_key(token, head, rotated.data());
    to.write_value(token, head, value + token * value_stride + head * head_dim);
  });
}
