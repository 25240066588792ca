// Float vectors of the machine's width: loads of floats of 32, 16 and 8 bits and of codes of 8 and 4 bits, exp2 and tanh,
// transposes, sums.
//
// Uses the vector extensions of both GCC and Clang; -march=native chooses the instructions. Intrinsics stand only where a
// compiler takes several instructions for what the processor does in one.

#ifndef ENGINE_NATIVE_VECTORS_H_
#define ENGINE_NATIVE_VECTORS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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
typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));
typedef int8_t CodeVec __attribute__((vector_size(kLanes)));

// Storage types of narrow numbers; arithmetic is in float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8 {  // e4m3fn
  uint8_t bits;
};
struct Int8 {
  int8_t code;
};
struct Int4 {  // of a row of D codes, byte j holds code j in its low half and code j + D / 2 in its high half
  uint8_t codes;
};

// What the loaded numbers of a type must be multiplied with.
template <class T>
constexpr float kUnit = 1;
template <>
inline constexpr float kUnit<Float8> = 256;

// Whether each row of a token has a scale of its own.
template <class T>
constexpr bool kScaled = std::is_same_v<T, Int8> || std::is_same_v<T, Int4>;

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

// Makes a vector in a register of a value: GCC would load it anew at each use, or merge the operation that made it into
// the next.
template <class V>
inline void Hold(V& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__SSE2__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  asm("" : "+m"(value));
#endif
}

constexpr int RoundUp(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

inline IntVec LaneIndices() {
  IntVec lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

inline Vec Splat(float value) { return Vec{} + value; }

inline Vec Load(const float* from) {
  Vec result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

inline BitVec LoadBits(const void* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<BitVec>(_mm512_maskz_cvtepu16_epi32(-1, _mm256_loadu_si256(static_cast<const __m256i*>(from))));
#else
  HalfVec half;
  std::memcpy(&half, from, sizeof(half));
  return __builtin_convertvector(half, BitVec);
#endif
}

inline BitVec LoadBytes(const void* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<BitVec>(_mm512_maskz_cvtepu8_epi32(-1, _mm_loadu_si128(static_cast<const __m128i*>(from))));
#else
  ByteVec bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, BitVec);
#endif
}

inline Vec Load(const BFloat16* from) { return reinterpret_cast<Vec>(LoadBits(from) << 16); }

// Float16 in the low half of each lane.
inline Vec WidenHalf(BitVec half) {
  const BitVec exponent = half & 0x7c00u;
  const BitVec rebased = ((half & 0x7fffu) << 13) + (112u << 23);
  // Subnormals: gives them the smallest normal exponent, then subtracts its implicit one.
  const Vec subnormal = reinterpret_cast<Vec>(rebased + (1u << 23)) - 6.103515625e-05f;
  BitVec bits = exponent == 0u ? reinterpret_cast<BitVec>(subnormal) : rebased;
  bits = exponent == 0x7c00u ? rebased + (112u << 23) : bits;  // infinity and NaN
  return reinterpret_cast<Vec>(bits | ((half & 0x8000u) << 16));
}

inline Vec Load(const Float16* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return WidenHalf(LoadBits(from));
#endif
}

// The numbers divided by kUnit: with the exponent's bias of float16, which holds all of them.
inline Vec Load(const Float8* from) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 8);
  const __m256i half = _mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16(int16_t(0xbfff)));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_slli_epi16(high, 1), _mm256_set1_epi16(int16_t(0xfe00)));
  return _mm512_maskz_cvtph_ps(-1, _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7fff)));
#else
  const BitVec byte = LoadBytes(from), magnitude = byte & 0x7fu;
  const BitVec half = magnitude == 0x7fu ? BitVec{} + 0x7fffu : magnitude << 7;
  return WidenHalf(half | (byte & 0x80u) << 8);
#endif
}

inline Vec Load(const Int8* from) {
#if defined(__AVX512F__)
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_maskz_cvtepi32_ps(-1, _mm512_maskz_cvtepi8_epi32(-1, codes));
#else
  CodeVec codes;
  std::memcpy(&codes, from, sizeof(codes));
  return __builtin_convertvector(__builtin_convertvector(codes, IntVec), Vec);
#endif
}

