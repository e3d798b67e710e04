// The experts' outputs, weighted and summed: a strip of columns of all tokens at a time.
#pragma once

#include "cpu/products.h"

namespace {

template <class W, int32_t D>
void down_panelled(const Layer& layer, const Rows<W>& rows, const Matrix<D>& m, const unsigned char* following, int64_t first,
                   int64_t last, float* strip, int64_t pitch, float* panel) {
  const Routing& routing = layer.routing;
  for (int64_t c = first; c < last; c += kPanelColumns) {
    const int64_t width = least(kPanelColumns, last - c);
    const Columns columns = down_columns(m, c, width);
    const int64_t next = (c + kPanelColumns < last ? m.column(c + kPanelColumns) : following) - m.column(c);
    const float* sums = panel_sums<W, D>(rows, 0, rows.tiles, layer.inner + rows.first * words<W>(m.depth), columns,
                                         m.transposed, m.depth, m.pitch, next, panel);
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
    const unsigned char *column[N], *scales[N];
    int64_t at[N];  // within the strip
    for (int j = 0; j < N; ++j) {
      at[j] = least(j * run + c, last - first - 1);
      column[j] = m.column(first + at[j]), scales[j] = m.scales_of(first + at[j]);
    }
    const int64_t ahead = c + 1 < run ? m.pitch : following - column[0];
    float out[kFewRows][N];
    dot_rows<W, D, N>(row, rows.count, m, column, scales, ahead, out);
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

}  // namespace
