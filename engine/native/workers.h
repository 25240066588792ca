// Runs work on XLA's thread pool and on the calling thread, so a busy pool only costs time.

#ifndef ENGINE_NATIVE_WORKERS_H_
#define ENGINE_NATIVE_WORKERS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace engine {

// Calls work(i) once for each i below `count`, on any thread, and returns when all calls have returned.
template <class Work>
void ForEach(int64_t count, xla::ffi::ThreadPool& pool, const Work& work) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  const auto progress = std::make_shared<Progress>();
  // A helper that starts late finds no work left and must not touch `work`, which no longer exists then.
  const auto help = [progress, count, &work] {
    for (int64_t i; (i = progress->next++) < count;) {
      work(i);
      if (++progress->done == count) {
        std::lock_guard<std::mutex> lock(progress->mutex);
        progress->finished.notify_one();
      }
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([help] { help(); });
  help();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->finished.wait(lock, [&] { return progress->done == count; });
}

}  // namespace engine

#endif  // ENGINE_NATIVE_WORKERS_H_
