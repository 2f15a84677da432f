// silu(gate) * up as every kernel computes it.
#pragma once

#include "../native/simd.h"

namespace baton {

// Of bfloat16 values; silu is rounded to bfloat16, as in the checkpoints' own code. The product is not rounded yet.
inline F32 silu_and_mul(F32 gate, F32 up) {
  return mul(round_to_bf16(div(gate, add(broadcast(1.0F), exp(sub(zero(), gate))))), up);
}

}  // namespace baton
