// Root mean square normalisation, alone or after a residual addition.

#include "../native/parallel.h"
#include "../native/simd.h"

using namespace baton;

namespace {

constexpr i64 kElementsPerTask = 1 << 16;  // about twenty microseconds

// Sum of squares of a row in one fixed order, whatever the number of rows; `total` (may be null) receives x + residual.
inline F32 prepare(const bf16* x, const bf16* residual, bf16* total, i64 size) {
  F32 squares = zero();
  for (i64 i = 0; i < size; i += kLanes) {
    F32 value = load_bf16(x + i, size - i);
    if (residual) {
      value = round_to_bf16(add(value, load_bf16(residual + i, size - i)));
      store_bf16(total + i, value, size - i);
    }
    squares = fma(value, value, squares);
  }
  return squares;
}

}  // namespace

// Rows of `size` adjacent elements; x's are `x_stride` apart, the others `size`. Rounded to bfloat16 before the weight.
extern "C" void baton_rms_norm(const bf16* x, i64 x_stride, const bf16* residual, const bf16* weight, float eps,
                               bf16* out, bf16* total, i64 rows, i64 size, int threads) {
  parallel_ranges(rows, kElementsPerTask / size, threads, [&](i64 begin, i64 end) {
    for (i64 row = begin; row < end; ++row) {
      const bf16* from = x + row * x_stride;
      bf16* sum = residual ? total + row * size : nullptr;
      const F32 squares = prepare(from, residual ? residual + row * size : nullptr, sum, size);
      const F32 scale = broadcast(1.0F / std::sqrt(sum_lanes(squares) / static_cast<float>(size) + eps));
      for (i64 i = 0; i < size; i += kLanes) {
        const F32 value = round_to_bf16(mul(load_bf16((sum ? sum : from) + i, size - i), scale));
        store_bf16(out + row * size + i, mul(value, load_bf16(weight + i, size - i)), size - i);
      }
    }
  });
}
