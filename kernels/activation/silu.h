// silu(gate) * up as every kernel computes it.
#pragma once

#include "../native/simd.h"

namespace baton {

// Of bfloat16 values; silu is rounded to bfloat16, as in the checkpoints' own code. The product is not rounded yet.
inline F32 silu_and_mul(F32 gate, F32 up) {
  constexpr float kLog2E = 1.44269504088896341F;
  return mul(round_to_bf16(div(gate, add(broadcast(1.0F), exp2(mul(gate, broadcast(-kLog2E)))))), up);
}

}  // namespace baton
