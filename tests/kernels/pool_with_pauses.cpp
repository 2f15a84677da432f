// Loops of the pool in which threads pause for a random time before each load and store of what they share, so that they
// meet each other in states that otherwise last nanoseconds. Exits with 1 if a task is not run exactly once.

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <thread>

inline void pause_somewhat() {
  thread_local std::uint64_t random = reinterpret_cast<std::uintptr_t>(&random);
  random = random * 6364136223846793005 + 1442695040888963407;  // Knuth's MMIX
  for (std::uint64_t i = random >> 58; i > 0; --i) _mm_pause();
}

namespace std {

template <typename T>
struct slow_atomic : atomic<T> {
  using atomic<T>::atomic;
  void store(T value, memory_order order) {
    pause_somewhat();
    atomic<T>::store(value, order);
  }
  T load(memory_order order) const {
    pause_somewhat();
    return atomic<T>::load(order);
  }
};

}  // namespace std

#define atomic slow_atomic
#include "parallel.h"
#undef atomic

int main() {
  constexpr int kThreads = 3, kLoops = 8000, kMost = 16;
  for (int loop = 0; loop < kLoops; ++loop) {
    std::atomic<int> ran[kMost] = {};
    const int tasks = loop % 2 ? kMost : 2;
    baton::parallel_for(tasks, kThreads, [&](std::int64_t task) { ran[task].fetch_add(1); });
    for (int task = 0; task < kMost; ++task)
      if (const int times = ran[task]; times != (task < tasks)) {
        std::printf("task %d of %d ran %d times in loop %d\n", task, tasks, times, loop);
        return 1;
      }
  }
}
