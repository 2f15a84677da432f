// The sampler: processors, filters, Gumbel-max and log probabilities, fused. Each row is worked on alone, by one
// thread, in an order that depends on nothing but its own values.

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "../native/parallel.h"
#include "../native/simd.h"
#include "filters.h"

namespace baton {
namespace {

using u64 = std::uint64_t;

constexpr u64 kGolden = 0x9E3779B97F4A7C15;
constexpr i64 kPeakBlock = 2048;

// See kernels/sampling/native.py, which fills it.
struct SampleArguments {
  const float* logits;
  i64 rows, vocab_size;
  const float* temperature;
  const i32* top_k;
  const float *top_p, *min_p;
  const i64 *seeds, *positions;
  const i32* mask_index;
  const std::uint32_t* mask_bits;
  i64 mask_words;
  const i32 *bias_index, *bias_ids;
  const float* bias_values;
  i64 bias_width;
  const i32* penalty_index;
  const float *repetition, *frequency, *presence;
  const i32* log;
  i64 log_stride;
  const i64* log_rows;
  const i32* prompt_lens;
  const i32* logprob_index;
  const std::uint8_t* logprob_processed;
  i64 num_top;
  float* logprobs;
  i32 *ranks, *top_ids;
  float* top_logprobs;
  i64* token_ids;
  std::uint8_t* row_ok;
};

struct Peak {
  float value;
  i64 id;  // the lowest that has it
  bool all_finite;
};

Peak find_peak(const float* x, i64 count) {
  float best = -kInfinity;
  i64 block = 0;
  F32 spoiled = zero();
  for (i64 start = 0; start < count; start += kPeakBlock) {
    const i64 end = std::min(count, start + kPeakBlock);
    F32 highest = broadcast(-kInfinity);
    for (i64 i = start; i < end; i += kLanes) {
      const F32 v = load_or_least(x + i, end - i);
      highest = max(v, highest);
      spoiled = fma(end - i >= kLanes ? v : load_float(x + i, end - i), zero(), spoiled);
    }
    if (const float peak = max_lanes(highest); peak > best) best = peak, block = start;
  }
  const float* found = std::find(x + block, x + count, best);
  return {best, found == x + count ? 0 : found - x, sum_lanes(spoiled) == 0.0F};
}

// --- processors

void mask(const SampleArguments& a, i64 at, float* y) {
  const std::uint32_t* words = a.mask_bits + at * a.mask_words;
  for (i64 i = 0; i < a.vocab_size; i += kLanes)  // y is padded
    store(y + i, keep(load(y + i), words[i / 32] >> i % 32 & 0xFFFF, -kInfinity));
}

void add_bias(const SampleArguments& a, i64 at, float* y) {
  for (i64 i = at * a.bias_width; i < (at + 1) * a.bias_width; ++i) y[a.bias_ids[i]] += a.bias_values[i];
}

// `counts` is all zero, before and after.
void penalise(const SampleArguments& a, i64 row, i64 at, float* y, i32* counts) {
  const i32* log = a.log + a.log_rows[at] * a.log_stride;
  const i64 length = a.positions[row];
  const float repetition = a.repetition[at], frequency = a.frequency[at], presence = a.presence[at];
  for (i64 i = a.prompt_lens[at]; i < length; ++i) ++counts[log[i]];
  const i64 first = repetition == 1.0F ? std::min<i64>(a.prompt_lens[at], length) : 0;
  for (i64 i = first; i < length; ++i) {
    i32& count = counts[log[i]];
    if (count < 0) continue;
    float& value = y[log[i]];
    value = value > 0.0F ? value / repetition : value * repetition;
    if (count > 0) value = value - frequency * static_cast<float>(count) - presence;
    count = -1;
  }
  for (i64 i = first; i < length; ++i) counts[log[i]] = 0;
}

// The row after its processors, padded; null where it has none.
const float* process(const SampleArguments& a, i64 row, Scratch& scratch) {
  const i32 masked = a.mask_index ? a.mask_index[row] : -1;
  const i32 biased = a.bias_index ? a.bias_index[row] : -1;
  const i32 penalised = a.penalty_index ? a.penalty_index[row] : -1;
  if (masked < 0 && biased < 0 && penalised < 0) return nullptr;
  float* y = scratch.processed.data();
  std::copy_n(a.logits + row * a.vocab_size, a.vocab_size, y);
  std::fill(y + a.vocab_size, y + round_up(a.vocab_size), -kInfinity);
  if (masked >= 0) mask(a, masked, y);
  if (biased >= 0) add_bias(a, biased, y);
  if (penalised >= 0) penalise(a, row, penalised, y, scratch.counts.data());
  return y;
}

// --- noise

inline u64 mix(u64 z) {  // SplitMix64's finaliser
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

inline float uniform(u64 key, i64 id) {
  const u64 bits = mix(key + (static_cast<u64>(id) + 1) * kGolden);
  return std::min((static_cast<float>(static_cast<i64>(bits >> 24)) + 0.5F) * 0x1p-40F, 1.0F - 0x1p-24F);
}

inline float gumbel(float u) { return static_cast<float>(-std::log(-std::log1p(-static_cast<double>(u)))); }

// Index into `values` of the greatest sum of value and noise, the first of equals.
//
// -log(u) bounds the noise from above, so only where u <= exp(value - best) can a value beat the best: the logarithms,
// which are the dear part, are taken of a few values only.
i64 draw(const Values& values, i64 first, u64 key) {
  const auto id_at = [&](i64 i) -> i64 { return values.ids ? values.ids[i] : i; };
  i64 best = first;
  float highest = values.z[best] + gumbel(uniform(key, id_at(best)));
  float u[kBlock];
  for (i64 start = 0; start < values.count; start += kBlock) {
    if (values.ids)
      for (i64 i = 0; i < kBlock; ++i) u[i] = uniform(key, values.ids[start + i]);
    else
      for (i64 i = 0; i < kBlock; ++i) u[i] = uniform(key, start + i);
    for (i64 i = 0; i < kBlock; i += kLanes) {
      const F32 chance = exp(sub(load(values.z + start + i), broadcast(highest)));
      unsigned lanes = greater(mul(chance, broadcast(1.001F)), load(u + i));  // more than rounding can do
      for (; lanes; lanes &= lanes - 1) {
        const i64 lane = i + std::countr_zero(lanes), at = start + lane;
        const float sum = values.z[at] + gumbel(u[lane]);
        if (sum > highest || (sum == highest && at < best)) highest = sum, best = at;
      }
    }
  }
  return best;
}

// --- log probabilities

struct Report {
  float *logprob, *top_logprobs;
  i32 *rank, *top_ids;
  i64 num_top;
};

void report_nothing(const Report& out) {
  *out.logprob = std::numeric_limits<float>::quiet_NaN();
  *out.rank = 0;
  std::fill_n(out.top_ids, out.num_top, 0);
  std::fill_n(out.top_logprobs, out.num_top, -kInfinity);
}

// Of x[at] and of the greatest of `count` values, whose peak is `highest`.
void report(const float* x, const i32* ids, i64 count, float highest, i64 at, const Report& out) {
  LaneSums sums;
  i64 better = 0, found = 0;
  const F32 peak = broadcast(highest), own = broadcast(x[at]);
  float least = -kInfinity;  // of a full list
  std::fill_n(out.top_logprobs, out.num_top, -kInfinity);
  std::fill_n(out.top_ids, out.num_top, 0);
  for (i64 start = 0; start < count; start += kBlock) {
    F32 sum = zero();
    for (i64 i = start; i < std::min(count, start + kBlock); i += kLanes) {
      const F32 v = load_or_least(x + i, count - i);
      sum = add(sum, exp(sub(v, peak)));
      better += std::popcount(greater(v, own));
      if (out.num_top == 0) continue;
      for (unsigned lanes = greater(v, broadcast(least)); lanes; lanes &= lanes - 1) {
        const i64 from = i + std::countr_zero(lanes);
        if (!(x[from] > least)) continue;
        i64 place = found < out.num_top ? found++ : found - 1;
        for (; place > 0 && out.top_logprobs[place - 1] < x[from]; --place) {
          out.top_logprobs[place] = out.top_logprobs[place - 1];
          out.top_ids[place] = out.top_ids[place - 1];
        }
        out.top_logprobs[place] = x[from];
        out.top_ids[place] = ids ? ids[from] : static_cast<i32>(from);
        if (found == out.num_top) least = out.top_logprobs[found - 1];
      }
    }
    sums.add(sum);
  }
  const double log_sum = std::log(sums.total());
  const auto logprob = [&](float v) { return static_cast<float>(static_cast<double>(v - highest) - log_sum); };
  *out.logprob = logprob(x[at]);
  *out.rank = static_cast<i32>(better) + 1;
  for (i64 i = 0; i < found; ++i) out.top_logprobs[i] = logprob(out.top_logprobs[i]);
}

Report report_of(float* logprobs, i32* ranks, i32* top_ids, float* top_logprobs, i64 num_top, i64 at) {
  return {logprobs + at, top_logprobs + at * num_top, ranks + at, top_ids + at * num_top, num_top};
}

void sample_row(const SampleArguments& a, i64 row) {
  thread_local Scratch scratch;
  const float* x = a.logits + row * a.vocab_size;
  const Peak raw = find_peak(x, a.vocab_size);
  const i32 reported = a.logprob_index ? a.logprob_index[row] : -1;
  const Report out = reported < 0 ? Report{}
                                  : report_of(a.logprobs, a.ranks, a.top_ids, a.top_logprobs, a.num_top, reported);
  scratch.fit(a.vocab_size);
  const float* processed = raw.all_finite ? process(a, row, scratch) : nullptr;
  const Peak peak = processed ? find_peak(processed, a.vocab_size) : raw;
  a.row_ok[row] = raw.all_finite && std::isfinite(peak.value);
  a.token_ids[row] = 0;
  if (!a.row_ok[row]) {
    if (reported >= 0) report_nothing(out);
    return;
  }
  const float temperature = a.temperature ? a.temperature[row] : 0.0F;
  const float* y = processed ? processed : x;
  if (temperature == 0.0F) {
    a.token_ids[row] = peak.id;
    if (reported >= 0) {
      const bool of_processed = a.logprob_processed[reported];
      report(of_processed ? y : x, nullptr, a.vocab_size, of_processed ? peak.value : raw.value, peak.id, out);
    }
    return;
  }
  Values values = scale(y, a.vocab_size, peak.value, temperature, scratch);
  filter(values, a.top_k ? a.top_k[row] : 0, a.top_p ? a.top_p[row] : 1.0F, a.min_p ? a.min_p[row] : 0.0F, scratch);
  const i64 first = values.ids ? std::find(values.ids, values.ids + values.count, peak.id) - values.ids : peak.id;
  const u64 key = mix(mix(a.seeds[row]) + (static_cast<u64>(a.positions[row]) + 1) * kGolden);
  const i64 drawn = draw(values, first, key);
  const i64 token = values.ids ? values.ids[drawn] : drawn;
  a.token_ids[row] = token;
  if (reported < 0) return;
  if (a.logprob_processed[reported])
    report(values.z, values.ids, values.count, 0.0F, drawn, out);
  else
    report(x, nullptr, a.vocab_size, raw.value, token, out);
}

}  // namespace
}  // namespace baton

using namespace baton;

extern "C" void baton_sample(const SampleArguments* arguments, int threads) {
  parallel_for(arguments->rows, threads, [&](i64 row) { sample_row(*arguments, row); });
}

// Log probabilities of targets[rows] under softmax(logits[rows, vocab_size]), and the num_top greatest.
extern "C" void baton_log_probabilities(const float* logits, const i64* targets, float* logprobs, std::int32_t* ranks,
                                        std::int32_t* top_ids, float* top_logprobs, i64 rows, i64 vocab_size,
                                        i64 num_top, int threads) {
  parallel_for(rows, threads, [&](i64 row) {
    const float* x = logits + row * vocab_size;
    const Report out = report_of(logprobs, ranks, top_ids, top_logprobs, num_top, row);
    const Peak peak = find_peak(x, vocab_size);
    peak.all_finite ? report(x, nullptr, vocab_size, peak.value, targets[row], out) : report_nothing(out);
  });
}
