// One step of the online softmax: what some rows, each a (token, query head), do with a tile of 64 keys.
//
// For one row every sum has one order, given by positions alone, whatever other rows are worked on with it: scores are
// chains over head_dim, outputs chains over pairs of keys, as are the denominator's sixteen lanes, joined at the end.
// Nothing of keys that a row does not see enters its sums, whatever lies there.
#pragma once

#include <algorithm>
#include <limits>

#include "../native/kv_layout.h"

namespace baton {

constexpr int kKeyTile = 64;
constexpr int kParts = kKeyTile / kTileTokens;
constexpr int kColumns = 64;  // of the outputs: their sums lie in blocks of as many
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Weights are relative to the greatest score of the first tile, until a later one is greater by this power of two: it
// seldom is, so what was summed up need not be scaled again (as in FlashAttention-4).
constexpr float kSlack = 8.0F;

// Vectors of a register tile of so many rows, at most four: of scores, all parts of a tile; of outputs, a block.
template <int Rows>
constexpr int kWidth = std::min(4, kTileRows * kTileVectors / Rows);

// Where the four parts of one head's key tile lie.
struct KeyTile {
  const bf16* keys[kParts];
  const bf16* values[kParts];
};

// All rows of one key-value head, and what they keep from tile to tile.
struct Head {
  i64 head_dim, rows;
  float scale;        // a score's weight is 2 ^ (scale * score + shift)
  bool first;         // of the tiles: nothing has been summed up
  const bf16* query;  // [rows][head_dim]
  bf16* weights;      // [rows][kKeyTile], of this tile
  float* limit;       // [rows], a score beyond which moves the shift, at first -infinity
  float* shift;       // [rows], at first infinity
  float* total;       // [rows][kLanes], sums of weights
  float* sums;        // [blocks of kColumns][rows][kColumns], of weighted values

