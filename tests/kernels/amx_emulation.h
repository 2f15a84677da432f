// The AMX intrinsics that kernels use, in plain C++, for CPUs without them: compile with -include and -D__AMX_BF16__.
// After Intel's Software Developer's Manual: TDPBF16PS adds the even and the odd products of a step apart.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps

namespace emulated {

struct Tile {
  int lines = 0, line_bytes = 0;
  alignas(64) char bytes[16][64];
};

inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline Tile& tile(int number) {
  if (!configured || number >= 8 || tiles[number].lines == 0) std::abort();  // hardware raises #UD
  return tiles[number];
}

inline void configure(const void* configuration) {
  const auto* bytes = static_cast<const std::uint8_t*>(configuration);
  if (bytes[0] != 1) std::abort();
  for (int number = 0; number < 8; ++number) {
    Tile& tile = tiles[number];
    tile.lines = bytes[48 + number];
    tile.line_bytes = bytes[16 + 2 * number] | bytes[17 + 2 * number] << 8;
    if (tile.lines > 16 || tile.line_bytes > 64) std::abort();
    std::memset(tile.bytes, 0, sizeof(tile.bytes));
  }
  configured = true;
}

inline void load(int number, const void* base, long stride) {
  Tile& to = tile(number);
  std::memset(to.bytes, 0, sizeof(to.bytes));
  for (int line = 0; line < to.lines; ++line)
    std::memcpy(to.bytes[line], static_cast<const char*>(base) + line * stride, to.line_bytes);
}

inline void store(int number, void* base, long stride) {
  const Tile& from = tile(number);
  for (int line = 0; line < from.lines; ++line)
    std::memcpy(static_cast<char*>(base) + line * stride, from.bytes[line], from.line_bytes);
}

inline float widen(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline void multiply(int sums, int left, int right) {
  Tile &c = tile(sums), &a = tile(left), &b = tile(right);
  if (a.lines != c.lines || b.line_bytes != c.line_bytes || b.lines != a.line_bytes / 4) std::abort();
  for (int m = 0; m < c.lines; ++m) {
    float even[16] = {}, odd[16] = {}, total[16];
    for (int k = 0; k < b.lines; ++k) {
      std::uint16_t x[2], y[16][2];
      std::memcpy(x, a.bytes[m] + 4 * k, sizeof(x));
      std::memcpy(y, b.bytes[k], sizeof(y));
      for (int n = 0; n < 16; ++n) {
        even[n] += widen(x[0]) * widen(y[n][0]);
        odd[n] += widen(x[1]) * widen(y[n][1]);
      }
    }
    std::memcpy(total, c.bytes[m], sizeof(total));
    for (int n = 0; n < 16; ++n) total[n] += even[n] + odd[n];
    std::memcpy(c.bytes[m], total, c.line_bytes);
  }
}

}  // namespace emulated

#define _tile_loadconfig(configuration) emulated::configure(configuration)
#define _tile_release() (emulated::configured = false)
#define _tile_zero(number) std::memset(emulated::tile(number).bytes, 0, sizeof(emulated::tile(number).bytes))
#define _tile_loadd(number, base, stride) emulated::load(number, base, stride)
#define _tile_stored(number, base, stride) emulated::store(number, base, stride)
#define _tile_dpbf16ps(sums, left, right) emulated::multiply(sums, left, right)
