// Attention over 8- and 4-bit codes by dot instructions on integers (AVX512-VNNI), where there are any.
//
// Queries, and a block's weights, become fixed-point numbers of two digits in base 256: the codes themselves are never
// converted, sums of products are exact, and a row is rounded once. A digit's unit is chosen by row, so a row's bits do not
// depend on other rows.

#ifndef ENGINE_NATIVE_CODES_H_
#define ENGINE_NATIVE_CODES_H_

#include "prefetch.h"
#include "problem.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define ENGINE_CODE_DOTS 1

namespace engine {

constexpr int kChunk = 64;  // codes in a vector

// What is added to codes to make them unsigned.
template <class T>
constexpr int kBias = 128;
template <>
inline constexpr int kBias<Int4> = 8;

// Stored bytes as 64 codes plus kBias; of two codes in a byte, the low ones or the high ones.
template <class T>
inline __m512i Biased(__m512i bytes, int high) {
  if constexpr (kBias<T> == 128) return _mm512_xor_si512(bytes, _mm512_set1_epi8(int8_t(0x80)));
  const __m512i nibbles = _mm512_srl_epi16(bytes, _mm_cvtsi32_si128(4 * high));
  // (nibbles & 15) ^ 8
  return _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi8(15), _mm512_set1_epi8(8), 0x6a);
}

// Those of the elements from `at` on.
template <class T>
inline __m512i LoadBiased(const T* row, int at, int dim) {
  const int high = kBias<T> == 8 && at >= dim / 2;
  return Biased<T>(_mm512_loadu_si512(row + at - high * (dim / 2)), high);
}

// Adds to each lane the products of four codes. The lanes of sums are typed, or GCC copies them at each step.
inline void AddProducts(IntVec& sum, __m512i natural, __m512i integer) {
  sum = reinterpret_cast<IntVec>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), natural, integer));
}

template <class T>
class CodeDots {
 public:
  static constexpr int kCost = 4;

  // Longer rows could overflow 32 bits. Queries of float32 keep all of their bits in WideDots; but with 4-bit codes they
  // come rotated, so that their dtype says nothing.
  static bool Fits(const Problem& problem) {
    return (kBias<T> == kBias<Int4> || problem.token_type != Float::kFloat32) && problem.head_dim % (kChunk * problem.codes) == 0 &&
           problem.head_dim <= 256;
  }

  CodeDots(const Problem& problem, Scratch& scratch, int rows)
      : dim_(problem.head_dim), digits_(reinterpret_cast<int8_t*>(scratch.Take(size_t(rows) * dim_ / 2))),
        bias_(reinterpret_cast<int32_t*>(scratch.Take(rows))), units_(scratch.Take(rows)),
        row_(scratch.Take(dim_)) {
    std::fill_n(digits_, 2 * size_t(rows) * dim_, int8_t{0});
    std::fill_n(bias_, rows, 0);
    std::fill_n(units_, rows, 0.0f);
  }

  static size_t Floats(const Problem& problem, int rows) {
    return size_t(rows) * (problem.head_dim / 2 + 2) + problem.head_dim + 4 * kLanes;
  }

  // q = unit * (256 * high + low): 15 bits below the largest element's power of two, so that larger elements are exact.
  void Set(const Problem& problem, int token, int head, int row) {
    LoadQuery(problem, token, head, 1, row_);
    Vec most{}, zero{};
    for (int d = 0; d < dim_; d += kLanes) {
      const Vec q = Load(row_ + d), magnitude = q < 0.0f ? -q : q;
      most = most < magnitude ? magnitude : most;
      zero += q * 0.0f;  // NaN if any element is infinite or NaN
    }
    const float largest = MaxLanes(most);
    const float unit = largest >= 0x1p-100f ? std::ldexp(1.0f, std::ilogb(largest) - 13) : 1.0f;
    const float inverse = largest >= 0x1p-100f && largest <= 0x1p100f ? 1 / unit : 0.0f;
    units_[row] = unit * problem.q_scale + SumLanes(zero);
    IntVec bias{};
    for (int d = 0; d < dim_; d += kLanes) {
      const IntVec whole = Round(Load(row_ + d) * inverse);
      const IntVec high = (whole + 128) >> 8;
      StoreBytes(digits_ + 2 * row * dim_ + d, high);
      StoreBytes(digits_ + (2 * row + 1) * dim_ + d, whole - (high << 8));
      bias += whole * kBias<T>;
    }
    bias_[row] = 0;
    for (int i = 0; i < kLanes; ++i) bias_[row] += bias[i];
  }

