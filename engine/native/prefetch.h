// Reads slots ahead of their use.

#ifndef ENGINE_NATIVE_PREFETCH_H_
#define ENGINE_NATIVE_PREFETCH_H_

#include <cstddef>

namespace engine {

// Brings slots into the second-level cache in the order of their addresses, some lines at each step, so that memory is
// busy while a block is computed.
class Prefetch {
 public:
  // `cost` is that of all steps together, in any unit.
  Prefetch(const void* const* slots, int count, size_t slot_bytes, int cost)
      : slots_(slots), count_(count), bytes_(slot_bytes), share_(int(count * slot_bytes / 64 * kLine / cost) + 1) {}

  void Step(int cost) {
    for (due_ += cost * share_; due_ >= kLine && slot_ < count_; due_ -= kLine) {
      __builtin_prefetch(static_cast<const char*>(slots_[slot_]) + at_, 0, 2);
      at_ += 64;
      if (at_ >= bytes_) at_ = 0, ++slot_;
    }
  }

 private:
  static constexpr int kLine = 1 << 8;

  const void* const* slots_;
  int count_, slot_ = 0;
  size_t bytes_, at_ = 0;
  int share_, due_ = 0;  // in parts of a line
};

}  // namespace engine

#endif  // ENGINE_NATIVE_PREFETCH_H_
