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
  const void* bias;  // of all experts, or null
  int64_t bias_at;   // this expert's first element
  int64_t columns, depth;
  bool transposed;

  const unsigned char* column(int64_t c) const { return data + (transposed ? c : c * depth) * kBytes<D>; }
  MODES_INLINE float bias_of(int64_t c) const { return bias ? read_element(bias, bias_at + c, D) : 0.0f; }
};

// Stored column of intermediate unit c's gate and up.
MODES_INLINE int64_t gate_column(const modes_args& args, int64_t c) { return args.interleaved ? 2 * c : c; }
MODES_INLINE int64_t up_column(const modes_args& args, int64_t c) {
  return args.interleaved ? 2 * c + 1 : args.intermediate + c;
}

template <int32_t D>
Matrix<D> gate_up_matrix(const modes_args& args, int64_t expert) {
  const int64_t columns = 2 * args.intermediate;
  return {static_cast<const unsigned char*>(args.gate_up) + expert * columns * args.hidden * kBytes<D>, args.gate_up_bias,
          expert * columns, columns, args.hidden, args.transposed != 0};
}

template <int32_t D>
Matrix<D> down_matrix(const modes_args& args, int64_t expert) {
  return {static_cast<const unsigned char*>(args.down) + expert * args.hidden * args.intermediate * kBytes<D>, args.down_bias,
          expert * args.hidden, args.hidden, args.intermediate, args.transposed != 0};
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
  for (int64_t i = 0; i < kLanes; ++i) {
    columns.column[i] = m.column(gate_column(args, c + least(i, units - 1)));
    columns.column[kLanes + i] = m.column(up_column(args, c + least(i, units - 1)));
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
  for (int64_t i = 0; i < kPanelColumns; ++i) columns.column[i] = m.column(c + least(i, width - 1));
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
// Meanwhile the next panel is fetched, whose halves begin `next` bytes further. Returns sums [rows][2][kLanes].
template <class W, int32_t D>
float* panel_sums(const Rows<W>& rows, int64_t t0, int64_t t1, const float* packed, const Columns& columns, bool transposed,
                  int64_t depth, int64_t next, float* panel) {
  const int64_t all = words<W>(depth), half = transposed ? 0 : kLanes * depth * kBytes<D>;
  float* sums = panel + least(all, kBlock) * kPanelColumns;
  for (int64_t d = 0; d < all; d += kBlock) {
    const int64_t end = least(all, d + kBlock);
    pack_panel<W, D>(columns, transposed, depth, d, end, panel);
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
MODES_INLINE void dot_rows(const unsigned char* const* row, int64_t count, const unsigned char* const* column, int64_t depth,
                           int64_t ahead, float (*out)[N]) {
  constexpr int kMost = N == kWideColumns ? kWideRows : kDotRows;
  const int64_t tiles = (count + kMost - 1) / kMost;
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int64_t height = (count - first) / (tiles - t);
    with_constant<kMost>(static_cast<int>(height), [&](auto m) __attribute__((always_inline)) {
      dot_tile<W, D, decltype(m)::value, N>(row + first, column, depth, ahead, out + first);
    });
    first += height;
  }
}

}  // namespace
