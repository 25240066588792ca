// Writes new keys and values into their slots of a fused KV buffer, in place.
//
// XLA aliases the result with the buffer and cannot look inside, so none of its passes converts or copies the buffer.
// The interleaving is that of engine/kv/layout.py: row 2h of a slot is K of head h, row 2h + 1 is V.

#include <cstdint>
#include <cstring>

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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(engine_kv_scatter, Scatter,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()           // fused
                                  .Arg<ffi::Buffer<ffi::S32>>()    // loc
                                  .Arg<ffi::AnyBuffer>()           // k
                                  .Arg<ffi::AnyBuffer>()           // v
                                  .Ret<ffi::AnyBuffer>());         // fused, written
