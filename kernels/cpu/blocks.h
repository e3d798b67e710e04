// The layer's arithmetic over blocks of rows and columns, for one kind of word and one stored dtype of weights. Included
// by the one file per instruction set (avx512.cpp and the like), which fills a table with it.
#pragma once

#include "cpu/experts.h"
#include "cpu/panels.h"

namespace {

using modes::Layer;
using modes::Routing;

// The three activations are one: g * sigmoid(z(g)) * (u [+ 1]).
MODES_INLINE vfloat activate(vfloat gate, vfloat up, const modes_args& args) {
  vfloat z = gate;
  if (args.activation == MODES_GELU_TANH) {  // 0.5 (1 + tanh(y)) = sigmoid(2 y)
    z = gate * 1.59576912f * (gate * gate * 0.044715f + 1.0f);
  } else if (args.activation == MODES_SWIGLU_OAI) {
    const vfloat limit = splat(args.limit);
    gate = gate > limit ? limit : gate;  // NaN passes
    up = up > limit ? limit : up;
    up = up < -limit ? -limit : up;
    up += 1.0f;
    z = gate * args.alpha;
  }
  return gate / (exp_lanes(-z) + 1.0f) * up;
}

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
        tiles((count + kPanelRows - 1) / kPanelRows) {}
  bool panelled() const { return layer.args->transposed || count > kFewRows; }
  int64_t tile(int64_t t) const { return count * t / tiles; }  // first row of tile t, counted within the expert
};

template <class W>
void gather(const Layer& layer, int64_t expert, int64_t first, int64_t last) {
  const Rows<W> rows(layer, expert);
  const int64_t H = layer.args->hidden, bytes = W::kPairs ? 2 : 4;
  for (int64_t t = first; t < last; ++t) {
    const int64_t row = rows.tile(t), height = rows.tile(t + 1) - row;
    const unsigned char* from[kPanelRows];
    for (int64_t i = 0; i < height; ++i) from[i] = layer.x + layer.routing.row_token[rows.first + row + i] * H * bytes;
    with_constant<kPanelRows>(static_cast<int>(height), [&](auto m) __attribute__((always_inline)) {
      pack_rows<W, decltype(m)::value>(from, H, layer.gathered + (rows.first + row) * words<W>(H));
    });
  }
}

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

// -- gate and up ------------------------------------------------------------------------------------------------------

// `units` lanes of act(gate, up) for each row of a tile, into the panel that down reads: [Iw][height] words.
// sums: [height][2][kLanes].
template <class W>
MODES_INLINE void store_inner(const modes_args& args, const float* sums, vfloat gate_bias, vfloat up_bias, int64_t height,
                              int64_t c, int64_t units, float* panel) {
  panel += words<W>(c) * height;
  for (int64_t i = 0; i < height; ++i, sums += kPanelColumns) {
    const vfloat inner = activate(load_words(sums) + gate_bias, load_words(sums + kLanes) + up_bias, args);
    float word[kLanes];
    round_words<W>(inner, units, word);
    for (int64_t w = 0; w < words<W>(units); ++w) panel[w * height + i] = word[w];
  }
}

template <class W, int32_t D>
MODES_INLINE void biases(const modes_args& args, const Matrix<D>& m, int64_t c, int64_t units, vfloat* gate, vfloat* up) {
  *gate = *up = vfloat{};
  if (!m.bias) return;
  for (int64_t l = 0; l < units; ++l) {
    (*gate)[l] = m.bias_of(gate_column(args, c + l));
    (*up)[l] = m.bias_of(up_column(args, c + l));
  }
}

