// Append keys and values of a step's tokens to the paged cache.

#include "slots.h"

using namespace baton;

// key, value: token t's heads lie at t * stride, adjacent. slots[t] = block * block_size + offset.
extern "C" void baton_kv_append(const bf16* key, i64 key_stride, const bf16* value, i64 value_stride, bf16* keys,
                                bf16* values, const i64* slots, i64 t, i64 block_size, i64 kv_heads, i64 head_dim,
                                int threads) {
  const Slots to{{block_size, kv_heads, head_dim}, keys, values, slots, t};
  to.for_each(threads, [&](const Visit& visit) {
    for (i64 head = visit.first_head; head < visit.last_head; ++head) {
      to.write_keys(visit, head, key + visit.begin * key_stride + head * head_dim, key_stride);
      for (i64 token = visit.begin; token < visit.end; ++token) {
        const bool both = to.is_paired(visit, token);
        to.write_values(token, both, head, value + token * value_stride + head * head_dim, value_stride);
        token += both;
      }
    }
  });
}
