// Rotary position embedding of a token's heads, which may be normalised first (root mean square, as in Qwen3).
#pragma once

#include <algorithm>

#include "wide.h"

namespace baton {

// `heads` heads, `stride` elements apart where they are written, adjacent where they are read.
template <bool Normed>
inline void rotate_some(const bf16* from, i64 heads, const bf16* weight, const float* scales, const float* cos,
                        const float* sin, bf16* to, i64 stride, i64 head_dim, i64 ahead) {
  constexpr int kTurns = Normed ? 2 : 0;  // of values before they meet their angles
  const i64 half = head_dim / 2;
  for (i64 i = 0; i < half; i += kWide) {
    const i64 count = half - i;
    const Wide c = turn<kTurns>(load_wide(cos + i, count)), s = turn<kTurns>(load_wide(sin + i, count));
    const Wide first_weight = Normed ? turn<1>(load_wide(weight + i, count)) : Wide{};
    const Wide second_weight = Normed ? turn<1>(load_wide(weight + half + i, count)) : Wide{};
    for (i64 head = 0; head < heads; ++head) {
      const bf16* values = from + head * head_dim + i;
      __builtin_prefetch(values + ahead);
      __builtin_prefetch(values + ahead + half);
      Wide first = widen(load_pairs(values, count)), second = widen(load_pairs(values + half, count));
      if constexpr (Normed) {
        const F32 scale = broadcast(scales[head]);
        first = widen(round_to_pairs(mul(first, scale)));
        second = widen(round_to_pairs(mul(second, scale)));
        first = widen(round_to_pairs(mul(first, first_weight)));
        second = widen(round_to_pairs(mul(second, second_weight)));
      }
      const Pairs left = round_to_pairs(sub(mul(first, c), mul(second, s)));
      const Pairs right = round_to_pairs(add(mul(second, c), mul(first, s)));
      store_pairs(to + head * stride + i, turn_back<kTurns + 1>(left), count);
      store_pairs(to + head * stride + half + i, turn_back<kTurns + 1>(right), count);
    }
  }
}

// cos, sin: [head_dim / 2] of the token. weight may be null: heads are not normalised then. Some heads' scales are
// computed before any of them is rotated: there is enough to do while a square root is on its way. So are the next
// token's heads, which lie `ahead` elements after these, if there is one.
inline void rotate_heads(const bf16* from, i64 heads, const bf16* weight, float eps, const float* cos, const float* sin,
                         bf16* to, i64 stride, i64 head_dim, i64 ahead) {
  if (!weight) return rotate_some<false>(from, heads, nullptr, nullptr, cos, sin, to, stride, head_dim, ahead);
  for (i64 head = 0; head < heads; head += kHeadsAtOnce) {
    const i64 count = std::min<i64>(kHeadsAtOnce, heads - head);
    const bf16* some = from + head * head_dim;
    float scales[kHeadsAtOnce];
    if (count == kHeadsAtOnce)
      sum_squares_at_once(some, head_dim, scales);
    else
      for (i64 i = 0; i < count; ++i) scales[i] = sum_squares(some + i * head_dim, head_dim);
    for (i64 i = 0; i < count; ++i) scales[i] = 1.0F / std::sqrt(scales[i] / static_cast<float>(head_dim) + eps);
    rotate_some<true>(some, count, weight, scales, cos, sin, to + head * stride, stride, head_dim, ahead);
  }
}

}  // namespace baton
