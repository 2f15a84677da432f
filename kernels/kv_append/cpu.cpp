// Append keys and values of a step's tokens to the paged cache.

#include "../native/kv_layout.h"
#include "../native/parallel.h"

using namespace baton;

namespace {

constexpr i64 kElementsPerTask = 1 << 13;  // some tens of microseconds: every other element is a cache line of its own

}  // namespace

// key, value: token t's heads lie at t * stride, adjacent. slots[t] = block * block_size + offset.
extern "C" void baton_kv_append(const bf16* key, i64 key_stride, const bf16* value, i64 value_stride, bf16* keys,
                                bf16* values, const i64* slots, i64 t, i64 block_size, i64 kv_heads, i64 head_dim,
                                int threads) {
  const KVLayout layout{block_size, kv_heads, head_dim};
  auto append = [&](i64 token, i64 head) {
    const i64 offset = slots[token] % block_size;
    const i64 place = layout.place(slots[token] / block_size, offset, head);
    const bf16* k = key + token * key_stride + head * head_dim;
    const bf16* v = value + token * value_stride + head * head_dim;
    if (!layout.tiled()) {
      std::memcpy(keys + place, k, head_dim * sizeof(bf16));
      std::memcpy(values + place, v, head_dim * sizeof(bf16));
      return;
    }
    const i64 lane = offset % kTileTokens;
    for (i64 i = 0; i < head_dim; i += 2)
      std::memcpy(keys + place + layout.key_element(lane, i), k + i, 2 * sizeof(bf16));
    for (i64 i = 0; i < head_dim; ++i) values[place + layout.value_element(lane, i)] = v[i];
  };
  // By head, then token: neighbouring tokens share cache lines.
  parallel_ranges(kv_heads * t, kElementsPerTask / head_dim, threads, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) append(i % t, i / t);
  });
}
