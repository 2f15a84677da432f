// Rotary position embedding of a token's heads, which may be normalised first (root mean square, as in Qwen3).
#pragma once

#include <algorithm>

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

// `heads` heads, `stride` elements apart where they are written, adjacent where they are read.
template <bool Normed>
inline void rotate_some(const bf16* from, i64 heads, const bf16* weight, const F32* scales, const float* cos,
                        const float* sin, bf16* to, i64 stride, i64 head_dim) {
  const i64 half = head_dim / 2;
  for (i64 i = 0; i < half; i += kLanes) {
    const i64 count = half - i;
    const F32 c = load_float(cos + i, count), s = load_float(sin + i, count);
    const F32 first_weight = Normed ? load_bf16(weight + i, count) : zero();
    const F32 second_weight = Normed ? load_bf16(weight + half + i, count) : zero();
    for (i64 head = 0; head < heads; ++head) {
      const bf16* values = from + head * head_dim + i;
      F32 first = load_bf16(values, count), second = load_bf16(values + half, count);
      if constexpr (Normed) {
        first = round_to_bf16(mul(round_to_bf16(mul(first, scales[head])), first_weight));
        second = round_to_bf16(mul(round_to_bf16(mul(second, scales[head])), second_weight));
      }
      store_bf16(to + head * stride + i, sub(mul(first, c), mul(second, s)), count);
      store_bf16(to + head * stride + half + i, add(mul(second, c), mul(first, s)), count);
    }
  }
}

// cos, sin: [head_dim / 2] of the token. weight may be null: heads are not normalised then. Some heads' scales are
// computed before any of them is rotated: there is enough to do while a square root is on its way.
inline void rotate_heads(const bf16* from, i64 heads, const bf16* weight, float eps, const float* cos, const float* sin,
                         bf16* to, i64 stride, i64 head_dim) {
  constexpr i64 kMost = 8;
  if (!weight) return rotate_some<false>(from, heads, nullptr, nullptr, cos, sin, to, stride, head_dim);
  for (i64 head = 0; head < heads; head += kMost) {
    const i64 count = std::min(kMost, heads - head);
    F32 scales[kMost];
    for (i64 i = 0; i < count; ++i) scales[i] = scale_of_head(from + (head + i) * head_dim, head_dim, eps);
    rotate_some<true>(from + head * head_dim, count, weight, scales, cos, sin, to + head * stride, stride, head_dim);
  }
}

}  // namespace baton
