// A loop over tasks, shared by a pool of threads that lives as long as the process.
//
// Unlike an OpenMP region, a loop never waits for a thread that has not begun a task: where cores are shared with other
// processes, a thread may be off its core for milliseconds, many times what a loop takes.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

namespace baton {

class Pool {
 public:
  using Run = void (*)(void* context, std::int64_t task);

  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: its threads sleep in it when the process ends
    return *pool;
  }

  void run(std::int64_t tasks, int threads, void* context, Run run) {
    std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (threads < 2 || tasks < 2 || tasks > kMaxTasks || !lock) {
      for (std::int64_t task = 0; task < tasks; ++task) run(context, task);
      return;
    }
    for (; workers_ < threads - 1; ++workers_) std::thread(&Pool::work, this, workers_).detach();
    context_.store(context, std::memory_order_relaxed);
    run_.store(run, std::memory_order_relaxed);
    tasks_.store(static_cast<std::uint32_t>(tasks), std::memory_order_relaxed);
    threads_.store(threads, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    const std::uint32_t loop = loop_.load(std::memory_order_relaxed) + 1;
    left_.store(static_cast<std::uint64_t>(loop) << 32 | static_cast<std::uint64_t>(tasks), std::memory_order_release);
    loop_.store(loop, std::memory_order_release);
    loop_.notify_all();
    take_tasks(loop);
    wait_while(finished_, [&](std::uint32_t finished) { return finished < tasks; });
  }

 private:
  static constexpr std::int64_t kMaxTasks = 1LL << 31;
  static constexpr int kSpins = 2000;  // some tens of microseconds: the usual pause between two loops of a step

  template <typename Condition>
  static void wait_while(std::atomic<std::uint32_t>& value, Condition condition) {
    for (int i = 0; i < kSpins; ++i) {
      if (!condition(value.load(std::memory_order_acquire))) return;
      _mm_pause();
    }
    for (std::uint32_t seen; condition(seen = value.load(std::memory_order_acquire));) value.wait(seen);
  }

  // `left_` holds (loop, tasks that nobody has taken): a thread that comes late finds another loop there, or no task left,
  // and takes nothing, even while the next loop's fields are being written. Whoever takes a task keeps its loop, and what
  // the other fields say of it, from ending.
  void take_tasks(std::uint32_t loop) {
    std::uint64_t seen = left_.load(std::memory_order_acquire);
    while (seen >> 32 == loop && static_cast<std::uint32_t>(seen) > 0) {
      void* context = context_.load(std::memory_order_acquire);
      const Run run = run_.load(std::memory_order_acquire);
      const std::uint32_t tasks = tasks_.load(std::memory_order_acquire);
      const std::uint32_t task = tasks - static_cast<std::uint32_t>(seen);
      if (!left_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      run(context, task);
      if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) finished_.notify_all();
      seen = left_.load(std::memory_order_acquire);
    }
  }

  void work(int index) {
    std::uint32_t seen = 0;
    while (true) {
      wait_while(loop_, [&](std::uint32_t loop) { return loop == seen; });
      seen = loop_.load(std::memory_order_acquire);
      if (index + 1 < threads_.load(std::memory_order_relaxed)) take_tasks(seen);
    }
  }

  std::mutex busy_;
  int workers_ = 0;
  std::atomic<std::uint64_t> left_{0};
  std::atomic<std::uint32_t> loop_{0}, finished_{0}, tasks_{0};
  std::atomic<void*> context_{nullptr};
  std::atomic<Run> run_{nullptr};
  std::atomic<int> threads_{0};
};

// body(task) for each task in [0, tasks), on up to `threads` threads.
template <typename Body>
void parallel_for(std::int64_t tasks, int threads, Body&& body) {
  Pool::instance().run(tasks, threads, &body,
                       [](void* context, std::int64_t task) { (*static_cast<Body*>(context))(task); });
}

// body(begin, end) over [0, count), cut so that each task has at least `least` of them.
template <typename Body>
void parallel_ranges(std::int64_t count, std::int64_t least, int threads, Body&& body) {
  const std::int64_t most = threads * 4;
  std::int64_t tasks = count / (least < 1 ? 1 : least);
  tasks = tasks < 1 ? 1 : tasks > most ? most : tasks;
  parallel_for(tasks, threads, [&](std::int64_t task) { body(count * task / tasks, count * (task + 1) / tasks); });
}

}  // namespace baton
