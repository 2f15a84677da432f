// Which of a row's values stay: the top k, the nucleus of mass p, those likely enough.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "../native/simd.h"

namespace baton {
namespace {

using i32 = std::int32_t;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr i64 kBlock = 256;      // values whose peak is kept, and whose weights are added up in float32
constexpr i64 kFewEnough = 512;  // values for which passes of vectors no longer pay
constexpr int kMostPasses = 16;  // equal values cannot be parted

inline i64 round_up(i64 count) { return (count + kBlock - 1) / kBlock * kBlock; }

// Values of a row, ids[i] = i where ids is null; padded to whole blocks with minus infinity.
struct Values {
  float* z;
  i32* ids;
  i64 count;
};

struct Scratch {
  std::vector<float> processed, scaled, weights, near, near_weights, peaks, near_peaks;
  std::vector<i32> ids, counts;

  void fit(i64 vocab_size) {
    const std::size_t size = round_up(vocab_size);
    if (scaled.size() >= size) return;
    for (auto* buffer : {&processed, &scaled, &weights, &near, &near_weights}) buffer->resize(size);
    for (auto* buffer : {&peaks, &near_peaks}) buffer->resize(size / kBlock);
    ids.resize(size);
    counts.resize(size);
  }
};

inline F32 load_or_least(const float* p, i64 count) {
  return count >= kLanes ? load(p) : keep_first(load_float(p, count), count, -kInfinity);
}

// Sums of lanes, in double precision from one block to the next.
struct LaneSums {
  double lanes[kLanes] = {};

