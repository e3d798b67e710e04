// One expert's rows times its matrix, however the matrix is stored: what gate_up.h and down.h are made of.
#pragma once

#include "cpu/experts.h"
#include "cpu/panels.h"

namespace {

using modes::Layer;
using modes::Routing;

// An expert's matrix, and where its rows stand.
template <int32_t D>
struct Matrix {
  const unsigned char* data;
  const unsigned char* scales;  // quantised only, [columns, blocks] float16
  const void* bias;             // of all experts, or null
  int64_t bias_at;              // this expert's first element
  int64_t columns, depth, pitch;  // pitch: bytes from one column to the next, not transposed
  int64_t block, blocks;          // quantised only: elements of a block, blocks of a column
  bool transposed;

  const unsigned char* column(int64_t c) const { return data + (transposed ? c * kBytes<D> : c * pitch); }
  const unsigned char* scales_of(int64_t c) const { return kQuantised<D> ? scales + c * blocks * 2 : nullptr; }
  MODES_INLINE float bias_of(int64_t c) const {
    return bias ? read_element(bias, bias_at + c, kQuantised<D> ? MODES_F32 : D) : 0.0f;
  }
};

// Stored column of intermediate unit c's gate and up.
MODES_INLINE int64_t gate_column(const modes_args& args, int64_t c) { return args.interleaved ? 2 * c : c; }
MODES_INLINE int64_t up_column(const modes_args& args, int64_t c) {
  return args.interleaved ? 2 * c + 1 : args.intermediate + c;
}

template <int32_t D>
Matrix<D> matrix(const modes_args& args, int64_t expert, const void* data, const void* scales, const void* bias,
                 int64_t columns, int64_t depth) {
  Matrix<D> m{};
  m.pitch = kQuantised<D> ? (depth + kGroup - 1) / kGroup * kGroupBytes<D> : depth * kBytes<D>;
  m.data = static_cast<const unsigned char*>(data) + expert * columns * m.pitch;
  if constexpr (kQuantised<D>) {
    m.block = args.block, m.blocks = (depth + args.block - 1) / args.block;
    m.scales = static_cast<const unsigned char*>(scales) + expert * columns * m.blocks * 2;
  }
  m.bias = bias, m.bias_at = expert * columns;
  m.columns = columns, m.depth = depth, m.transposed = args.transposed != 0;
  return m;
}

template <int32_t D>
Matrix<D> gate_up_matrix(const modes_args& args, int64_t expert) {
  return matrix<D>(args, expert, args.gate_up, args.gate_up_scales, args.gate_up_bias, 2 * args.intermediate, args.hidden);
}

template <int32_t D>
Matrix<D> down_matrix(const modes_args& args, int64_t expert) {
  return matrix<D>(args, expert, args.down, args.down_scales, args.down_bias, args.hidden, args.intermediate);
}

// Gate columns of units [c, c + units) in the panel's first vector, up columns in the second. Places beyond `units`
// repeat the last one; what they give is never stored.
template <int32_t D>
Columns gate_up_columns(const modes_args& args, const Matrix<D>& m, int64_t c, int64_t units) {
  Columns columns{};
  if (m.transposed) {
    columns.run[0] = m.column(gate_column(args, c)), columns.run[1] = m.column(up_column(args, c));
    columns.width[0] = columns.width[1] = units;
    columns.stride = m.columns * kBytes<D>;
    columns.interleaved = args.interleaved != 0;
    return columns;
  }
  columns.block = m.block;
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t gate = gate_column(args, c + least(i, units - 1)), up = up_column(args, c + least(i, units - 1));
    columns.column[i] = m.column(gate), columns.scales[i] = m.scales_of(gate);
    columns.column[kLanes + i] = m.column(up), columns.scales[kLanes + i] = m.scales_of(up);
  }
  return columns;
}

