// Small matrix products that stay in registers: c (+)= a b, for any number of rows and whole vectors of columns.
//
// Every element of c is summed over the depth in order, in whatever block it is, so the bits of a row do not depend on
// other rows.

#ifndef ENGINE_NATIVE_MATMUL_H_
#define ENGINE_NATIVE_MATMUL_H_

#include <cstddef>

#include "vectors.h"

namespace engine {

// Vectors per row of c such that six rows fit the registers: with 32 registers, or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostVectors = 4;
#else
constexpr int kMostVectors = 2;
#endif

// A row-major matrix of floats.
struct Packed {
  const float* data;
  size_t stride;
  Vec At(int row, int column) const { return Load(data + row * stride + column); }
};

// The part of a product that a call computes: c [rows, columns], a [rows, depth].
struct Product {
  const float* a;
  size_t a_stride;
  float* c;
  size_t c_stride;
  int rows, depth;
};

template <int Rows, int Vectors, class B>
inline void MultiplyBlock(const float* a, size_t a_stride, const B& b, int column, int depth, float* c, size_t c_stride,
                          bool accumulate) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v] = accumulate ? Load(c + r * c_stride + v * kLanes) : Vec{};
  }
  for (int k = 0; k < depth; ++k) {
    Vec right[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) right[v] = b.At(k, column + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += a[r * a_stride + k] * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) Store(c + r * c_stride + v * kLanes, sum[r][v]);
  }
}

template <int Vectors, class B>
void MultiplyColumns(const Product& p, const B& b, int column, bool accumulate) {
  int row = 0;
  const auto block = [&](auto rows) {
    MultiplyBlock<rows, Vectors>(p.a + row * p.a_stride, p.a_stride, b, column, p.depth,
                                 p.c + row * p.c_stride + column, p.c_stride, accumulate);
    row += rows;
  };
  while (p.rows - row >= 6) block(std::integral_constant<int, 6>());
  if (p.rows - row >= 4) block(std::integral_constant<int, 4>());
  if (p.rows - row >= 2) block(std::integral_constant<int, 2>());
  if (p.rows - row >= 1) block(std::integral_constant<int, 1>());
}

// Multiplies a by the first `columns` (a multiple of kLanes) columns of b into c, or adds the product to it.
template <class B>
void Multiply(const Product& p, const B& b, int columns, bool accumulate) {
  int column = 0;
  const auto strip = [&](auto vectors) {
    MultiplyColumns<vectors>(p, b, column, accumulate);
    column += vectors * kLanes;
  };
  while (columns - column >= kMostVectors * kLanes) strip(std::integral_constant<int, kMostVectors>());
  if (kMostVectors > 2 && columns - column >= 2 * kLanes) strip(std::integral_constant<int, 2>());
  if (columns - column >= kLanes) strip(std::integral_constant<int, 1>());
}

}  // namespace engine

#endif  // ENGINE_NATIVE_MATMUL_H_
