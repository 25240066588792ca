// Writes new keys and values into their slots of a fused KV buffer, in place; into a narrow one as codes and scales.
//
// XLA aliases the result with the buffer and cannot look inside, so none of its passes converts or copies the buffer.
// The interleaving is that of engine/kv/layout.py: row 2h of a slot is K of head h, row 2h + 1 is V.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Bytes of one head in k and v, and of one row and one slot as stored: padding makes the stored ones larger.
struct Strides {
  size_t head, row, slot;
};

// Copies one token's heads to `slot`, K and V in turn, and clears the padding.
void WriteSlot(char* slot, const char* k, const char* v, int64_t heads, const Strides& bytes) {
  const size_t tail = bytes.row - bytes.head;
  char* row = slot;
  for (int64_t h = 0; h < heads; ++h) {
    for (const char* source : {k, v}) {
      std::memcpy(row, source + h * bytes.head, bytes.head);
      if (tail != 0) std::memset(row + bytes.head, 0, tail);
      row += bytes.row;
    }
  }
  if (row != slot + bytes.slot) std::memset(row, 0, slot + bytes.slot - row);
}

// fused [S, R, L], loc [T], k and v [T, H, D], all but loc of one dtype; R >= 2H, L >= D; the result aliases fused.
// A loc outside [0, S) writes nothing. Tokens are written in order, so the last of equal locs wins.
ffi::Error Scatter(ffi::AnyBuffer fused, ffi::Buffer<ffi::S32> loc, ffi::AnyBuffer k, ffi::AnyBuffer v,
                   ffi::Result<ffi::AnyBuffer> result) {
  const auto stored = fused.dimensions(), given = k.dimensions();
  if (stored.size() != 3 || given.size() != 3 || v.element_count() != k.element_count() || loc.dimensions().size() != 1 ||
      loc.dimensions()[0] != given[0] || stored[1] < 2 * given[1] || stored[2] < given[2] ||
      k.element_type() != fused.element_type() || v.element_type() != fused.element_type()) {
    return ffi::Error::InvalidArgument("engine_kv_scatter: shapes or dtypes of fused, loc, k and v do not fit");
  }
  if (result->untyped_data() != fused.untyped_data()) {
    return ffi::Error::Internal("engine_kv_scatter: the result is not aliased with the fused buffer");
  }
  const int64_t slots = stored[0], tokens = given[0], heads = given[1];
  const size_t item = ffi::ByteWidth(fused.element_type());
  if (item == 0 || fused.size_bytes() != fused.element_count() * item) {
    return ffi::Error::InvalidArgument("engine_kv_scatter: a dtype packed below a byte cannot be written by rows");
  }
  const Strides bytes{given[2] * item, stored[2] * item, stored[1] * stored[2] * item};
  char* base = static_cast<char*>(result->untyped_data());
  const char* keys = static_cast<const char*>(k.untyped_data());
  const char* values = static_cast<const char*>(v.untyped_data());
  const int32_t* locs = loc.typed_data();
  for (int64_t t = 0; t < tokens; ++t) {
    if (locs[t] < 0 || locs[t] >= slots) continue;
    const size_t token = t * heads * bytes.head;
    WriteSlot(base + locs[t] * bytes.slot, keys + token, values + token, heads, bytes);
  }
  return ffi::Error::Success();
}

// The codes of a row: what engine/kv/narrow.py's `quantise` computes, to the bit.
constexpr float kLargest = 0x1p112f, kSmallest = 0x1p-119f;

// Where a narrow buffer keeps a token, and the sizes of a row.
struct NarrowSlot {
  uint8_t* codes;  // [rows, stored_width]
  float* scales;   // of row r at r * page_size
  size_t stored_width, page_size;
  int64_t rows;
};

template <class T>
engine::Vec LoadBounded(const T* row, int at, int dim) {
  const engine::Vec value = engine::LoadPart(row, at, dim), top = engine::Splat(kLargest);
  const engine::Vec low = value > top ? top : value;
  return low < -top ? -top : low;
}

template <class T>
void QuantiseRow(const T* row, int dim, bool packed, uint8_t* codes, float* scale) {
  using namespace engine;
  Vec highest{}, lowest{}, nan{};
  for (int d = 0; d < dim; d += kLanes) {
    const Vec value = LoadBounded(row, d, dim);
    highest = highest < value ? value : highest;
    lowest = value < lowest ? value : lowest;
    nan += value * 0.0f;
  }
  const float high = MaxLanes(highest), low = MaxLanes(-lowest), most = std::max(high, low);
  const bool is_nan = std::isnan(SumLanes(nan)), alive = !is_nan && most >= kSmallest;
  // Of int4 the largest magnitude becomes -8, so that the scale has a sign.
  const float extreme = packed && !(high > low) ? -low : most, top = packed ? -8 : 127;
  *scale = is_nan ? std::numeric_limits<float>::quiet_NaN() : alive ? extreme * float(1.0 / top) : 0.0f;
  if (!alive) {
    std::memset(codes, 0, packed ? dim / 2 : dim);
    return;
  }
  const float inverse = top / extreme;
  const auto code = [&](int at) {
    const IntVec nearest = Round(LoadBounded(row, at, dim) * inverse), limit = IntVec{} + (packed ? 7 : 127);
    return nearest < limit ? nearest : limit;
  };
  const int half = dim / 2;
  if (packed && half % kLanes == 0) {
    for (int d = 0; d < half; d += kLanes) StoreBytes(codes + d, (code(d) & 15) | code(d + half) << 4);
  } else if (!packed && dim % kLanes == 0) {
    for (int d = 0; d < dim; d += kLanes) StoreBytes(codes + d, code(d));
  } else {
    if (packed) std::memset(codes, 0, half);
    for (int d = 0; d < dim; d += kLanes) {
      const IntVec some = code(d);
      for (int i = d; i < std::min(dim, d + kLanes); ++i) {
        if (!packed) codes[i] = some[i - d];
        if (packed) codes[i < half ? i : i - half] |= (some[i - d] & 15) << (i < half ? 0 : 4);
      }
    }
  }
}

