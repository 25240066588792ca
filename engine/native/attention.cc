// Ragged paged attention over the fused KV buffer on a CPU: plans a step's work, distributes it, merges split results.
//
// How a sequence is split depends on that sequence alone, and parts are merged in order, so its result has the same
// bits in any batch and on any number of threads.

#include <cmath>
#include <memory>
#include <utility>

#include "decode.h"
#include "extend.h"
#include "workers.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace engine {
namespace {

constexpr int kMostWindow = 1 << 30;  // larger than any context, and far from overflow
constexpr int kSplitTokens = 512;  // context tokens that one item reads of a sequence with few queries

// The sequences of a step, and the items of work that compute them.
class Plan {
 public:
  Plan(const Problem& problem, int64_t rows, int64_t table_width, int64_t tokens, const int32_t* page_table,
       const int32_t* cu_q_lens, const int32_t* kv_lens)
      : problem_(problem) {
    const int64_t most = table_width * problem.page_size;
    for (int64_t b = 0; b < rows; ++b) {
      // Concrete lengths were checked by the caller; wrong traced lengths must not lead to reads outside of the arrays.
      const int first = std::clamp<int64_t>(cu_q_lens[b], 0, tokens);
      const int q_len = std::clamp<int64_t>(cu_q_lens[b + 1], first, tokens) - first;
      const int kv_len = std::clamp<int64_t>(kv_lens[b], 0, most);
      if (q_len > 0) sequences_.push_back({page_table + b * table_width, first, q_len, kv_len});
    }
    for (Sequence& sequence : sequences_) AddItems(sequence);
    PlaceParts();
  }

  const std::vector<Item>& items() const { return items_; }
  const std::vector<const Sequence*>& split() const { return split_; }

  bool Decodes(const Sequence& sequence) const {
    return sequence.q_len == 1 && problem_.group() <= kMostDecodeGroup &&
           problem_.head_dim % (kLanes * problem_.codes) == 0;
  }

 private:
  void AddItems(Sequence& sequence) {
    const int tile = std::max(1, kExtendTileRows / problem_.group());
    const bool decodes = Decodes(sequence);
    // The last tile has the most context, so it starts first: the others then balance the threads.
    for (int first = (sequence.q_len - 1) / tile * tile; first >= 0; first -= tile) {
      const int queries = std::min(tile, sequence.q_len - first), position = sequence.first_position() + first;
      const int begin = std::max(0, position + 1 - problem_.window), end = std::max(0, position + queries);
      const int length = sequence.q_len <= tile ? kSplitTokens : std::max(1, end - begin);
      sequence.splits = std::max(1, (end - begin + length - 1) / length);
      for (int head = decodes ? -1 : 0; head < (decodes ? 0 : problem_.kv_heads); ++head) {
        for (int split = 0; split < sequence.splits; ++split) {
          const int at = begin + split * length;
          items_.push_back({&sequence, first, queries, head, at, std::min(end, at + length), split});
        }
      }
    }
  }

  void PlaceParts() {
    size_t rows = 0;
    for (const Sequence& sequence : sequences_) rows += Parts(sequence);
    states_.reset(new RowState[rows]);
    sums_.reset(new float[rows * problem_.padded_dim()]);
    size_t row = 0;
    for (Sequence& sequence : sequences_) {
      if (sequence.splits == 1) continue;
      sequence.states = &states_[row];
      sequence.sums = &sums_[row * problem_.padded_dim()];
      row += Parts(sequence);
      split_.push_back(&sequence);
    }
  }

  size_t Parts(const Sequence& sequence) const {
    return sequence.splits == 1 ? 0 : static_cast<size_t>(sequence.splits) * sequence.q_len * problem_.q_heads;
  }

