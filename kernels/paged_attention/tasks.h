// What attention has to do in a step, and how that is shared among threads.
#pragma once

#include <algorithm>
#include <vector>

#include "online_softmax.h"

namespace baton {

constexpr i64 kRowsPerTask = 48;     // (token, query head), which share each key tile in the cache
constexpr i64 kTileBytes = 1 << 18;  // of keys and values that a task works on at a time, a quarter of a usual L2
constexpr i64 kTasksPerThread = 4;   // at least, where heads can be split
constexpr i64 kRangesPerThread = 4;  // of tasks that a thread does one after another
constexpr i64 kTokensPerRead = 4;    // reading keys takes about as long as computing so many tokens

struct Step {
  const bf16* query;
  i64 query_stride;
  const bf16* keys;
  const bf16* values;
  bf16* out;  // [T][heads][head_dim]
  const std::int32_t* starts;
  const std::int32_t* seq_lens;
  const std::int32_t* tables;
  i64 table_width, heads;
  KVLayout layout;
  float scale;

  i64 group() const { return heads / layout.kv_heads; }
};

// Some consecutive tokens of one request, and some key-value heads.
struct Task {
  i64 request, token, tokens, head, heads;
  i64 position;  // of the first token

  i64 end() const { return position + tokens; }  // keys that any row sees
  i64 cost() const { return end() * heads * (tokens + kTokensPerRead); }
};

// A request's few tokens are worked on for many heads at once, a long prefill's for one head.
inline std::vector<Task> split(const Step& step, i64 requests, int threads) {
  const i64 group = step.group(), kv_heads = step.layout.kv_heads;
  const i64 heads_by_size = kTileBytes / (4 * kKeyTile * step.layout.head_dim);
  const i64 parts = kTasksPerThread * threads / std::max<i64>(1, requests) + 1;  // of the heads
  const i64 tokens_per_task = std::max<i64>(1, kRowsPerTask / group);
  std::vector<Task> tasks;
  for (i64 request = 0; request < requests; ++request) {
    const i64 count = step.starts[request + 1] - step.starts[request];
    const i64 position = step.seq_lens[request] - count;
    for (i64 token = 0; token < count; token += tokens_per_task) {
      const i64 tokens = std::min(tokens_per_task, count - token);
      const i64 most = std::min({kRowsPerTask / (tokens * group), heads_by_size, kv_heads / parts});
      const i64 heads = std::max<i64>(1, most);
      for (i64 head = 0; head < kv_heads; head += heads)
        tasks.push_back({request, token, tokens, head, std::min(heads, kv_heads - head), position + token});
    }
  }
  return tasks;
}

// Where ranges of about equal cost end.
inline std::vector<i64> balance(const std::vector<Task>& tasks, int threads) {
  const i64 ranges = kRangesPerThread * threads;
  i64 total = 0, sum = 0;
  for (const Task& task : tasks) total += task.cost();
  std::vector<i64> ends;
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    sum += tasks[i].cost();
    if (sum * ranges >= total * static_cast<i64>(ends.size() + 1)) ends.push_back(i + 1);
  }
  return ends;
}

}  // namespace baton
