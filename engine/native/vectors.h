// Float vectors of the machine's width: loads of 32- and 16-bit floats, exp2 and tanh, transposes, sums.
//
// Uses the vector extensions of both GCC and Clang; -march=native chooses the instructions.

#ifndef ENGINE_NATIVE_VECTORS_H_
#define ENGINE_NATIVE_VECTORS_H_

#include <cstdint>
#include <cstring>
#include <utility>

namespace engine {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

// Storage types of the 16-bit floats; arithmetic is in float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class Float { kFloat32, kBFloat16, kFloat16 };

// Calls `use` with a value of the storage type for `type`.
template <class Use>
inline void WithType(Float type, const Use& use) {
  switch (type) {
    case Float::kFloat32:
      return use(float());
    case Float::kBFloat16:
      return use(BFloat16());
    case Float::kFloat16:
      return use(Float16());
  }
}

constexpr int RoundUp(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

inline Vec Splat(float value) { return Vec{} + value; }

inline Vec Load(const float* from) {
  Vec result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

inline BitVec LoadBits(const void* from) {
  HalfVec half;
  std::memcpy(&half, from, sizeof(half));
  return __builtin_convertvector(half, BitVec);
}

inline Vec Load(const BFloat16* from) { return reinterpret_cast<Vec>(LoadBits(from) << 16); }

inline Vec Load(const Float16* from) {
  const BitVec half = LoadBits(from);
  const BitVec exponent = half & 0x7c00u;
  const BitVec rebased = ((half & 0x7fffu) << 13) + (112u << 23);
  // Subnormals: gives them the smallest normal exponent, then subtracts its implicit one.
  const Vec subnormal = reinterpret_cast<Vec>(rebased + (1u << 23)) - 6.103515625e-05f;
  BitVec bits = exponent == 0u ? reinterpret_cast<BitVec>(subnormal) : rebased;
  bits = exponent == 0x7c00u ? rebased + (112u << 23) : bits;  // infinity and NaN
  return reinterpret_cast<Vec>(bits | ((half & 0x8000u) << 16));
}

// Loads `count` < kLanes elements, followed by zeros.
template <class T>
inline Vec LoadSome(const T* from, int count) {
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return Load(padded);
}

inline void Store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }

inline void StoreBits(void* to, BitVec bits) {
  const HalfVec half = __builtin_convertvector(bits, HalfVec);
  std::memcpy(to, &half, sizeof(half));
}

// Rounds to nearest, ties to even, like the next function.
inline void Store(BFloat16* to, Vec value) {
  const BitVec bits = reinterpret_cast<BitVec>(value);
  const BitVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  StoreBits(to, value == value ? rounded : bits >> 16 | 0x40u);
}

inline void Store(Float16* to, Vec value) {
  const BitVec signed_bits = reinterpret_cast<BitVec>(value);
  const BitVec bits = signed_bits & 0x7fffffffu;
  const BitVec normal = (bits + 0xc8000fffu + (bits >> 13 & 1u)) >> 13;  // exponent rebased by 15 - 127
  // Adding 0.5 shifts a subnormal's mantissa into place and rounds it.
  const BitVec subnormal = reinterpret_cast<BitVec>(reinterpret_cast<Vec>(bits) + 0.5f) - 0x3f000000u;
  BitVec half = bits < 0x38800000u ? subnormal : normal;
  half = bits < 0x47800000u ? half : BitVec{} + 0x7c00u;  // 2 ** 16 and above
  half = bits > 0x7f800000u ? BitVec{} + 0x7e00u : half;  // NaN
  StoreBits(to, half | (signed_bits >> 16 & 0x8000u));
}

// Stores the first `count` < kLanes elements.
template <class T>
inline void StoreSome(T* to, Vec value, int count) {
  T padded[kLanes];
  Store(padded, value);
  std::memcpy(to, padded, count * sizeof(T));
}

inline IntVec LaneIndices() {
  IntVec lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Lane i of the result is lane i + By of `value`, modulo the number of lanes.
template <int By, int... I>
inline Vec Rotate(Vec value, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(value, value, ((I + By) % kLanes)...);
}

using EachLane = std::make_integer_sequence<int, kLanes>;

template <int By = kLanes / 2>
inline float SumLanes(Vec value) {
  value += Rotate<By>(value, EachLane());
  if constexpr (By > 1) return SumLanes<By / 2>(value);
  return value[0];
}

template <int By = kLanes / 2>
inline float MaxLanes(Vec value) {
  const Vec other = Rotate<By>(value, EachLane());
  value = value < other ? other : value;
  if constexpr (By > 1) return MaxLanes<By / 2>(value);
  return value[0];
}

// 2 ** x with an error of one or two units in the last place; 0 below 2 ** -126, finite above 2 ** 127.
inline Vec Exp2(Vec x) {
  x = x < -127.0f ? Splat(-127.0f) : x;
  x = x > 127.0f ? Splat(127.0f) : x;
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2 ** 23: rounds to a whole number in the low bits
  const Vec f = x - (shifted - 12582912.0f);
  const BitVec power = (reinterpret_cast<BitVec>(shifted) + 127u) << 23;
  // Taylor's series of 2 ** f on [-1/2, 1/2]; the first term left out is 1.2e-7 of the sum at the ends.
  Vec p = Splat(1.5403530e-04f);
  p = p * f + 1.3333558e-03f;
  p = p * f + 9.6181291e-03f;
  p = p * f + 5.5504109e-02f;
  p = p * f + 2.4022651e-01f;
  p = p * f + 6.9314718e-01f;
  p = p * f + 1.0f;
  return p * reinterpret_cast<Vec>(power);
}

inline float Exp2(float x) { return Exp2(Splat(x))[0]; }

inline Vec Tanh(Vec x) { return 1.0f - 2.0f / (1.0f + Exp2(x * 2.8853900817779268f)); }

template <int... I>
inline Vec ZipLow(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * kLanes)...);
}

template <int... I>
inline Vec ZipHigh(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (kLanes / 2 + I / 2 + I % 2 * kLanes)...);
}

// Transposes a square of kLanes rows in place: each pass zips row i with row i + kLanes / 2.
inline void Transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 8
  for (int pass = kLanes; pass > 1; pass /= 2) {
    Vec zipped[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      zipped[2 * i] = ZipLow(rows[i], rows[i + kLanes / 2], EachLane());
      zipped[2 * i + 1] = ZipHigh(rows[i], rows[i + kLanes / 2], EachLane());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = zipped[i];
  }
}

// Lane i of the result is the sum of the lanes of rows[i]; overwrites rows.
inline Vec SumEach(Vec (&rows)[kLanes]) {
#pragma GCC unroll 8
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
      rows[i] = ZipLow(rows[i], rows[i + half], EachLane()) + ZipHigh(rows[i], rows[i + half], EachLane());
    }
  }
  return rows[0];
}

}  // namespace engine

#endif  // ENGINE_NATIVE_VECTORS_H_
