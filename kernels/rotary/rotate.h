// Rotary position embedding of one head, which may be normalised first (root mean square, as in Qwen3).
#pragma once

#include "../native/simd.h"

namespace baton {

inline F32 scale_of_head(const bf16* head, i64 head_dim, float eps) {
  F32 squares = zero();
  for (i64 i = 0; i < head_dim; i += kLanes) {
    const F32 value = load_bf16(head + i, head_dim - i);
    squares = fma(value, value, squares);
  }
  return broadcast(1.0F / std::sqrt(sum_lanes(squares) / static_cast<float>(head_dim) + eps));
}

// cos, sin: [head_dim / 2] of the token. weight may be null: the head is not normalised then.
inline void rotate_head(const bf16* from, const bf16* weight, float eps, const float* cos, const float* sin, bf16* to,
                        i64 head_dim) {
  const i64 half = head_dim / 2;
  const F32 scale = weight ? scale_of_head(from, head_dim, eps) : zero();
  auto read = [&](i64 i, i64 count) {
    const F32 value = load_bf16(from + i, count);
    return weight ? round_to_bf16(mul(round_to_bf16(mul(value, scale)), load_bf16(weight + i, count))) : value;
  };
  for (i64 i = 0; i < half; i += kLanes) {
    const i64 count = half - i;
    const F32 first = read(i, count), second = read(half + i, count);
    const F32 c = load_float(cos + i, count), s = load_float(sin + i, count);
    store_bf16(to + i, sub(mul(first, c), mul(second, s)), count);
    store_bf16(to + half + i, add(mul(second, c), mul(first, s)), count);
  }
}

}  // namespace baton
