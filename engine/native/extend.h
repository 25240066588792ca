// Attention of a tile of one sequence's new tokens to a part of its context, for one KV head: K and V of a block are
// converted and laid out for matrix products once, for all query rows of the tile.

#ifndef ENGINE_NATIVE_EXTEND_H_
#define ENGINE_NATIVE_EXTEND_H_

#include "matmul.h"
#include "problem.h"

namespace engine {

constexpr int kExtendBlock = kMostBlock;  // context tokens
constexpr int kExtendTileRows = 128;  // query rows: tokens times query heads per KV head

// What a loaded number of token `t` is multiplied with.
template <class T>
inline float Factor(const float* scales, int t) {
  return kScaled<T> ? scales[t] : kUnit<T>;
}

// Lays keys out as [padded_dim, kExtendBlock]; columns from `count` to the next whole vector are zero.
template <class T>
void PackKeys(const T* const* slots, size_t key, const float* scales, int count, int dim, float* packed) {
  for (int t = 0; t < count; t += kLanes) {
    for (int d = 0; d < dim; d += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = t + i < count ? LoadPart(slots[t + i] + key, d, dim) * Factor<T>(scales, t + i) : Vec{};
      }
      Transpose(square);
      for (int i = 0; i < kLanes; ++i) Store(packed + (d + i) * kExtendBlock + t, square[i]);
    }
  }
}

// Lays values out as [count, padded_dim].
template <class T>
void PackValues(const T* const* slots, size_t value, const float* scales, int count, int dim, float* packed) {
  for (int t = 0; t < count; ++t) {
    for (int d = 0; d < dim; d += kLanes, packed += kLanes) {
      Store(packed, LoadPart(slots[t] + value, d, dim) * Factor<T>(scales, t));
    }
  }
}

template <class T>
void Extend(const Problem& problem, const Item& item) {
  const int dim = problem.padded_dim(), group = problem.group(), rows = item.queries * group;
  const size_t key = 2 * item.head * problem.row_stride;
  Scratch scratch(static_cast<size_t>(rows) * (2 * dim + kExtendBlock) + 2 * dim * kExtendBlock);
  float* q = scratch.Take(rows * dim);
  float* sums = scratch.Take(rows * dim);
  float* logits = scratch.Take(rows * kExtendBlock);
  float* keys = scratch.Take(dim * kExtendBlock);
  float* values = scratch.Take(dim * kExtendBlock);
  std::vector<RowState> states(rows);
  std::fill_n(sums, rows * dim, 0.0f);
  const int first_token = item.sequence->first_token + item.first_query;
  for (int row = 0; row < rows; ++row) {
    LoadQuery(problem, first_token + row / group, item.head * group + row % group, problem.q_scale, q + row * dim);
  }
  const int first_position = item.sequence->first_position() + item.first_query;
  const T* slots[kExtendBlock];
  float scales[2][kExtendBlock];  // of K and of V, where there are scales
  for (int begin = item.begin; begin < item.end; begin += kExtendBlock) {
    const int count = std::min(kExtendBlock, item.end - begin), columns = RoundUp(count, kLanes);
    FindSlots(problem, item.sequence->pages, begin, begin + count, slots);
    if constexpr (kScaled<T>) {
      Scales found;
      found.Find(problem, item.sequence->pages, begin, begin + count);
      for (int half = 0; half < 2; ++half) found.Gather(2 * item.head + half, scales[half]);
    }
    PackKeys(slots, key, scales[0], count, problem.head_dim, keys);
    Multiply({q, size_t(dim), logits, kExtendBlock, rows, problem.head_dim}, Packed{keys, kExtendBlock}, columns,
             false);
    for (int row = 0; row < rows; ++row) {
      const int position = first_position + row / group;
      const int last = std::min(count, position + 1 - begin), first = position + 1 - problem.window - begin;
      const float decay = Fold(logits + row * kExtendBlock, columns, first, last, problem.cap, states[row]);
      if (decay != 1) Scale(sums + row * dim, dim, decay);
    }
    PackValues(slots, key + problem.row_stride, scales[1], count, problem.head_dim, values);
    Multiply({logits, kExtendBlock, sums, size_t(dim), rows, count}, Packed{values, size_t(dim)}, dim, true);
  }
  for (int row = 0; row < rows; ++row) {
    Deliver(problem, item, item.first_query + row / group, item.head * group + row % group, states[row],
            sums + row * dim);
  }
}

}  // namespace engine

#endif  // ENGINE_NATIVE_EXTEND_H_