// A few rows on weights stored by depth, in place: several panels at once, for longer runs from memory.
template <class W, int32_t D, int M>
int64_t gate_up_direct(const Layer& layer, const Rows<W>& rows, const Matrix<D>& m, int64_t first, int64_t last) {
  constexpr int P = 4;
  const modes_args& args = *layer.args;
  const float* x = layer.gathered + rows.first * words<W>(m.depth);
  int64_t c = first;
  for (; c + P * kLanes <= last; c += P * kLanes) {
    const Columns columns = gate_up_columns(args, m, c, kLanes);
    float sums[P * M * kPanelColumns];
    if (args.interleaved) {
      direct_tile<W, D, M, P, true>(x, columns, m.depth, sums);
    } else {
      direct_tile<W, D, M, P, false>(x, columns, m.depth, sums);
    }
    for (int p = 0; p < P; ++p) {
      vfloat gate_bias, up_bias;
      biases<W>(args, m, c + p * kLanes, kLanes, &gate_bias, &up_bias);
      store_inner<W>(args, sums + p * M * kPanelColumns, gate_bias, up_bias, M, c + p * kLanes, kLanes,
                     layer.inner + rows.first * words<W>(args.intermediate));
    }
  }
  return c;
}

template <class W, int32_t D>
void gate_up_panelled(const Layer& layer, const Rows<W>& rows, const Matrix<D>& m, int64_t t0, int64_t t1, int64_t first,
                      int64_t last, float* panel) {
  const modes_args& args = *layer.args;
  const int64_t Hw = words<W>(m.depth), Iw = words<W>(args.intermediate);
  int64_t c = first;
  if (m.transposed && rows.count == 1) c = gate_up_direct<W, D, 1>(layer, rows, m, first, last);
  if (m.transposed && rows.count == 2) c = gate_up_direct<W, D, 2>(layer, rows, m, first, last);
  for (; c < last; c += kLanes) {
    const int64_t units = least(kLanes, last - c);
    const Columns columns = gate_up_columns(args, m, c, units);
    const int64_t next = (args.interleaved ? 2 : 1) * kLanes * m.depth * kBytes<D>;
    const float* sums = panel_sums<W, D>(rows, t0, t1, layer.gathered + rows.first * Hw, columns, m.transposed, m.depth,
                                         next, panel);
    vfloat gate_bias, up_bias;
    biases<W>(args, m, c, units, &gate_bias, &up_bias);
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t row = rows.tile(t), height = rows.tile(t + 1) - row;
      store_inner<W>(args, sums + (row - rows.tile(t0)) * kPanelColumns, gate_bias, up_bias, height, c, units,
                     layer.inner + (rows.first + row) * Iw);
    }
  }
}

// Weights where they are, a few rows: N columns are read from memory once and stay in L1 for all row tiles. The N columns
// lie `columns / N` apart and move on together: that many streams at once come faster from memory than one.
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

template <class W, int32_t D, int N>
void gate_up_in_place(const Layer& layer, const Rows<W>& rows, const Matrix<D>& m, int64_t first, int64_t last) {
  constexpr int kUnits = N / 2;
  static_assert(kLanes % kUnits == 0, "groups of columns fill the activation's vectors");
  const modes_args& args = *layer.args;
  const int64_t Iw = words<W>(args.intermediate), bytes = W::kPairs ? 2 : 4;
  const unsigned char* row[kFewRows];
  for (int64_t i = 0; i < rows.count; ++i) row[i] = layer.x + layer.routing.row_token[rows.first + i] * m.depth * bytes;
  const int64_t ahead = (args.interleaved ? 2 : 1) * m.depth * kBytes<D>;
  for (int64_t c0 = first; c0 < last; c0 += kLanes) {
    const int64_t units = least(kLanes, last - c0), run = (units + kUnits - 1) / kUnits;
    float gate[kFewRows][kLanes] = {}, up[kFewRows][kLanes] = {};
    for (int64_t c = 0; c < run; ++c) {
      const unsigned char* column[N];
      for (int q = 0; q < kUnits; ++q) {
        column[q] = m.column(gate_column(args, c0 + least(q * run + c, units - 1)));
        column[kUnits + q] = m.column(up_column(args, c0 + least(q * run + c, units - 1)));
      }
      float out[kFewRows][N];
      dot_rows<W, D, N>(row, rows.count, column, m.depth, ahead, out);
      for (int64_t i = 0; i < rows.count; ++i) {
        for (int q = 0; q < kUnits; ++q) gate[i][q * run + c] = out[i][q], up[i][q * run + c] = out[i][kUnits + q];
      }
    }
    vfloat gate_bias, up_bias;
    biases<W>(args, m, c0, units, &gate_bias, &up_bias);
    for (int64_t i = 0; i < rows.count; ++i) {
      const vfloat inner = activate(load_words(gate[i]) + gate_bias, load_words(up[i]) + up_bias, args);
      float word[kLanes];
      round_words<W>(inner, units, word);
      memcpy(layer.inner + (rows.first + i) * Iw + words<W>(c0), word, static_cast<size_t>(words<W>(units)) * sizeof(float));
    }
  }
}

