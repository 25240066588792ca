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
      : next_(slots), last_(slots + count), bytes_(slot_bytes), share_(int(count * slot_bytes * kPart / cost) + 1) {
    Turn();
  }

  void Step(int cost) {
    due_ += cost * share_;
    const char* at = at_;  // in a register: this loop stands in the innermost ones
    const char* const goal = at + due_ / kPart;
    for (; at < goal && at < end_; at += 64) __builtin_prefetch(at, 0, 2);
    due_ -= int(at - at_) * kPart;
    at_ = at;
    if (at >= end_) Turn();
  }

 private:
  static constexpr int kPart = 16;  // of a byte

  // Goes on to the next slot, or, where there is none, to nowhere.
  void Turn() {
    if (next_ == last_) {
      at_ = end_ = nullptr;
      share_ = due_ = 0;
    } else {
      at_ = static_cast<const char*>(*next_++);
      end_ = at_ + bytes_;
    }
  }

  const void* const* next_;
  const void* const* last_;
  const char *at_ = nullptr, *end_ = nullptr;
  size_t bytes_;
  int share_, due_ = 0;  // in parts of a byte
};

}  // namespace engine

#endif  // ENGINE_NATIVE_PREFETCH_H_
