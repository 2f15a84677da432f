// A register tile of linear layers on AMX: up to 16 rows, 64 columns, 16 pairs of K at each step.
//
// The layout of weights is as it is: sixteen pairs of K times sixteen columns are a tile of sixteen lines, 256 bytes
// apart. Every sum takes its steps over K in order, and within a step the order of the instruction (`TDPBF16PS`), which
// is the same for all rows and columns of a tile: a row's bits do not depend on the other rows.
#pragma once

#include "../native/simd.h"

namespace baton::amx {

constexpr int kRows = 16;
constexpr i64 kPairs = 16;    // of K, per step
constexpr i64 kColumns = 64;  // of a block

// Tiles 0 to 3 hold sums, 4 rows of x, 5 and 6 weights.
struct alignas(kLine) Configuration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t line_bytes[16] = {kLine, kLine, kLine, kLine, kLine, kLine, kLine};
  std::uint8_t lines[16] = {};

  explicit Configuration(int rows) {
    for (int tile = 0; tile < 7; ++tile) lines[tile] = tile < 5 ? rows : kRows;
  }
};

inline void step(const bf16* x, i64 x_stride, const bf16* weight) {
  constexpr int line = kColumns * 2 * sizeof(bf16), next = kLanes * 2;
  _tile_loadd(4, x, x_stride * static_cast<i64>(sizeof(bf16)));
  _tile_loadd(5, weight, line);
  _tile_loadd(6, weight + next, line);
  _tile_dpbf16ps(0, 4, 5);
  _tile_dpbf16ps(1, 4, 6);
  _tile_loadd(5, weight + 2 * next, line);
  _tile_loadd(6, weight + 3 * next, line);
  _tile_dpbf16ps(2, 4, 5);
  _tile_dpbf16ps(3, 4, 6);
}

// Adds pairs [first_pair, last_pair) of K to `sums` [rows][64], or, where they are the first, begins `sums` with them.
// Passes over K must begin at multiples of kPairs. At each pair `stride` bytes from `prefetch` on are asked for.
inline void tile(const bf16* x, i64 x_stride, int rows, i64 k, const bf16* block, i64 first_pair, i64 last_pair,
                 const char* prefetch, i64 stride, float* sums) {
  constexpr int line = kColumns * sizeof(float);
  const Configuration configuration(rows);
  _tile_loadconfig(&configuration);
  if (first_pair) {
    _tile_loadd(0, sums, line);
    _tile_loadd(1, sums + kLanes, line);
    _tile_loadd(2, sums + 2 * kLanes, line);
    _tile_loadd(3, sums + 3 * kLanes, line);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  i64 pair = first_pair;
  for (; pair + kPairs <= last_pair && (pair + kPairs) * 2 <= k; pair += kPairs, prefetch += kPairs * stride) {
    for (i64 at = 0; at < kPairs * stride; at += kLine) _mm_prefetch(prefetch + at, _MM_HINT_T1);
    step(x + pair * 2, x_stride, block + pair * kColumns * 2);
  }
  if (pair < last_pair) {  // a last step that K does not fill goes on with zeros
    alignas(kLine) bf16 last_x[kRows][kPairs * 2] = {}, last_weight[kPairs * kColumns * 2] = {};
    for (int r = 0; r < rows; ++r)
      std::memcpy(last_x[r], x + r * x_stride + pair * 2, (k - pair * 2) * sizeof(bf16));
    std::memcpy(last_weight, block + pair * kColumns * 2, (last_pair - pair) * kColumns * 2 * sizeof(bf16));
    step(last_x[0], kPairs * 2, last_weight);
  }
  _tile_stored(0, sums, line);
  _tile_stored(1, sums + kLanes, line);
  _tile_stored(2, sums + 2 * kLanes, line);
  _tile_stored(3, sums + 3 * kLanes, line);
  _tile_release();  // tiles in use make a switch to another process dearer
}

}  // namespace baton::amx
