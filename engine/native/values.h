// Weighted sums of the values of a block, for up to four query rows of one KV head.

#ifndef ENGINE_NATIVE_VALUES_H_
#define ENGINE_NATIVE_VALUES_H_

#include "prefetch.h"
#include "problem.h"

namespace engine {

// Values become float32 as they are loaded: for every type, on every processor.
template <class T>
class WideValues {
 public:
  WideValues(const Problem& problem, Scratch&) : dim_(problem.head_dim) {}

  static size_t Floats(const Problem&) { return 0; }

  // Adds the values of `count` slots, weighted with tiles of Rows rows, to `sums` times `decay`.
  template <int Rows>
  void Add(const T* const* slots, size_t value, int count, const Vec* tiles, Vec decay, float* sums,
           Prefetch& prefetch) const {
    int d = 0;
    for (; d + kStripVectors * kLanes <= dim_; d += kStripVectors * kLanes) {
      AddStrip<Rows, kStripVectors>(slots, value, count, tiles, decay, d, sums, prefetch);
    }
    for (; d < dim_; d += kLanes) AddStrip<Rows, 1>(slots, value, count, tiles, decay, d, sums, prefetch);
  }

  // What the steps for a tile of weights cost together, in the unit of the dots.
  static int Cost(const Problem& problem) {
    const int vectors = problem.head_dim / kLanes;
    return kCost * (vectors / kStripVectors + vectors % kStripVectors);
  }

  // Brings the sums of a row into the order of head_dim.
  void Order(float*) const {}

 private:
  template <int Rows, int Vectors>
  [[gnu::noinline]] void AddStrip(const T* const* slots, size_t value, int count, const Vec* tiles, Vec decay, int d, float* sums,
                Prefetch& prefetch) const {
    const float* weights = reinterpret_cast<const float*>(tiles);
    Vec sum[Rows][Vectors];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Load(sums + r * dim_ + d + v * kLanes) * decay[r];
    }
    for (int t = 0; t < count; t += kTileColumns, weights += kLanes) {
      prefetch.Step(kCost);
      for (int i = 0; i < kTileColumns && t + i < count; ++i) {
        Vec right[Vectors];
        LoadVectors(slots[t + i] + value, d, dim_, right);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) sum[r][v] += weights[i * kTileRows + r] * right[v];
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) Store(sums + r * dim_ + d + v * kLanes, sum[r][v]);
    }
  }

  static constexpr int kStripVectors = 4;  // vectors of a value that are summed together
  static constexpr int kCost = 4;

  int dim_;
};

}  // namespace engine

#endif  // ENGINE_NATIVE_VALUES_H_
