// The inputs of one attention call, its items of work, and the slots of a context's tokens.

#ifndef ENGINE_NATIVE_PROBLEM_H_
#define ENGINE_NATIVE_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "softmax.h"

namespace engine {

constexpr int kMostBlock = 64;  // context tokens that are computed together

// Arrays and sizes of a call; strides in elements.
struct Problem {
  Float token_type;
  const void* q;  // [tokens, q_heads, head_dim]
  void* out;      // same shape and dtype as q
  float* lse;     // [tokens, q_heads], natural log, or null
  const void* cache;
  const float* scales;  // [pool_pages, scale_stride], of a scaled type: by fused row, then by token of the page
  const float* sinks;  // [q_heads], or null
  int64_t pool_pages, page_size;
  int q_heads, kv_heads, head_dim;
  int codes;  // in an element of the cache
  size_t slot_stride, row_stride, scale_stride;
  float q_scale;  // factor from q.k to the base-2 logit, or with a soft cap to the argument of its tanh
  float cap;      // soft cap of the base-2 logit; 0 is none
  int window;     // number of tokens that a query sees, itself included

  int group() const { return q_heads / kv_heads; }
  int padded_dim() const { return RoundUp(head_dim, kLanes); }
};

// One sequence's new tokens and context. Where its context is split, each split stores its part of the softmax here.
struct Sequence {
  const int32_t* pages;
  int first_token, q_len, kv_len;
  int splits = 1;
  RowState* states = nullptr;  // [splits, q_len * q_heads]
  float* sums = nullptr;       // [splits, q_len * q_heads, padded_dim]

  int first_position() const { return kv_len - q_len; }
};

// An item of work: some queries of a sequence and a part of its context, for one KV head or (decode) for all heads.
struct Item {
  const Sequence* sequence;
  int first_query, queries;
  int head;  // -1: all heads
  int begin, end;
  int split;
};

// A buffer of floats of the calling thread, aligned to vectors; invalid once the thread makes another one.
class Scratch {
 public:
  explicit Scratch(size_t floats) {
    static thread_local std::vector<float> memory;
    constexpr size_t kSlack = 16 * kLanes;
    if (memory.size() < floats + kSlack) memory.resize(floats + kSlack);
    next_ = memory.data() + kLanes - reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % kLanes;
  }

  float* Take(size_t floats) {
    float* taken = next_;
    next_ += (floats + kLanes - 1) / kLanes * kLanes;
    return taken;
  }

 private:
  float* next_;
};

// Finds the slots of context positions [begin, end): rows[i] points to the slot of begin + i. K of KV head h is its row
// 2h and V its row 2h + 1 (engine/kv/layout.py).
template <class T>
void FindSlots(const Problem& problem, const int32_t* pages, int begin, int end, const T** slots) {
  for (int position = begin; position < end;) {
    const int64_t page = std::clamp<int64_t>(pages[position / problem.page_size], 0, problem.pool_pages - 1);
    int64_t offset = position % problem.page_size;
    const T* slot = static_cast<const T*>(problem.cache) + (page * problem.page_size + offset) * problem.slot_stride;
    for (; offset < problem.page_size && position < end; ++offset, ++position, slot += problem.slot_stride) {
      *slots++ = slot;
    }
  }
}

// The scales of a part of a context, where the storage type has scales.
class Scales {
 public:
  void Find(const Problem& problem, const int32_t* pages, int begin, int end) {
    count_ = 0;
    page_size_ = problem.page_size;
    for (int position = begin; position < end;) {
      const int64_t page = std::clamp<int64_t>(pages[position / problem.page_size], 0, problem.pool_pages - 1);
      const int64_t offset = position % problem.page_size;
      const int length = std::min<int64_t>(problem.page_size - offset, end - position);
      runs_[count_++] = {problem.scales + page * problem.scale_stride + offset, length};
      position += length;
    }
  }

  // Asks for those of fused rows [0, rows).
  void Prefetch(int rows) const {
    for (int run = 0; run < count_; ++run) {
      for (int row = 0; row < rows; ++row) {
        const char* from = reinterpret_cast<const char*>(runs_[run].from + row * page_size_);
        for (int byte = 0; byte < int(runs_[run].length * sizeof(float)); byte += 64) __builtin_prefetch(from + byte, 0, 2);
      }
    }
  }

  // Copies those of a fused row to `scales`.
  void Gather(int row, float* scales) const {
    for (int run = 0; run < count_; ++run) {
      const float* from = runs_[run].from + row * page_size_;
      int i = 0;
      for (; i + kLanes <= runs_[run].length; i += kLanes) Store(scales + i, Load(from + i));
      for (; i < runs_[run].length; ++i) scales[i] = from[i];
      scales += i;
    }
  }

 private:
  struct Run {  // of one page
    const float* from;
    int length;
  };

  Run runs_[kMostBlock];
  int count_ = 0;
  int64_t page_size_ = 0;
};

// Loads a query, multiplies it with `scale`, and stores it in a row of padded_dim floats.
inline void LoadQuery(const Problem& problem, int token, int head, float scale, float* row) {
  WithType(problem.token_type, [&](auto element) {
    const size_t at = (static_cast<size_t>(token) * problem.q_heads + head) * problem.head_dim;
    const auto* from = static_cast<const decltype(element)*>(problem.q) + at;
    for (int d = 0; d < problem.head_dim; d += kLanes) {
      const int left = problem.head_dim - d;
      Store(row + d, scale * (left < kLanes ? LoadSome(from + d, left) : Load(from + d)));
    }
  });
}

// Writes a row's summed values divided by the softmax denominator to the output; first merges `parts` partial sums.
inline void Finish(const Problem& problem, int token, int head, int parts, size_t rows, RowState* states, float* sums) {
  const int dim = problem.padded_dim();
  const RowState whole = Merge(parts, rows, dim, problem.sinks ? &problem.sinks[head] : nullptr, states, sums);
  // A row without visible keys has total 0: its output is 0, its log-sum-exp -inf.
  const float inverse = whole.total > 0 ? 1.0f / whole.total : 0.0f;
  if (problem.lse != nullptr) {
    problem.lse[static_cast<size_t>(token) * problem.q_heads + head] =
        (whole.peak + std::log2(whole.total)) / kLog2E;
  }
  WithType(problem.token_type, [&](auto element) {
    const size_t at = (static_cast<size_t>(token) * problem.q_heads + head) * problem.head_dim;
    auto* out = static_cast<decltype(element)*>(problem.out) + at;
    for (int d = 0; d < problem.head_dim; d += kLanes) {
      const int left = problem.head_dim - d;
      const Vec value = inverse * Load(sums + d);
      left < kLanes ? StoreSome(out + d, value, left) : Store(out + d, value);
    }
  });
}

// Stores an item's result for one query row: the output, or the partial result of its split.
inline void Deliver(const Problem& problem, const Item& item, int query, int head, RowState state, float* sum) {
  const Sequence& sequence = *item.sequence;
  if (sequence.splits == 1) {
    Finish(problem, sequence.first_token + query, head, 1, 0, &state, sum);
    return;
  }
  const size_t row = (static_cast<size_t>(item.split) * sequence.q_len + query) * problem.q_heads + head;
  sequence.states[row] = state;
  std::copy_n(sum, problem.padded_dim(), sequence.sums + row * problem.padded_dim());
}

}  // namespace engine

#endif  // ENGINE_NATIVE_PROBLEM_H_
