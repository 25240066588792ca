// Attention of one new token to a part of its sequence's context, all KV heads together: each slot is read whole, once.
//
// Logits and weights stand in tiles: a vector holds four query rows times a few keys, so that softmax works on four rows
// at once and nothing is transposed.

#ifndef ENGINE_NATIVE_DECODE_H_
#define ENGINE_NATIVE_DECODE_H_

#include "matmul.h"
#include "problem.h"

namespace engine {

constexpr int kDecodeBlock = 32;                   // context tokens between two rescalings
constexpr int kDecodeTiles = kDecodeBlock / kTileColumns;
constexpr int kMostDecodeGroup = 2 * kTileRows;    // larger groups gain from repacked keys
constexpr int kValueVectors = 4;                   // vectors of a value that are summed together

// Brings slots into the second-level cache in the order of their addresses, some lines at each step, so that memory is
// busy while a block is computed.
class Prefetch {
 public:
  Prefetch(const void* const* slots, int count, size_t slot_bytes, int steps)
      : slots_(slots), count_(count), bytes_(slot_bytes), lines_(int(count * slot_bytes / 64 / steps) + 1) {}

  void Step() {
    for (int line = 0; line < lines_ && slot_ < count_; ++line) {
      __builtin_prefetch(static_cast<const char*>(slots_[slot_]) + at_, 0, 2);
      at_ += 64;
      if (at_ >= bytes_) at_ = 0, ++slot_;
    }
  }

 private:
  const void* const* slots_;
  int count_, slot_ = 0;
  size_t bytes_, at_ = 0;
  int lines_;
};

// Slots of a block; the entries after the last slot repeat the first slot, so that keys are read in whole tiles.
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

// tiles[t] = kTileRows queries times kTileColumns keys.
template <class T>
void DotBlock(const T* const* slots, size_t key, int count, const float* q, int dim, Vec* tiles, Prefetch& prefetch) {
  for (int t = 0; t < count; t += kTileColumns) {
    prefetch.Step();
    Vec sum[kTileColumns][kTileRows] = {};
    for (int d = 0; d < dim; d += kLanes) {
      Vec query[kTileRows];
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        query[r] = Load(q + r * dim + d);
        Hold(query[r]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kTileColumns; ++i) {
        const Vec keys = LoadWhole(slots[t + i] + key, d, dim);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) sum[i][r] += keys * query[r];
      }
    }
    *tiles++ = SumEach(sum);
  }
}

// The softmax so far of kTileRows query rows, each in the lanes of its tile row; `total` is summed over them at the end.
struct TileState {
  Vec peak = Splat(-std::numeric_limits<float>::infinity());
  Vec total = {};

  RowState Row(int row) const { return {peak[row], SumOfTileRow(total)[row]}; }
};

// Turns logits into weights in place and updates `state`. Returns the factors of the earlier sums, by row.
template <class T>
Vec FoldTiles(Vec* tiles, int count, const float* key_scales, const float* value_scales, float cap, TileState& state) {
  const int whole = (count + kTileColumns - 1) / kTileColumns;
  Vec most = state.peak;
  for (int i = 0; i < whole; ++i) {
    Vec logit = tiles[i];
    if constexpr (kScaled<T>) logit *= TileOf(key_scales + i * kTileColumns);
    if (cap != 0) logit = cap * Tanh(logit);
    if ((i + 1) * kTileColumns > count) {
      const Vec unseen = Splat(-std::numeric_limits<float>::infinity());
      logit = TileColumns() + i * kTileColumns < count ? logit : unseen;
    }
    most = most < logit ? logit : most;
    tiles[i] = logit;
  }
  const Vec peak = MaxOfTileRow(most);
  const Vec base = Base(peak);
  Vec sum{};
  for (int i = 0; i < whole; ++i) {
    Vec weight = Exp2(tiles[i] - base);
    sum += weight;
    if constexpr (kScaled<T>) weight *= TileOf(value_scales + i * kTileColumns);
    if constexpr (kUnit<T> != 1) weight *= kUnit<T>;
    tiles[i] = weight;
  }
  const Vec decay = Exp2(state.peak - base);
  state = {peak, state.total * decay + sum};
  return decay;
}