template <class W, int32_t D>
void gate_up(const Layer& layer, int64_t expert, int64_t t0, int64_t t1, int64_t first, int64_t last, float* panel) {
  const Rows<W> rows(layer, expert);
  const Matrix<D> m = gate_up_matrix<D>(*layer.args, expert);
  if (rows.panelled()) return gate_up_panelled<W, D>(layer, rows, m, t0, t1, first, last, panel);
  if (rows.count <= kWideRows) return gate_up_in_place<W, D, kWideColumns>(layer, rows, m, first, last);
  gate_up_in_place<W, D, kDotColumns>(layer, rows, m, first, last);
}

// -- down -------------------------------------------------------------------------------------------------------------

template <class W, int32_t D>
void down_panelled(const Layer& layer, const Rows<W>& rows, const Matrix<D>& m, const unsigned char* following, int64_t first,
                   int64_t last, float* strip, int64_t pitch, float* panel) {
  const Routing& routing = layer.routing;
  for (int64_t c = first; c < last; c += kPanelColumns) {
    const int64_t width = least(kPanelColumns, last - c);
    const Columns columns = down_columns(m, c, width);
    const int64_t next = (c + kPanelColumns < last ? m.column(c + kPanelColumns) : following) - m.column(c);
    const float* sums = panel_sums<W, D>(rows, 0, rows.tiles, layer.inner + rows.first * words<W>(m.depth), columns,
                                         m.transposed, m.depth, next, panel);
    vfloat bias[2] = {};
    if (m.bias) {
      for (int64_t l = 0; l < width; ++l) bias[l / kLanes][l % kLanes] = m.bias_of(c + l);
    }
    for (int64_t r = 0; r < rows.count; ++r, sums += kPanelColumns) {
      float* to = strip + (routing.row_token[rows.first + r] - routing.first_token) * pitch + (c - first);
      const vfloat weight = splat(routing.row_weight[rows.first + r]);
      for (int v = 0; v < 2; ++v) {
        const vfloat sum = load_words(sums + v * kLanes) + bias[v];
        store_words(to + v * kLanes, fused(weight, sum, load_words(to + v * kLanes)));
      }
    }
  }
}

template <class W, int32_t D, int N>
void down_in_place(const Layer& layer, const Rows<W>& rows, const Matrix<D>& m, const unsigned char* following, int64_t first,
                   int64_t last, float* strip, int64_t pitch) {
  const Routing& routing = layer.routing;
  const int64_t Iw = words<W>(m.depth);
  const unsigned char* row[kFewRows];
  for (int64_t i = 0; i < rows.count; ++i) row[i] = reinterpret_cast<const unsigned char*>(layer.inner + (rows.first + i) * Iw);
  const int64_t run = (last - first + N - 1) / N;
  for (int64_t c = 0; c < run; ++c) {
    const unsigned char* column[N];
    int64_t at[N];  // within the strip
    for (int j = 0; j < N; ++j) {
      at[j] = least(j * run + c, last - first - 1);
      column[j] = m.column(first + at[j]);
    }
    const int64_t ahead = c + 1 < run ? m.depth * kBytes<D> : following - column[0];
    float out[kFewRows][N];
    dot_rows<W, D, N>(row, rows.count, column, m.depth, ahead, out);
    for (int64_t i = 0; i < rows.count; ++i) {
      const float weight = routing.row_weight[rows.first + i];
      float* to = strip + (routing.row_token[rows.first + i] - routing.first_token) * pitch;
      for (int j = 0; j < N && j * run + c < last - first; ++j) to[at[j]] += weight * (out[i][j] + m.bias_of(first + at[j]));
    }
  }
}

