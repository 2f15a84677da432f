// Gated activations.

#include "../native/parallel.h"
#include "silu.h"

using namespace baton;

namespace {

constexpr i64 kElementsPerTask = 1 << 15;  // some tens of microseconds

}  // namespace

// out[T, size] = silu(gate) * up, gate_up[T, 2 * size] with rows `stride` elements apart; silu is rounded to bfloat16.
extern "C" void baton_silu_and_mul(const bf16* gate_up, i64 stride, bf16* out, i64 t, i64 size, int threads) {
  parallel_ranges(t, kElementsPerTask / size, threads, [&](i64 begin, i64 end) {
    for (i64 row = begin; row < end; ++row) {
      const bf16* gates = gate_up + row * stride;
      for (i64 i = 0; i < size; i += kLanes) {
        const F32 gate = load_bf16(gates + i, size - i), up = load_bf16(gates + size + i, size - i);
        store_bf16(out + row * size + i, silu_and_mul(gate, up), size - i);
      }
    }
  });
}