// Adds weighted values to Rows sums times `decay`, Vectors of them from element `d` on.
template <class T, int Rows, int Vectors>
void AddStrip(const T* const* slots, size_t value, int count, const Vec* tiles, Vec decay, int d, int dim, float* sums,
              Prefetch& prefetch) {
  const float* weights = reinterpret_cast<const float*>(tiles);
  Vec sum[Rows][Vectors];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Load(sums + r * dim + d + v * kLanes) * decay[r];
  }
  for (int t = 0; t < count; t += kTileColumns, weights += kLanes) {
    prefetch.Step();
    for (int i = 0; i < kTileColumns && t + i < count; ++i) {
      Vec right[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) right[v] = LoadWhole(slots[t + i] + value, d + v * kLanes, dim);
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
    for (int v = 0; v < Vectors; ++v) Store(sums + r * dim + d + v * kLanes, sum[r][v]);
  }
}

template <class T, int Rows>
void AddValues(const T* const* slots, size_t value, int count, const Vec* tiles, Vec decay, int dim, float* sums,
               Prefetch& prefetch) {
  int d = 0;
  for (; d + kValueVectors * kLanes <= dim; d += kValueVectors * kLanes) {
    AddStrip<T, Rows, kValueVectors>(slots, value, count, tiles, decay, d, dim, sums, prefetch);
  }
  for (; d < dim; d += kLanes) AddStrip<T, Rows, 1>(slots, value, count, tiles, decay, d, dim, sums, prefetch);
}

template <class T>
void Decode(const Problem& problem, const Item& item) {
  const int dim = problem.head_dim, group = problem.group(), heads = problem.kv_heads;
  const int tile_rows = RoundUp(group, kTileRows), parts = tile_rows / kTileRows;
  Scratch scratch(static_cast<size_t>(2) * heads * tile_rows * dim + (kTileRows + 2) * kDecodeBlock);
  float* q = scratch.Take(static_cast<size_t>(heads) * tile_rows * dim);
  float* sums = scratch.Take(static_cast<size_t>(heads) * tile_rows * dim);
  Vec* tiles = reinterpret_cast<Vec*>(scratch.Take(kTileRows * kDecodeBlock));
  float* key_scales = scratch.Take(kDecodeBlock);
  float* value_scales = scratch.Take(kDecodeBlock);
  std::fill_n(q, static_cast<size_t>(heads) * tile_rows * dim, 0.0f);
  std::fill_n(sums, static_cast<size_t>(heads) * tile_rows * dim, 0.0f);
  std::fill_n(key_scales, kDecodeBlock, 0.0f);
  std::fill_n(value_scales, kDecodeBlock, 0.0f);
  std::vector<TileState> states(heads * parts);
  for (int head = 0; head < problem.q_heads; ++head) {
    float* row = q + (head / group * tile_rows + head % group) * dim;
    LoadQuery(problem, item.sequence->first_token, head, row);
    if (kUnit<T> != 1) Scale(row, dim, kUnit<T>);
  }
  const int steps = heads * parts * (kDecodeTiles * (1 + dim / kLanes / kValueVectors));
  SlotBlock<T> block, next;
  next.Find(problem, item, item.begin);
  for (int begin = item.begin; begin < item.end; begin += kDecodeBlock) {
    block = next;
    next.Find(problem, item, begin + kDecodeBlock);
    Prefetch prefetch(reinterpret_cast<const void* const*>(next.slots), next.count, problem.slot_stride * sizeof(T), steps);
    for (int h = 0; h < heads; ++h) {
      const size_t key = 2 * h * problem.row_stride, value = key + problem.row_stride;
      if constexpr (kScaled<T>) {
        GatherScales(problem, item.sequence->pages, begin, begin + block.count, 2 * h, key_scales);
        GatherScales(problem, item.sequence->pages, begin, begin + block.count, 2 * h + 1, value_scales);
      }
      for (int part = 0; part < parts; ++part) {
        const int row = h * tile_rows + part * kTileRows;
        DotBlock(block.slots, key, block.count, q + row * dim, dim, tiles, prefetch);
        const Vec decay =
            FoldTiles<T>(tiles, block.count, key_scales, value_scales, problem.cap, states[h * parts + part]);
        const auto add = [&](auto rows) {
          AddValues<T, rows>(block.slots, value, block.count, tiles, decay, dim, sums + row * dim, prefetch);
        };
        switch (std::min(kTileRows, group - part * kTileRows)) {
          case 1: add(std::integral_constant<int, 1>()); break;
          case 2: add(std::integral_constant<int, 2>()); break;
          case 3: add(std::integral_constant<int, 3>()); break;
          default: add(std::integral_constant<int, 4>());
        }
      }
    }
  }
  for (int head = 0; head < problem.q_heads; ++head) {
    const int row = head % group;
    Deliver(problem, item, 0, head, states[head / group * parts + row / kTileRows].Row(row % kTileRows),
            sums + (head / group * tile_rows + row) * dim);
  }
}

}  // namespace engine

#endif  // ENGINE_NATIVE_DECODE_H_
