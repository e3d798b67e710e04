// Register tiles: a few rows (tokens) times a few weight columns, the sum over the whole depth kept in registers.
//
// "Column" is an output of the expert's matrix, whichever way it is stored. Three forms:
//   dot_tile     weights in place, depth contiguous ([E, 2I, H], [E, H, I]): dot products along the lanes
//   panel_tile   weights packed as [depth][2 vectors of columns], rows packed as [depth][rows]: outer products
//   direct_tile  (panels.h) weights in place, stored by depth (transposed), rows packed: outer products
// Every element is summed in the order of depth alone, so its bits do not depend on which rows share its tile.
#pragma once

#include "cpu/words.h"

namespace {

#if defined(__AVX512F__)  // 32 registers
constexpr int kDotRows = 6, kWideRows = 3, kPanelRows = 12;
#else  // 16
constexpr int kDotRows = 3, kWideRows = 1, kPanelRows = 6;
#endif
// Columns of a dot tile. With one to kWideRows rows, twice as many: memory is the limit, and more streams from it are faster.
constexpr int kDotColumns = 4, kWideColumns = 8;
constexpr int kPanelColumns = 2 * kLanes;
// Up to this many rows an expert's weights are used in place, measured: packing them costs more than it saves.
constexpr int64_t kFewRows = 4 * kDotRows;

// out[i][j] = sum over depth of rows[i] * columns[j]. What comes next is fetched meanwhile, `ahead` bytes from each column.
template <class W, int32_t D, int M, int N>
MODES_INLINE void dot_tile(const unsigned char* const* rows, const unsigned char* const* columns, int64_t depth,
                           int64_t ahead, float (*out)[N]) {
  constexpr int kStep = kLanes * W::kElements;  // elements of depth
  constexpr int64_t kRowBytes = W::kPairs ? 2 : 4;
  constexpr int32_t kRowType = W::kPairs ? MODES_BF16 : MODES_F32;
  vfloat sum[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) sum[i][j] = vfloat{};
  }
  int64_t d = 0;
  for (; d + kStep <= depth; d += kStep) {
    vfloat a[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) a[i] = load_depth<W, kRowType>(rows[i] + d * kRowBytes);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      __builtin_prefetch(columns[j] + d * kBytes<D> + ahead, 0, 2);  // into L2: L1 holds what is in use
      const vfloat b = load_depth<W, D>(columns[j] + d * kBytes<D>);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) sum[i][j] = W::mac(sum[i][j], a[i], b);
    }
  }
  if (d < depth) {
    vfloat a[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) a[i] = load_depth_part<W, kRowType>(rows[i] + d * kRowBytes, depth - d);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      const vfloat b = load_depth_part<W, D>(columns[j] + d * kBytes<D>, depth - d);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) sum[i][j] = W::mac(sum[i][j], a[i], b);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < N; j += 4) {
      const vfloat four[4] = {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]};
      sum_lanes(four, out[i] + j);
    }
  }
}

// Words of depth that are packed at a time: a panel's block has to stay in L2 while all row tiles use it.
constexpr int64_t kBlock = 2048;

// What to fetch while a tile is computed: two streams, `step` bytes further with each word of depth.
struct Ahead {
  const unsigned char* at[2];
  int64_t step;
};

// sum[i][v] += row i times the v-th vector of columns; from zero when `first`. rows: [depth][M] words, panel:
// [depth][2][kLanes] words, sum: [M][2][kLanes].
template <class W, int M>
MODES_INLINE void panel_tile(const float* rows, const float* panel, int64_t depth, bool first, Ahead ahead,
                             float* sum) {
  vfloat s[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    s[i][0] = first ? vfloat{} : load_words(sum + 2 * i * kLanes);
    s[i][1] = first ? vfloat{} : load_words(sum + (2 * i + 1) * kLanes);
  }
  for (int64_t d = 0; d < depth; ++d, rows += M, panel += kPanelColumns) {
    __builtin_prefetch(ahead.at[0], 0, 2);
    __builtin_prefetch(ahead.at[1], 0, 2);
    ahead.at[0] += ahead.step, ahead.at[1] += ahead.step;
    const vfloat b0 = load_words(panel), b1 = load_words(panel + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const vfloat a = splat_word(rows + i);
      s[i][0] = W::mac(s[i][0], a, b0);
      s[i][1] = W::mac(s[i][1], a, b1);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    store_words(sum + 2 * i * kLanes, s[i][0]);
    store_words(sum + (2 * i + 1) * kLanes, s[i][1]);
  }
}

}  // namespace