// Writes one of the two rows of each head, and clears its padding.
template <class T>
void QuantiseRows(const NarrowSlot& slot, const T* rows, int64_t heads, int dim, bool packed, int first) {
  const size_t width = packed ? dim / 2 : dim;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t row = 2 * h + first;
    uint8_t* codes = slot.codes + row * slot.stored_width;
    QuantiseRow(rows + h * dim, dim, packed, codes, slot.scales + row * slot.page_size);
    std::memset(codes + width, 0, slot.stored_width - width);
  }
}

template <class Use>
bool WithFloat(ffi::DataType type, const Use& use) {
  switch (type) {
    case ffi::F32: return use(float()), true;
    case ffi::BF16: return use(engine::BFloat16()), true;
    case ffi::F16: return use(engine::Float16()), true;
    default: return false;
  }
}

// codes [S, R, W] int8, or uint8 with two int4 codes in each; scales [S / page, R * page]; loc [T]; k and v [T, H, D] of
// floats, each of its own dtype; R >= 2H, W >= D, or D / 2. The results alias codes and scales. Slots as in Scatter.
ffi::Error Quantise(ffi::AnyBuffer codes, ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::S32> loc, ffi::AnyBuffer k,
                    ffi::AnyBuffer v, ffi::Result<ffi::AnyBuffer> codes_written,
                    ffi::Result<ffi::Buffer<ffi::F32>> scales_written) {
  const auto stored = codes.dimensions(), given = k.dimensions(), paged = scales.dimensions();
  const bool packed = codes.element_type() == ffi::U8;
  if (stored.size() != 3 || given.size() != 3 || paged.size() != 2 || v.element_count() != k.element_count() ||
      loc.dimensions().size() != 1 || loc.dimensions()[0] != given[0] || stored[1] < 2 * given[1] ||
      stored[2] * (packed ? 2 : 1) < given[2] || (packed && given[2] % 2) || paged[0] < 1 || stored[0] % paged[0] ||
      paged[1] != stored[1] * (stored[0] / paged[0]) || (!packed && codes.element_type() != ffi::S8) ||
      !WithFloat(k.element_type(), [](auto) {}) || !WithFloat(v.element_type(), [](auto) {})) {
    return ffi::Error::InvalidArgument("engine_kv_quantise: shapes or dtypes of codes, scales, loc, k and v do not fit");
  }
  if (codes_written->untyped_data() != codes.untyped_data() || scales_written->typed_data() != scales.typed_data()) {
    return ffi::Error::Internal("engine_kv_quantise: the results are not aliased with the buffers");
  }
  const int64_t page = stored[0] / paged[0], heads = given[1];
  const int dim = given[2];
  uint8_t* code_base = static_cast<uint8_t*>(codes.untyped_data());
  const int32_t* locs = loc.typed_data();
  for (int64_t t = 0; t < given[0]; ++t) {
    if (locs[t] < 0 || locs[t] >= stored[0]) continue;
    const NarrowSlot slot{code_base + locs[t] * stored[1] * stored[2],
                          scales.typed_data() + locs[t] / page * paged[1] + locs[t] % page, size_t(stored[2]), size_t(page),
                          stored[1]};
    int first = 0;
    for (const ffi::AnyBuffer& half : {k, v}) {
      WithFloat(half.element_type(), [&](auto element) {
        const auto* rows = static_cast<const decltype(element)*>(half.untyped_data()) + t * heads * dim;
        QuantiseRows(slot, rows, heads, dim, packed, first);
      });
      ++first;
    }
    for (int64_t row = 2 * heads; row < slot.rows; ++row) slot.scales[row * page] = 0;
    const size_t used = 2 * heads * slot.stored_width;
    std::memset(slot.codes + used, 0, slot.rows * slot.stored_width - used);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(engine_kv_quantise, Quantise,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()             // codes
                                  .Arg<ffi::Buffer<ffi::F32>>()      // scales
                                  .Arg<ffi::Buffer<ffi::S32>>()      // loc
                                  .Arg<ffi::AnyBuffer>()             // k
                                  .Arg<ffi::AnyBuffer>()             // v
                                  .Ret<ffi::AnyBuffer>()             // codes, written
                                  .Ret<ffi::Buffer<ffi::F32>>());    // scales, written

XLA_FFI_DEFINE_HANDLER_SYMBOL(engine_kv_scatter, Scatter,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()           // fused
                                  .Arg<ffi::Buffer<ffi::S32>>()    // loc
                                  .Arg<ffi::AnyBuffer>()           // k
                                  .Arg<ffi::AnyBuffer>()           // v
                                  .Ret<ffi::AnyBuffer>());         // fused, written
