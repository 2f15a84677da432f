// Rotary position embedding of heads, which may be normalised first.

#include "../native/parallel.h"
#include "rotate.h"

using namespace baton;

namespace {

constexpr i64 kElementsPerTask = 1 << 15;  // some tens of microseconds

}  // namespace

// x: token t's heads lie at x + t * stride, adjacent; out is contiguous. cos, sin: [T, head_dim / 2]. weight may be null.
extern "C" void baton_norm_rotary(const bf16* x, i64 stride, const bf16* weight, float eps, const float* cos,
                                  const float* sin, bf16* out, i64 t, i64 heads, i64 head_dim, int threads) {
  const i64 half = head_dim / 2;
  parallel_ranges(t, kElementsPerTask / (heads * head_dim), threads, [&](i64 begin, i64 end) {
    for (i64 token = begin; token < end; ++token)
      rotate_heads(x + token * stride, heads, weight, eps, cos + token * half, sin + token * half,
                   out + token * heads * head_dim, head_dim, head_dim, stride);
  });
}
