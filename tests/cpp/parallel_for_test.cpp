#include "higgs/parallel_for.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>

#include "helpers.h"

namespace higgs {
namespace {

using test::expect_error;
using test::ThreadsGuard;

std::int64_t sum_to(std::int64_t count, std::int64_t grain) {
  std::atomic<std::int64_t> sum{0};
  parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) sum.fetch_add(i, std::memory_order_relaxed);
  });
  return sum.load();
}

TEST(ParallelFor, CoversEveryElementOnceInRangesOfAtMostTheGrain) {
  for (const int threads : {1, 2, 3, 8}) {
    const ThreadsGuard guard(threads);
    for (const std::int64_t count : {1, 2, 7, 64, 1000}) {
      for (const std::int64_t grain : {-1, 0, 1, 3, 64, 5000}) {
        std::vector<std::atomic<int>> visits(static_cast<std::size_t>(count));
        std::atomic<bool> legal{true};
        parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
          if (begin < 0 || begin >= end || end > count || end - begin > std::max<std::int64_t>(1, grain)) legal = false;
          for (std::int64_t i = begin; i < end; ++i) visits[static_cast<std::size_t>(i)].fetch_add(1);
        });
        EXPECT_TRUE(legal.load()) << threads << " " << count << " " << grain;
        for (const std::atomic<int>& v : visits) ASSERT_EQ(v.load(), 1) << threads << " " << count << " " << grain;
      }
    }
  }
}

TEST(ParallelFor, NothingToDoCallsNothing) {
  for (const std::int64_t count : {std::int64_t{0}, std::int64_t{-5}}) {
    parallel_for(count, 1, [](std::int64_t, std::int64_t) { FAIL() << "called"; });
  }
}

// Two chunks that wait for each other finish only if two threads run at once.
TEST(ParallelFor, RunsOnSeveralThreads) {
  const ThreadsGuard guard(2);
  std::atomic<int> arrived{0};
  std::atomic<int> met{0};
  std::mutex mutex;
  std::set<std::thread::id> ids;
  parallel_for(2, 1, [&](std::int64_t, std::int64_t) {
    {
      const std::lock_guard lock(mutex);
      ids.insert(std::this_thread::get_id());
    }
    arrived.fetch_add(1);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (arrived.load() < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    if (arrived.load() == 2) met.fetch_add(1);
  });
  EXPECT_EQ(met.load(), 2);
  EXPECT_EQ(ids.size(), 2u);
  EXPECT_TRUE(ids.contains(std::this_thread::get_id())) << "the caller does its share";
}

TEST(ParallelFor, OneThreadIsTheCaller) {
  const ThreadsGuard guard(1);
  parallel_for(100, 1, [caller = std::this_thread::get_id()](std::int64_t, std::int64_t) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
  });
}

TEST(ParallelFor, RethrowsAndWorksAfterwards) {
  for (const int threads : {1, 3}) {
    const ThreadsGuard guard(threads);
    for (const std::int64_t bad : {0, 50, 99}) {
      std::atomic<int> calls{0};
      try {
        parallel_for(100, 1, [&](std::int64_t begin, std::int64_t) {
          calls.fetch_add(1);
          if (begin == bad) throw std::out_of_range("element " + std::to_string(begin));
        });
        ADD_FAILURE() << "no exception";
      } catch (const std::out_of_range& e) {
        EXPECT_EQ(std::string(e.what()), "element " + std::to_string(bad));
      }
      EXPECT_LE(calls.load(), 100);
      EXPECT_EQ(sum_to(1000, 7), 499500);
    }
  }
}

TEST(ParallelFor, EveryChunkThrowing) {
  const ThreadsGuard guard(3);
  for (int trial = 0; trial < 200; ++trial) {
    EXPECT_THROW(parallel_for(10, 1, [](std::int64_t, std::int64_t) { throw std::runtime_error("no"); }),
                 std::runtime_error);
  }
}

