// Attention of one new token to a part of its sequence's context, all KV heads together: each slot is read whole, once.
//
// Logits and weights stand in tiles: a vector holds four query rows times a few keys, so that softmax works on four rows
// at once and nothing is transposed.

#ifndef ENGINE_NATIVE_DECODE_H_
#define ENGINE_NATIVE_DECODE_H_

#include "codes.h"
#include "dots.h"
#include "prefetch.h"
#include "values.h"

namespace engine {

constexpr int kDecodeBlock = 32;                 // context tokens, at most kMostBlock, between two rescalings
constexpr int kMostDecodeGroup = 2 * kTileRows;  // larger groups gain from repacked keys

// Slots of a block; the entries after the last slot repeat the first slot, so that keys are read in whole tiles.
template <class T>
struct SlotBlock {
  const T* slots[kDecodeBlock];
  Scales scales;
  int count;

  void Find(const Problem& problem, const Item& item, int begin) {
    count = std::clamp(item.end - begin, 0, kDecodeBlock);
    FindSlots(problem, item.sequence->pages, begin, begin + count, slots);
    if constexpr (kScaled<T>) {
      scales.Find(problem, item.sequence->pages, begin, begin + count);
      scales.Prefetch(2 * problem.kv_heads);
    }
    std::fill(slots + count, slots + kDecodeBlock, slots[0]);
  }
};

// The softmax so far of kTileRows query rows, each in the lanes of its tile row; `total` is summed over them at the end.
struct TileState {
  Vec peak = Splat(-std::numeric_limits<float>::infinity());
  Vec total = {};

  RowState Row(int row) const { return {peak[row], SumOfTileRow(total)[row]}; }
};

// Turns products into weights in place and updates `state`. Returns the factors of the earlier sums, by row.
template <class T>
[[gnu::noinline]] Vec FoldTiles(Vec* tiles, int count, Vec factor, const float* key_scales, const float* value_scales, float cap, TileState& state) {
  const int whole = (count + kTileColumns - 1) / kTileColumns;
  Vec most = state.peak;
  for (int i = 0; i < whole; ++i) {
    Vec logit = tiles[i] * factor;
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

template <class T, class Dots, class Values>
void DecodeWith(const Problem& problem, const Item& item) {
  const int dim = problem.head_dim, group = problem.group(), heads = problem.kv_heads;
  const int head_rows = RoundUp(group, kTileRows), rows = heads * head_rows;
  Scratch scratch(Dots::Floats(problem, rows) + Values::Floats(problem) + size_t(rows) * dim +
                  (kTileRows + 2) * kDecodeBlock);
  Dots dots(problem, scratch, rows);
  Values values(problem, scratch);
  float* sums = scratch.Take(size_t(rows) * dim);
  Vec* tiles = reinterpret_cast<Vec*>(scratch.Take(kTileRows * kDecodeBlock));
  float* key_scales = scratch.Take(kDecodeBlock);
  float* value_scales = scratch.Take(kDecodeBlock);
  std::fill_n(sums, size_t(rows) * dim, 0.0f);
  std::fill_n(key_scales, kDecodeBlock, 0.0f);
  std::fill_n(value_scales, kDecodeBlock, 0.0f);
  std::vector<TileState> states(rows / kTileRows);
  for (int head = 0; head < problem.q_heads; ++head) {
    dots.Set(problem, item.sequence->first_token, head, head / group * head_rows + head % group);
  }
  const int cost = rows / kTileRows * (kDecodeBlock / kTileColumns) * (Dots::kCost + Values::Cost(problem));
  SlotBlock<T> block, next;
  next.Find(problem, item, item.begin);
  for (int begin = item.begin; begin < item.end; begin += kDecodeBlock) {
    block = next;
    next.Find(problem, item, begin + kDecodeBlock);
    Prefetch prefetch(reinterpret_cast<const void* const*>(next.slots), next.count, problem.slot_stride * sizeof(T), cost);
    for (int row = 0; row < rows; row += kTileRows) {
      const int head = row / head_rows, first = row % head_rows;
      const size_t key = 2 * head * problem.row_stride, value = key + problem.row_stride;
      if (kScaled<T> && first == 0) {
        block.scales.Gather(2 * head, key_scales);
        block.scales.Gather(2 * head + 1, value_scales);
      }
      DotBlock(dots, block.slots, key, block.count, row, tiles, prefetch);
      const Vec decay = FoldTiles<T>(tiles, block.count, dots.Factor(row), key_scales, value_scales, problem.cap,
                                     states[row / kTileRows]);
      const auto add = [&](auto used) {
        values.template Add<used>(block.slots, value, block.count, tiles, decay, sums + row * dim, prefetch);
      };
      switch (std::min(kTileRows, group - first)) {
        case 1: add(std::integral_constant<int, 1>()); break;
        case 2: add(std::integral_constant<int, 2>()); break;
        case 3: add(std::integral_constant<int, 3>()); break;
        default: add(std::integral_constant<int, 4>());
      }
    }
  }
  for (int head = 0; head < problem.q_heads; ++head) {
    const int row = head / group * head_rows + head % group;
    values.Order(sums + row * dim);
    Deliver(problem, item, 0, head, states[row / kTileRows].Row(row % kTileRows), sums + row * dim);
  }
}

// What multiplies depends on the processor and on the call, never on the batch or on the sequence.
template <class T>
void Decode(const Problem& problem, const Item& item) {
#if defined(ENGINE_CODE_DOTS)
  if constexpr (kScaled<T>) {
    if (CodeDots<T>::Fits(problem)) return DecodeWith<T, CodeDots<T>, CodeValues<T>>(problem, item);
  }
#endif
#if defined(ENGINE_PAIR_DOTS)
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Float8>) {
    if (PairDots<T>::Fits(problem)) return DecodeWith<T, PairDots<T>, WideValues<T>>(problem, item);
  }
#endif
  DecodeWith<T, WideDots<T>, WideValues<T>>(problem, item);
}

}  // namespace engine

#endif  // ENGINE_NATIVE_DECODE_H_