  const Problem& problem_;
  std::vector<Sequence> sequences_;
  std::vector<Item> items_;
  std::vector<const Sequence*> split_;
  std::unique_ptr<RowState[]> states_;
  std::unique_ptr<float[]> sums_;
};

void MergeSplits(const Problem& problem, const Sequence& sequence) {
  const size_t rows = static_cast<size_t>(sequence.q_len) * problem.q_heads;
  for (size_t row = 0; row < rows; ++row) {
    Finish(problem, sequence.first_token + row / problem.q_heads, row % problem.q_heads, sequence.splits, rows,
           sequence.states + row, sequence.sums + row * problem.padded_dim());
  }
}

template <class T>
void Run(const Problem& problem, const Plan& plan, ffi::ThreadPool& pool) {
  ForEach(plan.items().size(), pool, [&](int64_t i) {
    const Item& item = plan.items()[i];
    item.head < 0 ? Decode<T>(problem, item) : Extend<T>(problem, item);
  });
  ForEach(plan.split().size(), pool, [&](int64_t i) { MergeSplits(problem, *plan.split()[i]); });
}

bool FindType(ffi::DataType type, Float& found) {
  if (type != ffi::F32 && type != ffi::BF16 && type != ffi::F16) return false;
  found = type == ffi::F32 ? Float::kFloat32 : type == ffi::BF16 ? Float::kBFloat16 : Float::kFloat16;
  return true;
}

// Calls `use` with a value of the storage type of a cache of `type`; returns whether there is one.
template <class Use>
bool WithStorage(ffi::DataType type, const Use& use) {
  switch (type) {
    case ffi::F32: return use(float()), true;
    case ffi::BF16: return use(BFloat16()), true;
    case ffi::F16: return use(Float16()), true;
    case ffi::F8E4M3FN: return use(Float8()), true;
    case ffi::S8: return use(Int8()), true;
    case ffi::U8: return use(Int4()), true;
    default: return false;
  }
}

// q [T, Hq, D], fused [S, R, L] with R >= 2H and L >= D, or of int4 D / 2; scales [S / page_size, 2H * page_size] of int8
// and int4, [0] of floats; page_table [B, P], cu_q_lens [B + 1], kv_lens [B],
// sinks [Hq] or [0]; out like q, zero from cu_q_lens[B] on; lse [T, Hq], -inf there, or [0] where it is not requested.
ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer fused, ffi::Buffer<ffi::F32> scales,
                  ffi::Buffer<ffi::S32> page_table, ffi::Buffer<ffi::S32> cu_q_lens, ffi::Buffer<ffi::S32> kv_lens, ffi::Buffer<ffi::F32> sinks,
                  int32_t kv_heads, int32_t page_size, int32_t window, float sm_scale, float soft_cap,
                  ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::Buffer<ffi::F32>> lse) {
  const auto asked = q.dimensions(), stored = fused.dimensions(), table = page_table.dimensions();
  const bool packed = fused.element_type() == ffi::U8, scaled = packed || fused.element_type() == ffi::S8;
  if (asked.size() != 3 || asked[0] < 1 || stored.size() != 3 || table.size() != 2 || kv_heads < 1 ||
      asked[1] % kv_heads || stored[1] < 2 * kv_heads || stored[2] * (packed ? 2 : 1) < asked[2] || page_size < 1 ||
      (packed && asked[2] % 2) || stored[0] < page_size ||
      (scaled ? scales.dimensions().size() != 2 || scales.dimensions()[0] != stored[0] / page_size ||
                    scales.dimensions()[1] < 2 * kv_heads * page_size
              : scales.element_count() != 0) || window < 1 || window > kMostWindow ||
      kv_lens.element_count() != size_t(table[0]) || cu_q_lens.element_count() != size_t(table[0] + 1) ||
      (sinks.element_count() != 0 && sinks.element_count() != size_t(asked[1])) ||
      (lse->element_count() != 0 && lse->element_count() != size_t(asked[0] * asked[1]))) {
    return ffi::Error::InvalidArgument("engine_attention: shapes of q, fused, scales, metadata, sinks and lse do not fit");
  }
  Float token_type;
  if (!FindType(q.element_type(), token_type) || !WithStorage(fused.element_type(), [](auto) {}) ||
      out->element_type() != q.element_type() || out->element_count() != q.element_count()) {
    return ffi::Error::InvalidArgument("engine_attention: q must be float32, bfloat16 or float16, out as q, and fused one "
                                       "of them, float8_e4m3fn, int8 or (int4 in pairs) uint8");
  }
  const float scale = soft_cap == 0 ? sm_scale * kLog2E : sm_scale / soft_cap;
  const Problem problem{token_type, q.untyped_data(), out->untyped_data(),
                        lse->element_count() ? lse->typed_data() : nullptr, fused.untyped_data(),
                        scaled ? scales.typed_data() : nullptr, sinks.element_count() ? sinks.typed_data() : nullptr,
                        stored[0] / page_size, page_size, int(asked[1]), kv_heads, int(asked[2]),
                        packed ? 2 : 1, size_t(stored[1] * stored[2]), size_t(stored[2]),
                        scaled ? size_t(scales.dimensions()[1]) : 0, scale, soft_cap * kLog2E, window};
  const int32_t* bounds = cu_q_lens.typed_data();
  const Plan plan(problem, table[0], table[1], asked[0], page_table.typed_data(), bounds, kv_lens.typed_data());
  WithStorage(fused.element_type(), [&](auto element) { Run<decltype(element)>(problem, plan, pool); });
  // Tokens before the first sequence and after the last one belong to no sequence.
  const int64_t begin = std::clamp<int64_t>(bounds[0], 0, asked[0]);
  const int64_t end = std::clamp<int64_t>(bounds[table[0]], begin, asked[0]);
  for (const auto& [from, to] : {std::pair{int64_t{0}, begin}, std::pair{end, asked[0]}}) {
    const size_t row_bytes = out->size_bytes() / asked[0];
    std::memset(static_cast<char*>(problem.out) + from * row_bytes, 0, (to - from) * row_bytes);
    if (problem.lse != nullptr) {
      std::fill(problem.lse + from * asked[1], problem.lse + to * asked[1], -std::numeric_limits<float>::infinity());
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace engine

XLA_FFI_DEFINE_HANDLER_SYMBOL(engine_attention, engine::Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()         // q
                                  .Arg<ffi::AnyBuffer>()         // fused
                                  .Arg<ffi::Buffer<ffi::F32>>()  // scales
                                  .Arg<ffi::Buffer<ffi::S32>>()  // page_table
                                  .Arg<ffi::Buffer<ffi::S32>>()  // cu_q_lens
                                  .Arg<ffi::Buffer<ffi::S32>>()  // kv_lens
                                  .Arg<ffi::Buffer<ffi::F32>>()  // sinks
                                  .Attr<int32_t>("kv_heads")
                                  .Attr<int32_t>("page_size")
                                  .Attr<int32_t>("window")
                                  .Attr<float>("sm_scale")
                                  .Attr<float>("soft_cap")
                                  .Ret<ffi::AnyBuffer>()            // out
                                  .Ret<ffi::Buffer<ffi::F32>>());   // lse