// The codes that stand `shift` bits above the lowest bit of each byte.
inline Vec LoadNibbles(const Int4* from, int shift) {
#if defined(__AVX512F__)
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const __m512i bytes = reinterpret_cast<__m512i>(LoadBytes(from));  // the permutation reads the four lowest bits
  return _mm512_maskz_permutexvar_ps(-1, _mm512_maskz_srlv_epi32(-1, bytes, _mm512_set1_epi32(shift)), values);
#else
  const BitVec lifted = LoadBytes(from) << (28 - shift);
  return __builtin_convertvector(reinterpret_cast<IntVec>(lifted) >> 28, Vec);
#endif
}

// Loads `count` < kLanes elements, followed by zeros.
template <class T>
inline Vec LoadSome(const T* from, int count) {
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return Load(padded);
}

// Loads the numbers `at` .. `at` + kLanes of a row of `dim`, in kUnit<T>; at and half of dim are multiples of kLanes.
template <class T>
inline Vec LoadWhole(const T* row, int at, int) {
  return Load(row + at);
}

inline Vec LoadWhole(const Int4* row, int at, int dim) {
  const int half = dim / 2, high = at >= half;
  return LoadNibbles(row + at - high * half, 4 * high);
}

#if defined(__AVX512VBMI__)
// The high and the low bytes of 64 numbers as bfloat16, in kUnit<Float8>.
struct Float8Halves {
  __m512i high, low;
};

struct Float8Tables {
  alignas(64) uint8_t high[128], low[128];

  constexpr Float8Tables() : high(), low() {
    for (int magnitude = 0; magnitude < 128; ++magnitude) {
      int exponent = magnitude >> 3, mantissa = magnitude & 7;
      int bits = (exponent - 7 - 8 + 127) << 7 | mantissa << 4;
      if (exponent == 0) {  // subnormal: shifted until its first one is the implicit one
        exponent = 1;
        while (mantissa != 0 && (mantissa & 8) == 0) mantissa <<= 1, --exponent;
        bits = mantissa == 0 ? 0 : (exponent - 7 - 8 + 127) << 7 | (mantissa & 7) << 4;
      }
      if (magnitude == 0x7f) bits = 0x7fc0;
      high[magnitude] = bits >> 8;
      low[magnitude] = bits & 0xff;
    }
  }
};
inline constexpr Float8Tables kFloat8Tables;

inline Float8Halves LoadHalves(const Float8* from) {
  const auto look_up = [](const uint8_t* table, __m512i index) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
  };
  const __m512i codes = _mm512_loadu_si512(from);
  const __m512i high = look_up(kFloat8Tables.high, codes);
  // high | (codes & 0x80)
  return {_mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(int8_t(0x80)), 0xf8), look_up(kFloat8Tables.low, codes)};
}
#endif

// Loads whole vectors from `at` on.
template <class T, int Vectors>
inline void LoadVectors(const T* row, int at, int dim, Vec (&vectors)[Vectors]) {
#if defined(__AVX512VBMI__)
  if constexpr (std::is_same_v<T, Float8> && Vectors == 4) {
    const Float8Halves halves = LoadHalves(row + at);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const BitVec lane = reinterpret_cast<BitVec>(LaneIndices()) + v * kLanes;
      // Byte 2 of a lane is the low byte of its number, byte 3 the high one.
      const __m512i index = reinterpret_cast<__m512i>(lane << 16 | (lane + 64) << 24);
      vectors[v] = reinterpret_cast<Vec>(
          _mm512_maskz_permutex2var_epi8(0xccccccccccccccccu, halves.low, index, halves.high));
    }
    return;
  }
#endif
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) vectors[v] = LoadWhole(row, at + v * kLanes, dim);
}

// As LoadWhole for any `at` and `dim`, with zeros from `dim` on.
template <class T>
inline Vec LoadPart(const T* row, int at, int dim) {
  return at + kLanes <= dim ? Load(row + at) : LoadSome(row + at, dim - at);
}