  void add(F32 block) {
    float values[kLanes];
    store(values, block);
    for (int i = 0; i < kLanes; ++i) lanes[i] += values[i];
  }
  double total() const {
    double sum = 0.0;
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

void find_peaks(const Values& values, float* peaks) {
  for (i64 start = 0; start < values.count; start += kBlock) {
    F32 highest = broadcast(-kInfinity);
    for (i64 i = start; i < start + kBlock; i += kLanes) highest = max(load(values.z + i), highest);
    peaks[start / kBlock] = max_lanes(highest);
  }
}

// scaled = (y - highest) / temperature
Values scale(const float* y, i64 count, float highest, float temperature, Scratch& scratch) {
  float* z = scratch.scaled.data();
  const F32 peak = broadcast(highest), divisor = broadcast(temperature);
  for (i64 i = 0; i < round_up(count); i += kLanes)
    store(z + i, i < count ? div(sub(load_or_least(y + i, count - i), peak), divisor) : broadcast(-kInfinity));
  return {z, nullptr, count};
}

struct Above {
  double weight;
  i64 count;
};

// Of the values greater than t: what they weigh, and how many they are. No weights: each weighs 1.
Above weigh(const Values& values, const float* weights, const float* peaks, float t) {
  LaneSums sums;
  i64 count = 0;
  const F32 bound = broadcast(t);
  for (i64 start = 0; start < values.count; start += kBlock) {
    if (!(peaks[start / kBlock] > t)) continue;
    F32 sum = zero();
    for (i64 i = start; i < start + kBlock; i += kLanes) {
      const unsigned above = greater(load(values.z + i), bound);
      count += std::popcount(above);
      if (weights) sum = add(sum, keep(load(weights + i), above, 0.0F));
    }
    if (weights) sums.add(sum);
  }
  return {weights ? sums.total() : static_cast<double>(count), count};
}

// Values from which the result is still to be found, those greater being known to weigh `base`.
struct Band {
  Values values;
  const float *weights, *peaks;
  double base;
};

// Narrows the band to its values in (low, high], those greater than high weighing `base`.
void narrow(Band& band, float low, float high, double base, Scratch& scratch) {
  float *z = scratch.near.data(), *weights = scratch.near_weights.data();
  i64 count = 0;
  for (i64 start = 0; start < band.values.count; start += kBlock) {
    if (!(band.peaks[start / kBlock] > low)) continue;
    for (i64 i = start; i < start + kBlock; i += kLanes) {
      const F32 v = load(band.values.z + i);
      const unsigned lanes = greater(v, broadcast(low)) & ~greater(v, broadcast(high));
      if (lanes == 0) continue;
      if (band.weights) store_chosen(weights + count, load(band.weights + i), lanes);
      store_chosen(z + count, v, lanes);
      count += std::popcount(lanes);
    }
  }
  std::fill(z + count, z + round_up(count), -kInfinity);
  band = {{z, nullptr, count}, band.weights ? weights : nullptr, scratch.near_peaks.data(), base};
  find_peaks(band.values, scratch.near_peaks.data());
}

// The least value of the band for which `base` and all its values greater than it weigh less than `limit`: by parting
// the values around one of them, again and again.
float least_of(const Band& band, double limit) {
  thread_local std::vector<std::pair<float, float>> rest, part;  // (value, weight)
  rest.clear();
  for (i64 i = 0; i < band.values.count; ++i)
    rest.emplace_back(band.values.z[i], band.weights ? band.weights[i] : 1.0F);
  double base = band.base;
  while (true) {
    const float pivot = rest[rest.size() / 2].first;
    double greater_weight = 0.0, equal_weight = 0.0;
    for (const auto& [value, weight] : rest) {
      if (value > pivot) greater_weight += weight;
      if (value == pivot) equal_weight += weight;
    }
    const bool among_greater = base + greater_weight >= limit;
    if (!among_greater && base + greater_weight + equal_weight >= limit) return pivot;
    part.clear();
    for (const auto& one : rest)
      if (among_greater ? one.first > pivot : one.first < pivot) part.push_back(one);
    if (part.empty()) return pivot;  // rounding: all of them weigh less than the limit
    if (!among_greater) base += greater_weight + equal_weight;
    rest.swap(part);
  }
}

// The least value v for which all values greater than v weigh less than `limit`, which is positive; minus infinity if
// all finite values together do. No weights: each weighs 1. By bisection, on ever fewer values.
float least_kept(const Values& values, const float* weights, const float* peaks, double limit, Scratch& scratch) {
  Band band{values, weights, peaks, 0.0};
  float low = -1.0F, high = 0.0F;  // the result lies above low and is at most high
  Above above_low = weigh(band.values, weights, peaks, low), above_high = {0.0, 0};
  while (above_low.weight < limit && low > -kInfinity) {
    high = low, above_high = above_low;
    low = low > -1e4F ? low * 2.0F : -kInfinity;
    above_low = weigh(band.values, weights, peaks, low);
  }
  if (above_low.weight < limit) return low;
  for (int pass = 0; pass < kMostPasses; ++pass) {
    const i64 left = above_low.count - above_high.count;
    if (left <= kFewEnough) break;
    if (left < band.values.count / 8) {
      narrow(band, low, high, band.base + above_high.weight, scratch);
      above_low = {above_low.weight - above_high.weight, left};
      above_high = {0.0, 0};
    }
    const float middle = low + (high - low) / 2.0F;
    if (!(low < middle && middle < high)) break;
    const Above above = weigh(band.values, band.weights, band.peaks, middle);
    if (band.base + above.weight < limit)
      high = middle, above_high = above;
    else
      low = middle, above_low = above;
  }
  narrow(band, low, high, band.base + above_high.weight, scratch);
  return band.values.count > 0 ? least_of(band, limit) : high;  // none where sums were rounded another way
}

// Keeps the values that are not below `least`, in place.
void compact(Values& values, i32* ids, float* peaks, float least) {
  const F32 bound = broadcast(least);
  i64 kept = 0;
  for (i64 start = 0; start < values.count; start += kBlock) {
    if (peaks[start / kBlock] < least) continue;
    for (i64 i = start; i < start + kBlock; i += kLanes) {
      const F32 v = load(values.z + i);
      const unsigned lanes = ~greater(bound, v) & greater(v, broadcast(-kInfinity));
      if (lanes == 0) continue;
      float own[kLanes];  // ids, as bits
      for (i32 lane = 0; lane < kLanes; ++lane) own[lane] = std::bit_cast<float>(static_cast<i32>(i) + lane);
      const float* from = values.ids ? reinterpret_cast<const float*>(values.ids + i) : own;
      store_chosen(reinterpret_cast<float*>(ids + kept), load(from), lanes);
      store_chosen(values.z + kept, v, lanes);
      kept += std::popcount(lanes);
    }
  }
  values.ids = ids;
  values.count = kept;
  std::fill(values.z + kept, values.z + round_up(kept), -kInfinity);
  find_peaks(values, peaks);
}

void filter(Values& values, i32 top_k, float top_p, float min_p, Scratch& scratch) {
  float* peaks = scratch.peaks.data();
  i32* ids = scratch.ids.data();
  const float floor = min_p > 0.0F ? std::log(min_p) : -kInfinity;
  const bool by_count = top_k > 0 && top_k < values.count;
  if (!by_count && top_p >= 1.0F && floor == -kInfinity) return;
  find_peaks(values, peaks);
  if (by_count) compact(values, ids, peaks, least_kept(values, nullptr, peaks, top_k, scratch));
  if (top_p < 1.0F) {
    float* weights = scratch.weights.data();
    LaneSums sums;
    for (i64 start = 0; start < round_up(values.count); start += kBlock) {
      F32 sum = zero();
      for (i64 i = start; i < start + kBlock; i += kLanes) {
        const F32 weight = exp(load(values.z + i));
        store(weights + i, weight);
        sum = add(sum, weight);
      }
      sums.add(sum);
    }
    const double limit = sums.total() * top_p;
    compact(values, ids, peaks, std::max(floor, least_kept(values, weights, peaks, limit, scratch)));
  } else if (floor > -kInfinity) {
    compact(values, ids, peaks, floor);
  }
}

}  // namespace
}  // namespace baton
