// act(gate, up) of an expert's rows.
#pragma once

#include "cpu/products.h"

namespace {

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
  if constexpr (!kQuantised<D>) {
    if (m.transposed && rows.count == 1) c = gate_up_direct<W, D, 1>(layer, rows, m, first, last);
    if (m.transposed && rows.count == 2) c = gate_up_direct<W, D, 2>(layer, rows, m, first, last);
  }
  for (; c < last; c += kLanes) {
    const int64_t units = least(kLanes, last - c);
    const Columns columns = gate_up_columns(args, m, c, units);
    const int64_t next = (args.interleaved ? 2 : 1) * kLanes * m.pitch;
    const float* sums = panel_sums<W, D>(rows, t0, t1, layer.gathered + rows.first * Hw, columns, m.transposed, m.depth,
                                         m.pitch, next, panel);
    vfloat gate_bias, up_bias;
    biases<W>(args, m, c, units, &gate_bias, &up_bias);
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t row = rows.tile(t), height = rows.tile(t + 1) - row;
      store_inner<W>(args, sums + (row - rows.tile(t0)) * kPanelColumns, gate_bias, up_bias, height, c, units,
                     layer.inner + (rows.first + row) * Iw);
    }
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
  const int64_t ahead = (args.interleaved ? 2 : 1) * m.pitch;
  for (int64_t c0 = first; c0 < last; c0 += kLanes) {
    const int64_t units = least(kLanes, last - c0), run = (units + kUnits - 1) / kUnits;
    float gate[kFewRows][kLanes] = {}, up[kFewRows][kLanes] = {};
    for (int64_t c = 0; c < run; ++c) {
      const unsigned char *column[N], *scales[N];
      for (int q = 0; q < kUnits; ++q) {
        const int64_t unit = c0 + least(q * run + c, units - 1), gate_at = gate_column(args, unit), up_at = up_column(args, unit);
        column[q] = m.column(gate_at), scales[q] = m.scales_of(gate_at);
        column[kUnits + q] = m.column(up_at), scales[kUnits + q] = m.scales_of(up_at);
      }
      float out[kFewRows][N];
      dot_rows<W, D, N>(row, rows.count, m, column, scales, ahead, out);
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

}  // namespace