// One row of the strip as the output's dtype.
MODES_INLINE void store_out(const modes_args& args, int64_t token, int64_t first, int64_t last, const float* sum) {
  const int64_t at = token * args.hidden + first, width = last - first;
  if (args.activation_dtype == MODES_F32) {
    memcpy(static_cast<float*>(args.out) + at, sum, static_cast<size_t>(width) * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(args.out) + at;
  if (args.activation_dtype == MODES_BF16) {
    for (int64_t c = 0; c < width; ++c) to[c] = bf16_bits(sum[c]);
  } else {
    for (int64_t c = 0; c < width; ++c) to[c] = f16_bits(sum[c]);
  }
}

template <class W, int32_t D>
void down(const Layer& layer, int64_t first, int64_t last, float* strip, float* panel) {
  const modes_args& args = *layer.args;
  const Routing& routing = layer.routing;
  const int64_t pitch = (last - first + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  const int64_t tokens = routing.last_token - routing.first_token;
  memset(strip, 0, static_cast<size_t>(tokens * pitch) * sizeof(float));
  for (int64_t a = 0; a < routing.active; ++a) {
    const Rows<W> rows(layer, routing.active_expert[a]);
    const Matrix<D> m = down_matrix<D>(args, routing.active_expert[a]);
    const int64_t after = routing.active_expert[a + 1 < routing.active ? a + 1 : a];
    const unsigned char* following = down_matrix<D>(args, after).column(first);
    if (rows.panelled()) {
      down_panelled<W, D>(layer, rows, m, following, first, last, strip, pitch, panel);
    } else if (rows.count <= kWideRows) {
      down_in_place<W, D, kWideColumns>(layer, rows, m, following, first, last, strip, pitch);
    } else {
      down_in_place<W, D, kDotColumns>(layer, rows, m, following, first, last, strip, pitch);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) store_out(args, routing.first_token + t, first, last, strip + t * pitch);
}

// -- 16-bit activations -----------------------------------------------------------------------------------------------

void widen(const modes_args& args, int64_t token, float* x) {
  const int64_t H = args.hidden;
  const unsigned char* from = static_cast<const unsigned char*>(args.x) + token * H * 2;
  if (args.activation_dtype == MODES_BF16) {
    for (int64_t c = 0; c < H; ++c) x[c] = read_bf16(from + c * 2);
  } else {
    for (int64_t c = 0; c < H; ++c) x[c] = read_f16(from + c * 2);
  }
}

[[maybe_unused]] void gate_up_floats(const Layer& layer, int64_t expert, int64_t t0, int64_t t1, int64_t first, int64_t last, float* panel) {
  const int32_t dtype = layer.args->weight_dtype;
  if (dtype == MODES_F32) return gate_up<Floats, MODES_F32>(layer, expert, t0, t1, first, last, panel);
  if (dtype == MODES_BF16) return gate_up<Floats, MODES_BF16>(layer, expert, t0, t1, first, last, panel);
  gate_up<Floats, MODES_F16>(layer, expert, t0, t1, first, last, panel);
}

[[maybe_unused]] void down_floats(const Layer& layer, int64_t first, int64_t last, float* strip, float* panel) {
  const int32_t dtype = layer.args->weight_dtype;
  if (dtype == MODES_F32) return down<Floats, MODES_F32>(layer, first, last, strip, panel);
  if (dtype == MODES_BF16) return down<Floats, MODES_BF16>(layer, first, last, strip, panel);
  down<Floats, MODES_F16>(layer, first, last, strip, panel);
}

}  // namespace
