// Attention of one new token to a part of its sequence's context, all KV heads together: each slot is read whole, once.

#ifndef ENGINE_NATIVE_DECODE_H_
#define ENGINE_NATIVE_DECODE_H_

#include "matmul.h"
#include "problem.h"

namespace engine {

constexpr int kDecodeBlock = 32;                      // context tokens between two rescalings
constexpr int kDecodeRows = 4;                        // query rows that share each loaded key
constexpr int kDecodeTokens = kLanes / kDecodeRows;   // keys that share each loaded query
constexpr int kMostDecodeGroup = 2 * kDecodeRows;     // larger groups gain from repacked keys

// logits[r * kDecodeBlock + t] = q[r] . key[t] for kDecodeRows rows; prefetches the same part of `next` meanwhile.
template <class T>
void DotBlock(const T* const* slots, const T* const* next, size_t key, size_t pair_bytes, int count, const float* q,
              int dim, float* logits) {
  for (int t = 0; t < count; t += kDecodeTokens) {
    for (int i = 0; next != nullptr && i < kDecodeTokens; ++i) {
      const char* from = reinterpret_cast<const char*>(next[t + i] + key);
      for (size_t byte = 0; byte < pair_bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
    }
    Vec sum[kLanes] = {};
    for (int d = 0; d < dim; d += kLanes) {
      Vec query[kDecodeRows];
      for (int r = 0; r < kDecodeRows; ++r) query[r] = Load(q + r * dim + d);
#pragma GCC unroll 4
      for (int i = 0; i < kDecodeTokens; ++i) {
        const Vec keys = Load(slots[t + i] + key + d);
#pragma GCC unroll 4
        for (int r = 0; r < kDecodeRows; ++r) sum[r * kDecodeTokens + i] += keys * query[r];
      }
    }
    const Vec dots = SumEach(sum);
    for (int r = 0; r < kDecodeRows; ++r) {
      std::memcpy(logits + r * kDecodeBlock + t, reinterpret_cast<const float*>(&dots) + r * kDecodeTokens,
                  kDecodeTokens * sizeof(float));
    }
  }
}

// Slots of a block; the entries after the last slot repeat the first slot, so that keys are read in whole groups.
template <class T>
struct SlotBlock {
  const T* slots[kDecodeBlock];
  int count;

  void Find(const Problem& problem, const Item& item, int begin) {
    count = std::clamp(item.end - begin, 0, kDecodeBlock);
    FindSlots(problem, item.sequence->pages, begin, begin + count, slots);
    std::fill(slots + count, slots + kDecodeBlock, slots[0]);
  }
};

template <class T>
void Decode(const Problem& problem, const Item& item) {
  const int dim = problem.head_dim, group = problem.group(), heads = problem.kv_heads;
  const int padded_group = RoundUp(group, kDecodeRows);
  Scratch scratch(static_cast<size_t>(2) * heads * padded_group * dim + kDecodeRows * kDecodeBlock);
  float* q = scratch.Take(static_cast<size_t>(heads) * padded_group * dim);
  float* sums = scratch.Take(static_cast<size_t>(heads) * group * dim);
  float* logits = scratch.Take(kDecodeRows * kDecodeBlock);
  std::fill_n(q, static_cast<size_t>(heads) * padded_group * dim, 0.0f);
  std::fill_n(sums, static_cast<size_t>(heads) * group * dim, 0.0f);
  std::vector<RowState> states(problem.q_heads);
  for (int head = 0; head < problem.q_heads; ++head) {
    LoadQuery(problem, item.sequence->first_token, head, q + (head / group * padded_group + head % group) * dim);
  }
  SlotBlock<T> block, next;
  next.Find(problem, item, item.begin);
  for (int begin = item.begin; begin < item.end; begin += kDecodeBlock) {
    block = next;
    next.Find(problem, item, begin + kDecodeBlock);
    for (int row = 0; row < heads * padded_group; row += kDecodeRows) {
      const int h = row / padded_group, g = row % padded_group;
      const int rows = std::min(kDecodeRows, group - g), first = h * group + g;
      const size_t key = 2 * h * problem.row_stride;
      const bool fetch = g == 0 && next.count != 0;
      DotBlock(block.slots, fetch ? next.slots : nullptr, key, 2 * problem.row_stride * sizeof(T), block.count,
               q + row * dim, dim, logits);
      for (int r = 0; r < rows; ++r) {
        const float decay = Fold(logits + r * kDecodeBlock, RoundUp(block.count, kLanes), 0, block.count, problem.cap,
                                 states[first + r]);
        if (decay != 1) Scale(sums + (first + r) * dim, dim, decay);
      }
      const Product product{logits, kDecodeBlock, sums + first * dim, static_cast<size_t>(dim), rows, block.count};
      Multiply(product, Scattered<T>{block.slots, key + problem.row_stride}, dim, true);
    }
  }
  for (int head = 0; head < problem.q_heads; ++head) Deliver(problem, item, 0, head, states[head], sums + head * dim);
}

}  // namespace engine

#endif  // ENGINE_NATIVE_DECODE_H_