// Columns [c, c + width) as they follow one another.
template <int32_t D>
Columns down_columns(const Matrix<D>& m, int64_t c, int64_t width) {
  Columns columns{};
  if (m.transposed) {
    columns.width[0] = least(kLanes, width), columns.width[1] = width - columns.width[0];
    columns.run[0] = m.column(c), columns.run[1] = m.column(c + columns.width[0]);
    columns.stride = m.columns * kBytes<D>;
    return columns;
  }
  columns.block = m.block;
  for (int64_t i = 0; i < kPanelColumns; ++i) {
    columns.column[i] = m.column(c + least(i, width - 1)), columns.scales[i] = m.scales_of(c + least(i, width - 1));
  }
  return columns;
}

// The rows of one expert.
template <class W>
struct Rows {
  const Layer& layer;
  int64_t first, count, tiles;  // in routing order; tiles of panel height

  Rows(const Layer& layer_, int64_t expert)
      : layer(layer_),
        first(layer_.routing.offsets[expert]),
        count(layer_.routing.offsets[expert + 1] - first),
        tiles(modes::tile_count(count, kPanelRows)) {}
  bool panelled() const { return modes::is_panelled(*layer.args, count, kFewRows); }
  int64_t tile(int64_t t) const { return count * t / tiles; }  // first row of tile t, counted within the expert
};

// One panel of columns times the rows of tiles [t0, t1), `packed` being the expert's rows as tiles. The weights are packed
// once, into scratch `panel`, and the sums of all rows stand in what follows it; depths beyond kBlock go block by block.
// Meanwhile the next panel is fetched, whose halves begin `next` bytes further, with `pitch` bytes a column. Returns sums [rows][2][kLanes].
template <class W, int32_t D>
float* panel_sums(const Rows<W>& rows, int64_t t0, int64_t t1, const float* packed, const Columns& columns, bool transposed,
                  int64_t depth, int64_t pitch, int64_t next, float* panel) {
  const int64_t all = words<W>(depth), half = transposed ? 0 : kLanes * pitch;
  float* sums = panel + least(all, kBlock) * kPanelColumns;
  for (int64_t d = 0; d < all; d += kBlock) {
    const int64_t end = least(all, d + kBlock);
    if constexpr (kQuantised<D>) {
      pack_groups<D>(columns.column, columns.scales, columns.block, d, end, panel);
    } else {
      pack_panel<W, D>(columns, transposed, depth, d, end, panel);
    }
    const int64_t share = end == all ? half / (t1 - t0) : 0;  // of each half, for a tile to fetch
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t row = rows.tile(t), from = next + (t - t0) * share;
      const Ahead ahead = share ? Ahead{{columns.column[0] + from, columns.column[kLanes] + from}, share / (end - d) + 1}
                                : Ahead{{columns.column[0], columns.column[0]}, 0};
      with_constant<kPanelRows>(static_cast<int>(rows.tile(t + 1) - row), [&](auto height) __attribute__((always_inline)) {
        constexpr int M = decltype(height)::value;
        panel_tile<W, M>(packed + row * all + d * M, panel, end - d, d == 0, ahead,
                         sums + (row - rows.tile(t0)) * kPanelColumns);
      });
    }
  }
  return sums;
}

// Weights where they are, a few rows: N columns are read from memory once and stay in L1 for all row tiles. Callers take N
// columns that lie apart and move on together: that many streams at once come faster from memory than one.
template <class W, int32_t D, int N>
MODES_INLINE void dot_rows(const unsigned char* const* row, int64_t count, const Matrix<D>& m,
                           const unsigned char* const* column, const unsigned char* const* scales, int64_t ahead,
                           float (*out)[N]) {
  constexpr int kMost = N == kWideColumns ? kWideRows : kDotRows;
  const int64_t tiles = (count + kMost - 1) / kMost;
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int64_t height = (count - first) / (tiles - t);
    with_constant<kMost>(static_cast<int>(height), [&](auto tall) __attribute__((always_inline)) {
      constexpr int M = decltype(tall)::value;
      if constexpr (kQuantised<D>) {
        dot_groups<D, M, N>(row + first, column, scales, m.block, m.depth, ahead, out + first);
      } else {
        dot_tile<W, D, M, N>(row + first, column, m.depth, ahead, out + first);
      }
    });
    first += height;
  }
}

}  // namespace
