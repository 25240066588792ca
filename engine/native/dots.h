// Tiles of logits: four query rows times a few keys, for one KV head. Each class keeps the queries of an item in the form in
// which it multiplies them.

#ifndef ENGINE_NATIVE_DOTS_H_
#define ENGINE_NATIVE_DOTS_H_

#include "prefetch.h"
#include "problem.h"

namespace engine {

// The products of four queries with the keys of a block. Apart from its caller, so that its sums stay in registers.
template <class Dots, class T>
[[gnu::noinline]] void DotBlock(const Dots& dots, const T* const* slots, size_t key, int count, int row, Vec* tiles,
                                Prefetch& prefetch) {
  for (int t = 0; t < count; t += kTileColumns) {
    prefetch.Step(Dots::kCost);
    *tiles++ = dots.Tile(slots + t, key, row);
  }
}

// Keys become float32 as they are loaded: for every type, on every processor.
template <class T>
class WideDots {
 public:
  static constexpr int kCost = 8;  // of a tile, as one of PairDots is 4

  WideDots(const Problem& problem, Scratch& scratch, int rows)
      : dim_(problem.head_dim), q_(scratch.Take(size_t(rows) * problem.head_dim)) {
    std::fill_n(q_, size_t(rows) * dim_, 0.0f);
  }

  // Floats that the constructor takes.
  static size_t Floats(const Problem& problem, int rows) { return size_t(rows) * problem.head_dim; }

  void Set(const Problem& problem, int token, int head, int row) {
    LoadQuery(problem, token, head, problem.q_scale * kUnit<T>, q_ + row * dim_);
  }

  // What the tiles of rows row .. row + kTileRows must be multiplied with.
  Vec Factor(int) const { return Splat(1); }

  Vec Tile(const T* const* slots, size_t key, int row) const {
    const float* q = q_ + row * dim_;
    Vec sum[kTileColumns][kTileRows] = {};
    for (int d = 0; d < dim_; d += kLanes) {
      Vec query[kTileRows];
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        query[r] = Load(q + r * dim_ + d);
        Hold(query[r]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kTileColumns; ++i) {
        const Vec keys = LoadWhole(slots[i] + key, d, dim_);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) sum[i][r] += keys * query[r];
      }
    }
    return SumEach(sum);
  }

 private:
  int dim_;
  float* q_;
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define ENGINE_PAIR_DOTS 1

// Queries and keys are multiplied as bfloat16, two products in a lane: products are exact, and sums are float32. For queries
// that are bfloat16 and keys that bfloat16 holds.
template <class T>
class PairDots {
 public:
  static constexpr int kCost = 4;

  static bool Fits(const Problem& problem) {
    return problem.token_type == Float::kBFloat16 && problem.head_dim % kStep == 0;
  }

  PairDots(const Problem& problem, Scratch& scratch, int rows)
      : dim_(problem.head_dim), scale_(problem.q_scale * kUnit<T>),
        q_(reinterpret_cast<uint16_t*>(scratch.Take(Floats(problem, rows)))) {
    std::fill_n(q_, size_t(rows) * dim_, uint16_t{0});
  }

  static size_t Floats(const Problem& problem, int rows) { return size_t(rows) * problem.head_dim / 2; }

  void Set(const Problem& problem, int token, int head, int row) {
    const uint16_t* from =
        static_cast<const uint16_t*>(problem.q) + (size_t(token) * problem.q_heads + head) * size_t(dim_);
    uint16_t* to = q_ + row * dim_;
    for (int d = 0; d < dim_; d += 8) std::copy_n(from + d, 8, to + Place(d));
  }

  Vec Factor(int) const { return Splat(scale_); }

  Vec Tile(const T* const* slots, size_t key, int row) const {
    const uint16_t* q = q_ + row * dim_;
    Vec sum[kTileColumns][kTileRows] = {};
    for (int d = 0; d < dim_; d += kStep) {
      __m512i keys[kTileColumns][kPairs];
#pragma GCC unroll 4
      for (int i = 0; i < kTileColumns; ++i) LoadPairs(slots[i] + key + d, keys[i]);
#pragma GCC unroll 2
      for (int pair = 0; pair < kPairs; ++pair) {
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) {
          __m512i query = _mm512_loadu_si512(q + r * dim_ + d + pair * 32);
          Hold(query);
#pragma GCC unroll 4
          for (int i = 0; i < kTileColumns; ++i) {
            sum[i][r] = _mm512_dpbf16_ps(sum[i][r], reinterpret_cast<__m512bh>(keys[i][pair]),
                                         reinterpret_cast<__m512bh>(query));
          }
        }
      }
    }
    return SumEach(sum);
  }

 private:
  static constexpr int kPairs = sizeof(T) == 1 ? 2 : 1;  // vectors of bfloat16 that a vector of keys becomes
  static constexpr int kStep = 32 * kPairs;

  // Where elements d .. d + 8 of a query stand: beside the key that LoadPairs brings there.
  static int Place(int d) { return kPairs == 1 ? d : d / 64 * 64 + d % 16 / 8 * 32 + d % 64 / 16 * 8; }

  static void LoadPairs(const BFloat16* from, __m512i (&keys)[1]) { keys[0] = _mm512_loadu_si512(from); }

  static void LoadPairs(const Float8* from, __m512i (&keys)[2]) {
    const Float8Halves halves = LoadHalves(from);
    keys[0] = _mm512_unpacklo_epi8(halves.low, halves.high);
    keys[1] = _mm512_unpackhi_epi8(halves.low, halves.high);
  }

  int dim_;
  float scale_;
  uint16_t* q_;
};
#endif

}  // namespace engine

#endif  // ENGINE_NATIVE_DOTS_H_
