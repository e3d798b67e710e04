// Register tiles: a few rows (tokens) times a few weight columns, the sum over the whole depth kept in registers.
//
// "Column" is an output of the expert's matrix, whichever way it is stored: with depth contiguous ([E, 2I, H], [E, H, I])
// a tile is a set of dot products, with columns contiguous (transposed) it is a sum of outer products. Weights are read
// in place, once per tile of rows; nothing is repacked. Every element is summed in the order of depth alone, so its bits
// do not depend on the tile it falls in.
#pragma once

#include "cpu/simd.h"

namespace {

#if defined(__AVX512F__)  // 32 registers
constexpr int kDotRows = 4, kDotColumns = 6, kOuterRows = 12;
#elif defined(__AVX2__)  // 16 registers
constexpr int kDotRows = 3, kDotColumns = 4, kOuterRows = 6;
#else
constexpr int kDotRows = 2, kDotColumns = 4, kOuterRows = 6;
#endif
constexpr int kOuterColumns = 2 * kLanes;

template <int M>
struct Rows {
  static constexpr int value = M;
};

// Calls f(Rows<M>) with the smallest of M, M/2, M/4, ... that holds `count` rows; the caller repeats its last row in
// the places beyond count.
template <int M, class F>
MODES_INLINE void with_rows(int count, F f) {
  if constexpr (M > 1) {
    if (count <= M / 2) return with_rows<M / 2>(count, f);
  }
  f(Rows<M>{});
}

// out[i][j] = sum over d of rows[i][d] * columns[j][d]; columns point to depth contiguous elements of dtype D.
template <int32_t D, int M>
MODES_INLINE void dot_tile(const float* const* rows, const unsigned char* const* columns, int64_t depth,
                           float (*out)[kDotColumns]) {
  constexpr int64_t size = D == MODES_F32 ? 4 : 2;
  vfloat sum[M][kDotColumns];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kDotColumns; ++j) sum[i][j] = vfloat{};
  }
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    vfloat a[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) a[i] = load<MODES_F32>(rows[i] + d);
#pragma GCC unroll 16
    for (int j = 0; j < kDotColumns; ++j) {
      const vfloat b = load<D>(columns[j] + d * size);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) sum[i][j] += a[i] * b;
    }
  }
  if (d < depth) {
    vfloat a[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) a[i] = load_part<MODES_F32>(rows[i] + d, depth - d);
#pragma GCC unroll 16
    for (int j = 0; j < kDotColumns; ++j) {
      const vfloat b = load_part<D>(columns[j] + d * size, depth - d);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) sum[i][j] += a[i] * b;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kDotColumns; ++j) out[i][j] = sum_lanes(sum[i][j]);
  }
}

// Two runs of up to kLanes neighbouring columns: out[i][c] for c < count[0] from run 0, out[i][kLanes + c] for
// c < count[1] from run 1. run[r] points to depth 0; `stride` bytes lead to the next depth.
template <int32_t D, int M, bool Full>
MODES_INLINE void outer_tile(const float* const* rows, const unsigned char* const* run, const int64_t* count,
                             int64_t stride, int64_t depth, float (*out)[kOuterColumns]) {
  vfloat sum[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = vfloat{};
  for (int64_t d = 0; d < depth; ++d) {
    const vfloat b0 = Full ? load<D>(run[0] + d * stride) : load_part<D>(run[0] + d * stride, count[0]);
    const vfloat b1 = Full ? load<D>(run[1] + d * stride) : load_part<D>(run[1] + d * stride, count[1]);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const float a = rows[i][d];
      sum[i][0] += a * b0;
      sum[i][1] += a * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    memcpy(out[i], &sum[i][0], sizeof(vfloat));
    memcpy(out[i] + kLanes, &sum[i][1], sizeof(vfloat));
  }
}

}  // namespace
