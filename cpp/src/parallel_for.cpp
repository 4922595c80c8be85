#include "higgs/parallel_for.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "higgs/error.h"

namespace higgs {
namespace {

int available_cpus() noexcept {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

struct Job {
  std::int64_t count;
  std::int64_t grain;
  const std::function<void(std::int64_t, std::int64_t)>* body;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr exception;

  void run() noexcept {
    for (;;) {
      const std::int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      try {
        (*body)(begin, std::min(count, begin + grain));
      } catch (...) {
        if (!failed.exchange(true)) exception = std::current_exception();
        next.store(count, std::memory_order_relaxed);  // the rest is not wanted any more
      }
    }
  }
};

// Workers wait for a generation number to change: first spinning, because matmuls of one token follow each other within
// microseconds, then asleep.
class Pool {
 public:
  explicit Pool(int workers) : wanted_(workers) {
    try {
      for (int i = 0; i < workers; ++i) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {  // no more threads to be had: do with those there are
    }
  }
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  [[nodiscard]] int wanted() const noexcept { return wanted_; }

  void run(Job& job) {
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.run();
    {
      const std::lock_guard lock(mutex_);  // a worker that wakes up only now finds nothing and is not waited for
      job_ = nullptr;
    }
    while (running_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
  }

 private:
  void work() {
    std::uint64_t seen = 0;
    for (;;) {
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
      while (generation_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < deadline) {
      }
      Job* job = nullptr;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        if (stop_) return;
        seen = generation_.load(std::memory_order_relaxed);
        job = job_;
        if (job == nullptr) continue;
        running_.fetch_add(1, std::memory_order_relaxed);
      }
      job->run();
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int wanted_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> running_{0};
  Job* job_ = nullptr;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

struct State {
  std::mutex mutex;  // held while a job runs
  std::atomic<int> threads{available_cpus()};
  std::unique_ptr<Pool> pool;
};

State*& state_pointer() {
  // Leaked on purpose: worker threads may outlive static destruction, and a forked child starts afresh.
  static State* state = [] {
    pthread_atfork(nullptr, nullptr, [] {
      const int threads = num_threads();
      state_pointer() = new State;
      state_pointer()->threads.store(threads, std::memory_order_relaxed);
    });
    return new State;
  }();
  return state;
}

thread_local bool inside_job = false;

}  // namespace

int num_threads() noexcept { return state_pointer()->threads.load(std::memory_order_relaxed); }

void set_num_threads(int threads) {
  if (threads < 1 || threads > 1024) {
    throw Error(ErrorCode::invalid_argument, "threads " + std::to_string(threads) + " is not supported; use 1 to 1024");
  }
  state_pointer()->threads.store(threads, std::memory_order_relaxed);
}

void parallel_for(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (count <= 0) return;
  State& state = *state_pointer();
  Job job{count, std::max<std::int64_t>(1, grain), &body, {}, {}, nullptr};
  const int workers = num_threads() - 1;
  std::unique_lock lock(state.mutex, std::defer_lock);
  if (workers == 0 || count <= job.grain || inside_job || !lock.try_lock()) {
    job.run();
  } else {
    if (state.pool == nullptr || state.pool->wanted() != workers) {
      state.pool.reset();
      state.pool = std::make_unique<Pool>(workers);
    }
    inside_job = true;
    state.pool->run(job);
    inside_job = false;
  }
  if (job.exception) std::rethrow_exception(job.exception);
}

}  // namespace higgs