TEST(ParallelFor, NestedCallsRunOnTheCallingThread) {
  const ThreadsGuard guard(3);
  std::atomic<std::int64_t> sum{0};
  std::atomic<bool> moved{false};
  parallel_for(20, 1, [&](std::int64_t outer, std::int64_t) {
    const auto me = std::this_thread::get_id();
    parallel_for(10, 1, [&](std::int64_t inner, std::int64_t) {
      if (std::this_thread::get_id() != me) moved = true;
      sum.fetch_add(outer * 10 + inner);
    });
  });
  EXPECT_EQ(sum.load(), 199 * 200 / 2);
  EXPECT_FALSE(moved.load());
}

TEST(ParallelFor, ConcurrentCallers) {
  const ThreadsGuard guard(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&, t] {
      for (int i = 0; i < 300; ++i) {
        const std::int64_t count = 100 + 10 * t + i % 7;
        if (sum_to(count, 3) != count * (count - 1) / 2) wrong.fetch_add(1);
      }
    });
  }
  for (std::thread& c : callers) c.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST(ParallelFor, ThreadCountMayChangeWhileOthersRun) {
  const ThreadsGuard guard(2);
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::thread caller([&] {
    while (!stop.load()) {
      if (sum_to(200, 3) != 19900) wrong.fetch_add(1);
    }
  });
  for (int i = 0; i < 50; ++i) {
    set_num_threads(1 + i % 4);
    if (sum_to(200, 3) != 19900) wrong.fetch_add(1);
  }
  stop = true;
  caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

// The exit status of a child that runs `body`; -1 if it hangs or dies by a signal.
template <typename Body>
int in_child(const Body& body) {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(20);
    _exit(body());
  }
  int status = 0;
  if (pid < 0 || waitpid(pid, &status, 0) != pid) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(ParallelFor, WorksInAForkedChild) {
  const ThreadsGuard guard(3);
  ASSERT_EQ(sum_to(1000, 1), 499500);  // the parent has its workers, the child will not
  EXPECT_EQ(in_child([] { return sum_to(1000, 1) == 499500 ? 7 : 1; }), 7);
  EXPECT_EQ(sum_to(1000, 1), 499500);
}

TEST(ParallelFor, AForkedChildKeepsTheNumberOfThreads) {
  const ThreadsGuard guard(num_threads() + 1);
  EXPECT_EQ(in_child([] { return num_threads(); }), num_threads());
}

// Where the system refuses more threads the work is done by those there are.
TEST(ParallelFor, WorksWithFewerThreadsThanAskedFor) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer needs the address space that this test takes away";
#endif
  EXPECT_EQ(in_child([] {
              const rlimit address_space{std::size_t{1} << 30, std::size_t{1} << 30};  // room for a few stacks
              setrlimit(RLIMIT_AS, &address_space);
              set_num_threads(1024);
              return sum_to(5000, 1) == 12497500 && sum_to(5000, 1) == 12497500 ? 7 : 1;
            }),
            7);
}

TEST(ParallelFor, WorksInAChildForkedWhileAnotherThreadIsInAJob) {
  const ThreadsGuard guard(2);
  std::atomic<bool> started{false};
  std::atomic<bool> finish{false};
  std::thread busy([&] {
    parallel_for(2, 1, [&](std::int64_t, std::int64_t) {
      started = true;
      while (!finish.load()) std::this_thread::yield();
    });
  });
  while (!started.load()) std::this_thread::yield();
  EXPECT_EQ(in_child([] { return sum_to(1000, 1) == 499500 ? 7 : 1; }), 7);
  finish = true;
  busy.join();
}

TEST(ParallelFor, NumThreads) {
  const int before = num_threads();
  EXPECT_GE(before, 1);
  {
    const ThreadsGuard guard(5);
    EXPECT_EQ(num_threads(), 5);
    for (const int bad : {0, -1, 1025}) {
      expect_error(ErrorCode::invalid_argument, {std::to_string(bad), "1 to 1024"}, [&] { set_num_threads(bad); });
      EXPECT_EQ(num_threads(), 5);
    }
  }
  EXPECT_EQ(num_threads(), before);
}

}  // namespace
}  // namespace higgs
