// Rotary position embedding of heads, which may be normalised first (root mean square, as in Qwen3).

#include "../native/parallel.h"
#include "../native/simd.h"

using namespace baton;

namespace {

constexpr i64 kElementsPerTask = 1 << 15;  // some tens of microseconds

inline F32 scale_of(const bf16* head, i64 head_dim, float eps) {
  F32 squares = zero();
  for (i64 i = 0; i < head_dim; i += kLanes) {
    const F32 value = load_bf16(head + i, head_dim - i);
    squares = fma(value, value, squares);
  }
  return broadcast(1.0F / std::sqrt(sum_lanes(squares) / static_cast<float>(head_dim) + eps));
}

}  // namespace

// x: token t's heads lie at x + t * stride, adjacent; out is contiguous. cos, sin: [T, head_dim / 2]. weight may be null.
extern "C" void baton_norm_rotary(const bf16* x, i64 stride, const bf16* weight, float eps, const float* cos,
                                  const float* sin, bf16* out, i64 t, i64 heads, i64 head_dim, int threads) {
  const i64 half = head_dim / 2;
  parallel_ranges(t * heads, kElementsPerTask / head_dim, threads, [&](i64 begin, i64 end) {
    for (i64 place = begin; place < end; ++place) {
      const i64 token = place / heads, head = place % heads;
      const bf16* from = x + token * stride + head * head_dim;
      bf16* to = out + place * head_dim;
      const F32 scale = weight ? scale_of(from, head_dim, eps) : zero();
      auto read = [&](i64 i, i64 count) {
        const F32 value = load_bf16(from + i, count);
        return weight ? round_to_bf16(mul(round_to_bf16(mul(value, scale)), load_bf16(weight + i, count))) : value;
      };
      for (i64 i = 0; i < half; i += kLanes) {
        const i64 count = half - i;
        const F32 first = read(i, count), second = read(half + i, count);
        const F32 c = load_float(cos + token * half + i, count), s = load_float(sin + token * half + i, count);
        store_bf16(to + i, sub(mul(first, c), mul(second, s)), count);
        store_bf16(to + half + i, add(mul(second, c), mul(first, s)), count);
      }
    }
  });
}
