#include "cpu/thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

namespace modes {
namespace {

constexpr int32_t kMaxThreads = 1024;

struct Job {
  size_t tasks;
  modes_task task;
  void* state;
  int32_t helpers;  // threads that may still join
  std::atomic<size_t> next{0};

  void work() {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(state, i);
  }
};

class Pool {
 public:
  Pool() : process_(getpid()) {}
  bool alive() const { return process_ == getpid(); }

  void run(int32_t threads, Job* job) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return job->work();
    grow(threads - 1);
    job->helpers = threads - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
    }
    wake_.notify_all();
    job->work();
    // Only threads that joined are waited for: one the system has not woken yet on a busy machine costs nothing.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  void grow(int32_t helpers) {
    try {
      for (; size_ < helpers; ++size_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: the ones there are do the work.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ && job_->helpers > 0 && job_->next.load() < job_->tasks; });
      Job* job = job_;
      --job->helpers;
      ++working_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  const pid_t process_;
  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;   // guarded by mutex_
  int32_t working_ = 0;  // guarded by mutex_
  int32_t size_ = 0;     // guarded by turn_
};

// Never destroyed: its threads may still sleep in it while the process exits. A forked child inherits the pool without
// its threads, so it makes a new one.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load(std::memory_order_acquire);
  while (!found || !found->alive()) {
    Pool* made = new Pool;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

int32_t default_threads() {
  static const int32_t threads = [] {
    const char* text = std::getenv("MODES_NUM_THREADS");
    const long wanted = text ? std::strtol(text, nullptr, 10) : 0;
    const long found = wanted > 0 ? wanted : static_cast<long>(std::thread::hardware_concurrency());
    return static_cast<int32_t>(std::clamp<long>(found, 1, kMaxThreads));
  }();
  return threads;
}

std::atomic<int32_t> chosen_threads{0};

}  // namespace

void pool_run(int32_t threads, size_t tasks, modes_task task, void* state) {
  if (threads <= 0) threads = modes_cpu_threads();
  threads = std::min(threads, kMaxThreads);
  if (tasks < static_cast<size_t>(threads)) threads = static_cast<int32_t>(tasks);
  if (threads <= 1) {
    for (size_t i = 0; i < tasks; ++i) task(state, i);
    return;
  }
  Job job{tasks, task, state, 0};
  pool().run(threads, &job);
}

}  // namespace modes

void modes_cpu_set_threads(int32_t threads) { modes::chosen_threads.store(std::max(threads, 0)); }

int32_t modes_cpu_threads(void) {
  const int32_t chosen = modes::chosen_threads.load();
  return chosen > 0 ? std::min(chosen, modes::kMaxThreads) : modes::default_threads();
}
