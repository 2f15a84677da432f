// What a thread needs of memory for one task.
#pragma once

#include <new>
#include <vector>

#include "online_softmax.h"

namespace baton {

template <typename T>
struct LineAllocator {
  using value_type = T;

  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}

  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(kLine))); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t(kLine)); }

  friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
};

// Begins with a cache line: vectors that cross lines cost twice as much.
template <typename T>
using Lines = std::vector<T, LineAllocator<T>>;

class Scratch {
 public:
  // For `heads` key-value heads of `rows` rows each.
  void fit(i64 heads, i64 rows, i64 head_dim) {
    rows_ = rows;
    head_dim_ = head_dim;
    query.resize(heads * rows * head_dim);
    keys.resize(kKeyTile * head_dim);
    values.resize(kKeyTile * head_dim);
    chunks.resize((rows + kTileRows - 1) / kTileRows);
    weights_.resize(rows * kKeyTile);
    limit_.assign(heads * rows, -kInfinity);
    shift_.assign(heads * rows, kInfinity);
    total_.resize(heads * rows * kLanes);
    sums_.resize(heads * sums_per_head());
  }

  Head head(i64 index, float scale, bool first) {
    const i64 row = index * rows_;
    return {.head_dim = head_dim_,
            .rows = rows_,
            .scale = scale,
            .first = first,
            .query = query.data() + row * head_dim_,
            .weights = weights_.data(),
            .limit = limit_.data() + row,
            .shift = shift_.data() + row,
            .total = total_.data() + row * kLanes,
            .sums = sums_.data() + index * sums_per_head()};
  }

  Lines<bf16> query;         // [heads][rows][head_dim]
  Lines<bf16> keys, values;  // a tile of a cache that is not tiled
  std::vector<Chunk> chunks;

 private:
  i64 sums_per_head() const { return (head_dim_ + kColumns - 1) / kColumns * rows_ * kColumns; }

  i64 rows_ = 0, head_dim_ = 0;
  Lines<bf16> weights_;
  Lines<float> limit_, shift_, total_, sums_;
};

}  // namespace baton
