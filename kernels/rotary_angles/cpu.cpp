// Cosines and sines of positions times frequencies.

#include <cmath>
#include <cstdint>

#include "../native/parallel.h"

namespace {

constexpr std::int64_t kElementsPerTask = 1 << 11;  // about twenty microseconds

}  // namespace

// positions[tokens], inv_freq[size]; cos, sin [tokens, size]. Each element depends on its own position alone.
extern "C" void baton_rotary_angles(const std::int64_t* positions, const float* inv_freq, float* cos, float* sin,
                                    std::int64_t tokens, std::int64_t size, int threads) {
  baton::parallel_ranges(tokens, kElementsPerTask / size, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      const float position = static_cast<float>(positions[token]);
      for (std::int64_t i = 0; i < size; ++i) {
        const float angle = position * inv_freq[i];
        cos[token * size + i] = std::cos(angle);
        sin[token * size + i] = std::sin(angle);
      }
    }
  });
}