  float* sum(i64 row, i64 column) const {
    return sums + (column / kColumns * rows + row) * kColumns + column % kColumns;
  }
};

// Some rows that see keys of the tile, those that see more after those that see fewer.
struct Chunk {
  i64 row;                 // the first one
  i64 rows;                // at most kTileRows
  i64 parts;               // of the tile that any row sees
  i64 visible[kTileRows];  // keys that each row sees, at least one
  bool decays;             // what was summed up for earlier tiles, in some row
  float decay[kLanes];     // by what, in each row
};

// The compiler keeps accumulators in registers only where loops over them are unrolled.
#define BATON_UNROLL _Pragma("GCC unroll 8")

// body<Count>() for Count = count, at least 1, but at most Most.
template <int Most, typename Body>
inline __attribute__((always_inline)) void with_count(i64 count, Body&& body) {
  if constexpr (Most > 1)
    if (count < Most) return with_count<Most - 1>(count, body);
  body.template operator()<Most>();
}

// acc[r][v] += row(r) . column(v); the fewer stay in registers, the others are read as they are needed.
template <int Rows, int Vectors, typename Row, typename Column>
inline __attribute__((always_inline)) void multiply_add(Row row, Column column, F32 (&acc)[Rows][Vectors]) {
  if constexpr (Rows < Vectors) {
    Pairs rows[Rows];
    BATON_UNROLL for (int r = 0; r < Rows; ++r) rows[r] = row(r);
    BATON_UNROLL for (int v = 0; v < Vectors; ++v) {
      const Pairs values = column(v);
      BATON_UNROLL for (int r = 0; r < Rows; ++r) acc[r][v] = dot_pairs(acc[r][v], rows[r], values);
    }
  } else {
    Pairs columns[Vectors];
    BATON_UNROLL for (int v = 0; v < Vectors; ++v) columns[v] = column(v);
    BATON_UNROLL for (int r = 0; r < Rows; ++r) {
      const Pairs values = row(r);
      BATON_UNROLL for (int v = 0; v < Vectors; ++v) acc[r][v] = dot_pairs(acc[r][v], values, columns[v]);
    }
  }
}

// scores[r][part + v] = query r . keys of part + v. Not inlined, nor are others below: the registers are all theirs.
// `ahead` (may be null) is brought into the second-level cache meanwhile.
template <int Rows, int Vectors>
__attribute__((noinline)) void score_parts(const Head& head, i64 row, int part, const KeyTile& tile,
                                           const KeyTile* ahead, F32 (&scores)[Rows][kParts]) {
  const bf16* query = head.query + row * head.head_dim;
  F32 acc[Rows][Vectors];
  BATON_UNROLL for (int r = 0; r < Rows; ++r)
    BATON_UNROLL for (int v = 0; v < Vectors; ++v) acc[r][v] = zero();
  for (i64 i = 0; i < head.head_dim; i += 2) {
    multiply_add([&](int r) { return broadcast_pair(read_pair(query + r * head.head_dim + i)); },
                 [&](int v) { return load_pairs(tile.keys[part + v] + i * kTileTokens); }, acc);
    if (ahead)
      BATON_UNROLL for (int v = 0; v < Vectors; ++v) prefetch(ahead->keys[part + v] + i * kTileTokens);
  }
  BATON_UNROLL for (int r = 0; r < Rows; ++r)
    BATON_UNROLL for (int v = 0; v < Vectors; ++v) scores[r][part + v] = acc[r][v];
}

// Only of parts that any row sees.
template <int Rows>
void score(const Head& head, const Chunk& chunk, const KeyTile& tile, const KeyTile* ahead,
           F32 (&scores)[Rows][kParts]) {
  for (int part = 0; part < chunk.parts; part += kWidth<Rows>)
    with_count<kWidth<Rows>>(chunk.parts - part, [&]<int Vectors>() {
      score_parts<Rows, Vectors>(head, chunk.row, part, tile, ahead, scores);
    });
}

// What a row does not see has the score -infinity.
template <int Rows>
void mask(const Chunk& chunk, F32 (&scores)[Rows][kParts]) {
  for (int r = 0; r < Rows; ++r)
    for (int part = 0; part < kParts; ++part) {
      const i64 count = std::clamp<i64>(chunk.visible[r] - part * kTileTokens, 0, kTileTokens);
      scores[r][part] = keep_first(scores[r][part], count, -kInfinity);
    }
}

// Moves the shifts of rows that have a score beyond their limit; highest[r]: the greatest of every sixteenth score.
template <int Rows>
void follow(const Head& head, Chunk& chunk, const F32 (&highest)[Rows]) {
  float* limit = head.limit + chunk.row;
  float* shift = head.shift + chunk.row;
  bool moves[Rows], any = false;
  for (int r = 0; r < Rows; ++r) {
    moves[r] = greater(highest[r], broadcast(limit[r])) != 0;
    any |= moves[r];
  }
  chunk.decays = any && !head.first;
  if (!any) return;
  float before[kLanes] = {}, after[kLanes] = {};
  for (int r = 0; r < Rows; ++r) {
    before[r] = shift[r];
    if (moves[r]) {
      const float maximum = max_lanes(highest[r]);
      limit[r] = maximum + kSlack / head.scale;
      shift[r] = -maximum * head.scale;
    }
    after[r] = shift[r];
  }
  store(chunk.decay, exp2_for_bf16(sub(load(after), load(before))));  // 1 for rows that stay
}

// Turns scores into weights, 0 for keys that a row does not see, and adds them up.
template <int Rows>
__attribute__((noinline)) void weigh(const Head& head, Chunk& chunk, F32 (&scores)[Rows][kParts]) {
  const i64 lines = (chunk.parts + 1) / 2;
  if (chunk.visible[0] < kKeyTile) mask<Rows>(chunk, scores);
  F32 highest[Rows];
  for (int r = 0; r < Rows; ++r) {
    highest[r] = max(scores[r][0], scores[r][1]);
    if (lines > 1) highest[r] = max(highest[r], max(scores[r][2], scores[r][3]));
  }
  follow<Rows>(head, chunk, highest);
  const F32 scale = broadcast(head.scale);
  const Pairs ones = broadcast_pair(0x3F803F80);
  bf16* weights = head.weights + chunk.row * kKeyTile;
  float* total = head.total + chunk.row * kLanes;
  for (int r = 0; r < Rows; ++r) {
    const F32 shift = broadcast(head.shift[chunk.row + r]);
    F32 sum = head.first ? zero() : load(total + r * kLanes);
    if (chunk.decays) sum = mul(sum, broadcast(chunk.decay[r]));
    for (i64 line = 0; line < lines; ++line) {
      const Pairs pairs = round_to_pairs(exp2_for_bf16(fma(scores[r][line * 2], scale, shift)),
                                         exp2_for_bf16(fma(scores[r][line * 2 + 1], scale, shift)));
      store_pairs(weights + r * kKeyTile + line * kLanes * 2, pairs);
      sum = dot_pairs(sum, pairs, ones);
    }
    store(total + r * kLanes, sum);
  }
}

// sums = sums * decay + weights . values, from `column` on, of pairs of keys that all rows see.
template <int Rows, int Vectors>
__attribute__((noinline)) void add_columns(const Head& head, const Chunk& chunk, i64 column, const KeyTile& tile,
                                           const KeyTile* ahead) {
  const bf16* weights = head.weights + chunk.row * kKeyTile;
  float* sums = head.sum(chunk.row, column);
  F32 acc[Rows][Vectors];
  BATON_UNROLL for (int r = 0; r < Rows; ++r)
    BATON_UNROLL for (int v = 0; v < Vectors; ++v)
      acc[r][v] = head.first ? zero() : load(sums + r * kColumns + v * kLanes);
  if (chunk.decays)
    BATON_UNROLL for (int r = 0; r < Rows; ++r)
      BATON_UNROLL for (int v = 0; v < Vectors; ++v) acc[r][v] = mul(acc[r][v], broadcast(chunk.decay[r]));
  const i64 pairs = chunk.visible[0] / 2;
  for (i64 i = 0; i < pairs; ++i) {
    const i64 part = i / (kTileTokens / 2), place = (i % (kTileTokens / 2) * head.head_dim + column) * 2;
    const bf16* lines = tile.values[part] + place;
    multiply_add([&](int r) { return broadcast_pair(read_pair(weights + r * kKeyTile + i * 2)); },
                 [&](int v) { return load_pairs(lines + v * kLanes * 2); }, acc);
    if (ahead)
      BATON_UNROLL for (int v = 0; v < Vectors; ++v) prefetch(ahead->values[part] + place + v * kLanes * 2);
  }
  BATON_UNROLL for (int r = 0; r < Rows; ++r)
    BATON_UNROLL for (int v = 0; v < Vectors; ++v) store(sums + r * kColumns + v * kLanes, acc[r][v]);
}

// The same of what each row sees beyond them.
inline void add_own(const Head& head, const Chunk& chunk, const KeyTile& tile) {
  for (i64 r = 0; r < chunk.rows; ++r)
    for (i64 key = chunk.visible[0] / 2 * 2; key < chunk.visible[r]; key += 2) {
      const Pairs weight = broadcast_pair(read_pair(head.weights + (chunk.row + r) * kKeyTile + key));
      const bf16* lines = tile.values[key / kTileTokens] + key % kTileTokens / 2 * head.head_dim * 2;
      const bool whole = key + 1 < chunk.visible[r];
      for (i64 column = 0; column < head.head_dim; column += kColumns) {
        float* sum = head.sum(chunk.row + r, column);
        const i64 columns = std::min<i64>(kColumns, head.head_dim - column);
        for (i64 i = 0; i < columns; i += kLanes) {
          const Pairs values = load_pairs(lines + (column + i) * 2);
          store(sum + i, dot_pairs(load(sum + i), weight, whole ? values : even_half(values)));
        }
      }
    }
}

template <int Rows>
void add_values(const Head& head, const Chunk& chunk, const KeyTile& tile, const KeyTile* ahead) {
  for (i64 column = 0; column < head.head_dim; column += kWidth<Rows> * kLanes)
    with_count<kWidth<Rows>>((head.head_dim - column) / kLanes, [&]<int Vectors>() {
      add_columns<Rows, Vectors>(head, chunk, column, tile, ahead);
    });
  if (chunk.visible[0] < kKeyTile) add_own(head, chunk, tile);
}

}  // namespace baton