  Vec Factor(int row) const {
    Vec factor;
    for (int i = 0; i < kLanes; ++i) factor[i] = units_[row + i % kTileRows];
    return factor;
  }

  Vec Tile(const T* const* slots, size_t key, int row) const {
    IntVec sum[kTileColumns][kTileRows] = {};
    const int8_t* q = digits_ + 2 * row * dim_;
    AddDigit(slots, key, q, sum);
#pragma GCC unroll 4
    for (int i = 0; i < kTileColumns; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        sum[i][r] <<= 8;
      }
    }
    AddDigit(slots, key, q + dim_, sum);
    IntVec bias;
    for (int i = 0; i < kLanes; ++i) bias[i] = bias_[row + i % kTileRows];
    return __builtin_convertvector(SumEach(sum) - bias, Vec);
  }

 private:
  [[gnu::always_inline]] void AddDigit(const T* const* slots, size_t key, const int8_t* q,
                                       IntVec (&sum)[kTileColumns][kTileRows]) const {
    for (int d = 0; d < dim_; d += kChunk) {
      __m512i query[kTileRows];
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        query[r] = _mm512_loadu_si512(q + 2 * r * dim_ + d);
        Hold(query[r]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kTileColumns; ++i) {
        const __m512i keys = LoadBiased(slots[i] + key, d, dim_);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) AddProducts(sum[i][r], keys, query[r]);
      }
    }
  }

  int dim_;
  int8_t* digits_;  // [rows, 2, dim]
  int32_t* bias_;   // [rows], what the bias of the codes adds to a product
  float* units_;    // [rows]
  float* row_;
};

template <class T>
class CodeValues {
 public:
  CodeValues(const Problem& problem, Scratch& scratch)
      : dim_(problem.head_dim), digits_(reinterpret_cast<int32_t*>(scratch.Take(kMostTiles * 2 * kTileRows))) {}

  static size_t Floats(const Problem&) { return kMostTiles * 2 * kTileRows; }

  template <int Rows>
  void Add(const T* const* slots, size_t value, int count, const Vec* tiles, Vec decay, float* sums,
           Prefetch& prefetch) const {
    const int groups = (count + kTileColumns - 1) / kTileColumns;
    IntVec bias;
    const Vec unit = SetDigits(tiles, groups, bias);
    for (int d = 0; d < dim_; d += kChunk) {
      AddHalf<Rows, false>(slots, value, groups, unit, bias, decay, d, sums, prefetch);
      AddHalf<Rows, true>(slots, value, groups, unit, bias, decay, d, sums, prefetch);
    }
  }

  static int Cost(const Problem& problem) { return kCost * problem.head_dim / kChunk * 2; }

  // Sums stand as the codes do after they are interleaved.
  void Order(float* sums) const {
    float ordered[kChunk];
    for (int chunk = 0; chunk < dim_; chunk += kChunk) {
      for (int d = 0; d < kChunk; ++d) ordered[d] = sums[chunk + d % 16 / 4 * 16 + d / 16 * 4 + d % 4];
      std::copy_n(ordered, kChunk, sums + chunk);
    }
  }

 private:
  static constexpr int kMostTiles = 16;
  static constexpr float kMostWhole = 127 * 256 + 127;
  static constexpr int kCost = 1;

