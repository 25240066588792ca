// Online softmax of one query row, in base 2: FlashAttention-2 (arXiv 2307.08691), with the merge of Flash-Decoding.

#ifndef ENGINE_NATIVE_SOFTMAX_H_
#define ENGINE_NATIVE_SOFTMAX_H_

#include <cstddef>
#include <limits>

#include "vectors.h"

namespace engine {

constexpr float kLog2E = 1.4426950408889634f;

// The largest logit so far, and the sum of 2 ** (logit - peak).
struct RowState {
  float peak = -std::numeric_limits<float>::infinity();
  float total = 0;
};

// A row without visible keys has peak -inf, and -inf - -inf is NaN.
inline float Base(float peak) { return peak == -std::numeric_limits<float>::infinity() ? 0.0f : peak; }

inline Vec Base(Vec peak) { return peak == -std::numeric_limits<float>::infinity() ? Vec{} : peak; }

inline void Scale(float* row, int dim, float factor) {
  for (int d = 0; d < dim; d += kLanes) Store(row + d, Load(row + d) * factor);
}

// Turns `count` (a multiple of kLanes) logits into weights in place, of which [first, last) are visible, and updates
// `state`. Returns the factor by which the earlier sums must be multiplied.
inline float Fold(float* logits, int count, int first, int last, float cap, RowState& state) {
  const Vec unseen = Splat(-std::numeric_limits<float>::infinity());
  const IntVec lanes = LaneIndices();
  const bool all_seen = first <= 0 && last >= count;
  Vec most = Splat(state.peak);
  for (int i = 0; i < count; i += kLanes) {
    Vec logit = Load(logits + i);
    if (cap != 0) logit = cap * Tanh(logit);
    if (!all_seen) {
      logit = lanes + i < last ? logit : unseen;
      logit = lanes + i >= first ? logit : unseen;
    }
    most = most < logit ? logit : most;
    Store(logits + i, logit);
  }
  const float peak = MaxLanes(most);
  Vec sum{};
  for (int i = 0; i < count; i += kLanes) {
    const Vec weight = Exp2(Load(logits + i) - Base(peak));
    Store(logits + i, weight);
    sum += weight;
  }
  const float decay = peak == state.peak ? 1.0f : Exp2(state.peak - Base(peak));
  state = {peak, state.total * decay + SumLanes(sum)};
  return decay;
}

// Merges `parts` partial results of one row, in order, into the first of the sums, and returns the state of the whole
// row. States are [parts, rows], sums [parts, rows, dim]; `sink` is an extra logit without a value.
inline RowState Merge(int parts, size_t rows, int dim, const float* sink, const RowState* states, float* sums) {
  float peak = sink ? *sink * kLog2E : -std::numeric_limits<float>::infinity();
  for (int part = 0; part < parts; ++part) peak = peak < states[part * rows].peak ? states[part * rows].peak : peak;
  float total = sink ? Exp2(*sink * kLog2E - Base(peak)) : 0.0f;
  for (int part = 0; part < parts; ++part) {
    const float weight = Exp2(states[part * rows].peak - Base(peak));
    total += weight * states[part * rows].total;
    float* sum = sums + part * rows * dim;
    Scale(sum, dim, weight);
    if (part == 0) continue;
    for (int d = 0; d < dim; d += kLanes) Store(sums + d, Load(sums + d) + Load(sum + d));
  }
  return {peak, total};
}

}  // namespace engine

#endif  // ENGINE_NATIVE_SOFTMAX_H_
