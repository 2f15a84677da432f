// Pieces of a sampler: Gumbel noise, top-k and nucleus filters, the most likely token. Each row is worked on alone.

#include <algorithm>
#include <bit>
#include <vector>

#include "../native/parallel.h"
#include "../native/simd.h"

namespace baton {
namespace {

constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15;
constexpr i64 kIdsPerTask = 8192;

inline std::uint64_t mix(std::uint64_t z) {  // SplitMix64's finaliser
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// Cephes' logf (S. L. Moshier) for positive normal x, in plain operations that give the same bits in vectors and alone.
inline float log_of(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::int32_t exponent = static_cast<std::int32_t>(bits - 0x3F3504F3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const float f = std::bit_cast<float>(bits - (static_cast<std::uint32_t>(exponent) << 23)) - 1.0F;
  const float z = f * f;
  float p = 7.0376836292e-2F;
  p = p * f - 1.1514610310e-1F;
  p = p * f + 1.1676998740e-1F;
  p = p * f - 1.2420140846e-1F;
  p = p * f + 1.4249322787e-1F;
  p = p * f - 1.6668057665e-1F;
  p = p * f + 2.0000714765e-1F;
  p = p * f - 2.4999993993e-1F;
  p = p * f + 3.3333331174e-1F;
  const auto e = static_cast<float>(exponent);
  const float tail = p * f * z + e * -2.12194440e-4F - 0.5F * z;
  return f + tail + e * 0.693359375F;
}

inline float gumbel(std::uint64_t bits) {
  const float u = std::min((static_cast<float>(static_cast<std::int64_t>(bits >> 24)) + 0.5F) * 0x1p-40F, 1.0F - 0x1p-24F);
  const float rest = 1.0F - u;
  const float lost = 1.0F - rest;  // u as `rest` has it: log(1 - u) = log(rest) * u / lost (Kahan)
  const float scaled = log_of(rest) * (u / (lost == 0.0F ? 1.0F : lost));
  return -log_of(lost == 0.0F ? u : -scaled);
}

// Orders as the float does; both zeros are one.
inline std::uint32_t key_of(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x + 0.0F);
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// The least key v, among those not below `floor`, for which the weights of all keys above v add up to less than
// `limit`: by radix, eleven bits at a time. Sums are in double precision, in order of ids, then of keys.
template <typename Weight>
std::uint32_t least_kept(const float* values, i64 count, std::uint32_t floor, double limit, Weight weight) {
  constexpr int kShifts[] = {21, 10, 0};
  constexpr int kBits[] = {11, 11, 10};
  std::uint64_t prefix = 0;
  double above = 0.0;
  for (int level = 0; level < 3; ++level) {
    double mass[1 << 11] = {};
    bool present[1 << 11] = {};
    const int shift = kShifts[level], bits = kBits[level];
    for (i64 i = 0; i < count; ++i) {
      const std::uint32_t key = key_of(values[i]);
      if (key < floor || static_cast<std::uint64_t>(key) >> (shift + bits) != prefix) continue;
      const std::uint32_t bin = key >> shift & ((1U << bits) - 1);
      mass[bin] += weight(i);
      present[bin] = true;
    }
    std::uint32_t chosen = 0;
    double passed = above;
    for (int bin = (1 << bits) - 1; bin >= 0 && passed < limit; --bin) {
      if (!present[bin]) continue;
      chosen = bin;
      above = passed;
      passed += mass[bin];
    }
    prefix = prefix << bits | chosen;
  }
  return static_cast<std::uint32_t>(prefix);
}

void mask_row(const float* logits, float* out, i64 size, std::int32_t top_k, float top_p) {
  std::uint32_t least = 0;
  if (top_k > 0 && top_k < size) least = least_kept(logits, size, 0, top_k, [](i64) { return 1.0; });
  if (top_p < 1.0F) {
    thread_local std::vector<float> weights;
    weights.resize(size);
    const F32 highest = broadcast(*std::max_element(logits, logits + size));
    for (i64 i = 0; i < size; i += kLanes)
      store_float(weights.data() + i, exp(sub(load_float(logits + i, size - i), highest)), size - i);
    double total = 0.0;
    for (i64 i = 0; i < size; ++i)
      if (key_of(logits[i]) >= least) total += weights[i];
    least = least_kept(logits, size, least, total * top_p, [&](i64 i) { return static_cast<double>(weights[i]); });
  }
  for (i64 i = 0; i < size; ++i)
    out[i] = key_of(logits[i]) < least ? -std::numeric_limits<float>::infinity() : logits[i];
}

}  // namespace
}  // namespace baton

using namespace baton;

// out[rows, vocab_size]: Gumbel noise of (seed, position, id).
extern "C" void baton_gumbel_noise(const i64* seeds, const i64* positions, float* out, i64 rows, i64 vocab_size,
                                   int threads) {
  const i64 parts = (vocab_size + kIdsPerTask - 1) / kIdsPerTask;
  parallel_for(rows * parts, threads, [&](i64 task) {
    const i64 row = task / parts;
    const std::uint64_t key = mix(mix(seeds[row]) + (static_cast<std::uint64_t>(positions[row]) + 1) * kGolden);
    const i64 end = std::min(vocab_size, (task % parts + 1) * kIdsPerTask);
    float* to = out + row * vocab_size;
    for (i64 id = task % parts * kIdsPerTask; id < end; ++id)
      to[id] = gumbel(mix(key + (static_cast<std::uint64_t>(id) + 1) * kGolden));
  });
}

// out = logits[rows, vocab_size], with ids outside the top k, then outside the nucleus, at minus infinity. top_k and
// top_p may be null.
extern "C" void baton_mask_top_k_top_p(const float* logits, const std::int32_t* top_k, const float* top_p, float* out,
                                       i64 rows, i64 vocab_size, int threads) {
  parallel_for(rows, threads, [&](i64 row) {
    mask_row(logits + row * vocab_size, out + row * vocab_size, vocab_size, top_k ? top_k[row] : 0,
             top_p ? top_p[row] : 1.0F);
  });
}