inline Vec LoadPart(const Int4* row, int at, int dim) {
  const int half = dim / 2;
  if (half % kLanes == 0) return LoadWhole(row, at, dim);
  float codes[kLanes] = {};
  for (int i = 0; i < kLanes && at + i < dim; ++i) {
    const int nibble = at + i < half ? row[at + i].codes & 15 : row[at + i - half].codes >> 4;
    codes[i] = (nibble ^ 8) - 8;
  }
  return Load(codes);
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

// The nearest whole numbers, ties to even, of magnitudes below 2 ** 22.
inline IntVec Round(Vec value) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVec>(_mm512_maskz_cvtps_epi32(-1, value));
#else
  Hold(value);  // a product that is added to at once would not be rounded first
  return reinterpret_cast<IntVec>(value + 12582912.0f) - 0x4b400000;  // 1.5 * 2 ** 23, whose unit is 1
#endif
}

// Stores the lowest byte of each lane.
inline void StoreBytes(void* to, IntVec values) {
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(-1, reinterpret_cast<__m512i>(values)));
#else
  const ByteVec bytes = __builtin_convertvector(values, ByteVec);
  std::memcpy(to, &bytes, sizeof(bytes));
#endif
}

// Stores the first `count` < kLanes elements.
template <class T>
inline void StoreSome(T* to, Vec value, int count) {
  T padded[kLanes];
  Store(padded, value);
  std::memcpy(to, padded, count * sizeof(T));
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

// A tile: the lanes of a vector as kTileColumns columns of kTileRows elements, column by column.
constexpr int kTileRows = 4;
constexpr int kTileColumns = kLanes / kTileRows;

// Zips the first two, or the last two, lanes of each quad of a and b.
template <int First, class V, int... I>
inline V ZipQuads(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + First + I % 4 / 2 + I % 2 * kLanes)...);
}

// Takes every second quad of a, then those of b.
template <int First, class V, int... I>
inline V EverySecondQuad(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I / 4 * 2 + First) * 4 + I % 4)...);
}

// A tile whose element (row, column) is the sum of the lanes of parts[column][row].
template <class V>
inline V SumEach(const V (&parts)[kTileColumns][kTileRows]) {
  const auto zip = [](V a, V b) { return ZipQuads<0>(a, b, EachLane()) + ZipQuads<2>(a, b, EachLane()); };
  const auto fold = [](V a, V b) {
    return EverySecondQuad<0>(a, b, EachLane()) + EverySecondQuad<1>(a, b, EachLane());
  };
  const auto column = [&](int i) { return zip(zip(parts[i][0], parts[i][2]), zip(parts[i][1], parts[i][3])); };
  if constexpr (kTileColumns == 4) return fold(fold(column(0), column(1)), fold(column(2), column(3)));
  if constexpr (kTileColumns == 2) return fold(column(0), column(1));
  return column(0);
}

// A tile each of whose columns repeats one of the kTileColumns floats at `from`.
inline Vec TileOf(const float* from) {
#if defined(__AVX512F__)
  const __m512i columns = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_maskz_permutexvar_ps(-1, columns, _mm512_castps128_ps512(_mm_loadu_ps(from)));
#else
  Vec tile;
  for (int i = 0; i < kLanes; ++i) tile[i] = from[i / kTileRows];
  return tile;
#endif
}

// The column of each lane of a tile.
inline IntVec TileColumns() { return LaneIndices() / kTileRows; }

// Lane i of the result is lane i ^ By of `value`.
template <int By, class V, int... I>
inline V Swap(V value, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(value, value, (I ^ By)...);
}

// Each lane of the result is the largest lane, or the sum of the lanes, of its tile row.
template <int By = kTileRows>
inline Vec MaxOfTileRow(Vec value) {
  if constexpr (By < kLanes) {
    const Vec other = Swap<By>(value, EachLane());
    return MaxOfTileRow<By * 2>(value < other ? other : value);
  }
  return value;
}

template <int By = kTileRows, class V>
inline V SumOfTileRow(V value) {
  if constexpr (By < kLanes) return SumOfTileRow<By * 2>(value + Swap<By>(value, EachLane()));
  return value;
}

}  // namespace engine

#endif  // ENGINE_NATIVE_VECTORS_H_