  // weight = unit * (256 * high + low), digits with signs; each row's unit is its largest weight / kMostWhole. Returns the
  // units, and in `bias` what the bias of the codes adds to a sum.
  Vec SetDigits(const Vec* tiles, int groups, IntVec& bias) const {
    Vec most{}, sum{};
    for (int g = 0; g < groups; ++g) {
      const Vec magnitude = tiles[g] < 0.0f ? -tiles[g] : tiles[g];
      most = most < magnitude ? magnitude : most;
      sum += magnitude;
    }
    most = MaxOfTileRow(most);
    const Vec inverse = most >= 0x1p-111f ? kMostWhole / most : Vec{};
    IntVec order{};  // of lanes that hold the digits of 4 tokens and 4 rows: bytes 1, then bytes 0, of each row's tokens
    for (int i = 0; i < 8; ++i) {
      for (int token = 0; token < 4; ++token) order[i] |= ((token * 4 + i % 4) * 4 + (i < 4)) << 8 * token;
    }
    const __m512i signs = _mm512_maskz_set1_epi8(0xffff0000u, int8_t(0x80));  // of the low digits, once 128 is added
    bias = IntVec{};
    for (int g = 0; g < groups; ++g) {
      const IntVec whole = Round(tiles[g] * inverse);
      bias += whole;
      const __m512i bytes = _mm512_maskz_permutexvar_epi8(-1, reinterpret_cast<__m512i>(order),
                                                          reinterpret_cast<__m512i>(whole + 128));
      const __m512i digits = _mm512_xor_si512(bytes, signs);
      std::memcpy(digits_ + g * 2 * kTileRows, &digits, 2 * kTileRows * sizeof(int32_t));
    }
    bias = SumOfTileRow(bias) * kBias<T>;
    return most * (1.0f / kMostWhole) + SumOfTileRow(sum * 0.0f);  // NaN where a weight is
  }

  // Four tokens' codes beside each other, for the first or the second 8 elements of each 16.
  template <bool Second>
  static __m512i Zip(__m512i a, __m512i b) {
    return Second ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
  }

  template <int Rows, bool Second>
  [[gnu::noinline]] void AddHalf(const T* const* slots, size_t value, int groups, Vec unit, IntVec bias, Vec decay, int d, float* sums,
               Prefetch& prefetch) const {
    const int high = kBias<T> == 8 && d >= dim_ / 2;
    const size_t at = value + d - high * (dim_ / 2);
    IntVec sum[Rows][2][2] = {};  // by row, vector and digit
    for (int g = 0; g < groups; ++g) {
      prefetch.Step(kCost);
      const T* const* four = slots + g * kTileColumns;
      const __m512i ab = Zip<Second>(_mm512_loadu_si512(four[0] + at), _mm512_loadu_si512(four[1] + at));
      const __m512i cd = Zip<Second>(_mm512_loadu_si512(four[2] + at), _mm512_loadu_si512(four[3] + at));
      const __m512i codes[2] = {Biased<T>(_mm512_unpacklo_epi16(ab, cd), high),
                                Biased<T>(_mm512_unpackhi_epi16(ab, cd), high)};
      const int32_t* digits = digits_ + g * 2 * kTileRows;
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
        for (int digit = 0; digit < 2; ++digit) {
          const __m512i weights = _mm512_set1_epi32(digits[digit * kTileRows + r]);
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) AddProducts(sum[r][v][digit], codes[v], weights);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* to = sums + r * dim_ + d + (2 * Second + v) * kLanes;
        const Vec whole = __builtin_convertvector((sum[r][v][0] << 8) + sum[r][v][1] - bias[r], Vec);
        Store(to, Load(to) * decay[r] + whole * unit[r]);
      }
    }
  }

  int dim_;
  int32_t* digits_;  // [tiles, 2, kTileRows], a byte for each token
};

}  // namespace engine

#endif  // __AVX512VNNI__
#endif  // ENGINE_NATIVE_CODES_H_
