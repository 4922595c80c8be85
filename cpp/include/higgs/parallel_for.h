// The core's own thread pool.
#pragma once

#include <cstdint>
#include <functional>

namespace higgs {

// Number of threads used by the library; at first the number of CPUs this process may run on.
[[nodiscard]] int num_threads() noexcept;
void set_num_threads(int threads);  // Error(invalid_argument) unless 1 <= threads <= 1024

// Calls body(begin, end) for disjoint ranges that cover [0, count), each at most `grain` long, from up to num_threads()
// threads; one job has the threads at a time, and calls made meanwhile (nested, or by other threads) run on their
// calling thread. The first exception thrown by body is rethrown.
void parallel_for(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& body);

}  // namespace higgs
