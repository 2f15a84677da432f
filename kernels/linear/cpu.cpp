// Linear layers in bfloat16 with float32 accumulation.
//
// A weight [N, K] is stored as [ceil(N / 64)][ceil(K / 2)][64][2], padded with zeros: a step over K reads four
// consecutive cache lines, and sixteen output columns come out of each.
//
// A gated weight [2 * size, K], gates above what they gate, has 32 gates and then their 32 partners in each block: a
// tile holds both, and writes the activation instead of them.

#include "blocks.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace baton {
namespace {

using linear::kBlock;
using linear::Output;

struct Bf16Weights {
#if defined(__AMX_BF16__)
  static constexpr int kRows = amx::kRows;
#else
  static constexpr int kRows = kTileRows;
#endif
  static constexpr int kVectors = kTileVectors;
  static constexpr int kVectorsPerRead = kTileVectors;
  static constexpr i64 kPairBytes = kBlock * 2 * sizeof(bf16);

  const char* at;

  static void read(const char* from, Pairs (&columns)[kVectorsPerRead]) {
    for (int v = 0; v < kVectorsPerRead; ++v) columns[v] = load_pairs(from + v * kLine);
  }
  static F32 complete(F32 sum, i64, i64) { return sum; }
};

}  // namespace

#if defined(__AMX_BF16__)

template <>
void linear::multiply(const Linear<Bf16Weights>& op, i64 row, i64 rows, const char* block, i64 first_pair,
                      i64 last_pair, int, Prefetch prefetch, float* sums) {
  amx::tile(op.x + row * op.x_stride, op.x_stride, static_cast<int>(rows), op.k, reinterpret_cast<const bf16*>(block),
            first_pair, last_pair, prefetch.from, prefetch.stride, sums);
}

#endif

namespace {

void run(const linear::Linear<Bf16Weights>& op, i64 m, int threads) { linear::run(op, m, threads); }

// row(block, column): the row of `weight` that is there, or -1.
template <typename Row>
void pack(const bf16* weight, i64 stride, bf16* packed, i64 blocks, i64 k, int threads, Row row) {
  const i64 pairs = (k + 1) / 2;
  parallel_for(blocks, threads, [&](i64 block) {
    bf16* to = packed + block * pairs * kBlock * 2;
    std::memset(to, 0, pairs * kBlock * 2 * sizeof(bf16));
    for (i64 column = 0; column < kBlock; ++column) {
      if (row(block, column) < 0) continue;
      const bf16* from = weight + row(block, column) * stride;
      for (i64 i = 0; i < k; ++i) to[(i / 2 * kBlock + column) * 2 + i % 2] = from[i];
    }
  });
}

}  // namespace
}  // namespace baton

using namespace baton;

// out[M, N] = x[M, K] weight^T + bias; strides in elements, columns adjacent. `output`: kBf16, kFloat or kAdded.
extern "C" void baton_linear(const bf16* x, i64 x_stride, const bf16* weight, const bf16* bias, void* out,
                             i64 out_stride, i64 m, i64 n, i64 k, int output, int threads) {
  run({x, x_stride, {reinterpret_cast<const char*>(weight)}, bias, out, out_stride, n, k, Output{output}}, m, threads);
}

// out[M, size] = silu(gates) * partners of the linear layer with a gated weight, bias [2 * size], both rounded first.
extern "C" void baton_linear_silu_and_mul(const bf16* x, i64 x_stride, const bf16* weight, const bf16* bias, bf16* out,
                                          i64 out_stride, i64 m, i64 size, i64 k, int threads) {
  const Output output = Output::kGated;
  run({x, x_stride, {reinterpret_cast<const char*>(weight)}, bias, out, out_stride, size, k, output}, m, threads);
}

// weight[N, K] (rows `stride` elements apart) to the blocked layout.
extern "C" void baton_linear_pack(const bf16* weight, i64 stride, bf16* packed, i64 n, i64 k, int threads) {
  pack(weight, stride, packed, (n + kBlock - 1) / kBlock, k, threads, [&](i64 block, i64 column) {
    const i64 row = block * kBlock + column;
    return row < n ? row : -1;
  });
}

// weight[2 * size, K] (rows `stride` elements apart) to the blocked layout of a gated one.
extern "C" void baton_linear_pack_gated(const bf16* weight, i64 stride, bf16* packed, i64 size, i64 k, int threads) {
  constexpr i64 kHalf = kBlock / 2;
  pack(weight, stride, packed, (size + kHalf - 1) / kHalf, k, threads, [&](i64 block, i64 column) {
    const i64 gate = block * kHalf + column % kHalf;
    return gate < size ? column / kHalf * size + gate : -1;
  });
}

// Rows `ids` of a packed weight: out[T, K].
extern "C" void baton_linear_rows(const i64* ids, const bf16* packed, bf16* out, i64 t, i64 k, int threads) {
  const i64 pairs = (k + 1) / 2;
  parallel_ranges(t, 16, threads, [&](i64 begin, i64 end) {
    for (i64 token = begin; token < end; ++token) {
      const bf16* from = packed + (ids[token] / kBlock * pairs * kBlock + ids[token] % kBlock) * 2;
      for (i64 i = 0; i < k; ++i) out[token * k + i] = from[i / 2 * kBlock * 2 + i % 2];
    }
  });
}

// Rows `ids` of a weight as checkpoints have it: out[T, K].
extern "C" void baton_plain_rows(const i64* ids, const bf16* weight, bf16* out, i64 t, i64 k, int threads) {
  parallel_ranges(t, 16, threads, [&](i64 begin, i64 end) {
    for (i64 token = begin; token < end; ++token) std::memcpy(out + token * k, weight + ids[token] * k, k * sizeof(bf16));
  });
}
