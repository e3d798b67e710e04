// The layer's arithmetic. Compiled once per instruction set, with MODES_KERNELS naming the table it defines and
// MODES_ISA the set; everything else in here has internal linkage.
#include "cpu/experts.h"

#include "cpu/tiles.h"

namespace {

using modes::Layer;

MODES_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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

// Stored column of intermediate unit c's gate and up.
MODES_INLINE int64_t gate_column(const modes_args& args, int64_t c) { return args.interleaved ? 2 * c : c; }
MODES_INLINE int64_t up_column(const modes_args& args, int64_t c) {
  return args.interleaved ? 2 * c + 1 : args.intermediate + c;
}

// An expert's matrix: `columns` outputs, each a sum over `depth`.
struct Matrix {
  const unsigned char* data;
  int64_t columns, depth;
};

template <int32_t D>
MODES_INLINE Matrix matrix(const void* base, int64_t expert, int64_t columns, int64_t depth) {
  constexpr int64_t size = D == MODES_F32 ? 4 : 2;
  return {static_cast<const unsigned char*>(base) + expert * columns * depth * size, columns, depth};
}

// Runs of rows [first, last) of an expert, kDotRows at a time, against kDotColumns columns of a matrix with depth
// contiguous. done(first row, rows, tile).
template <int32_t D, class Row, class Done>
MODES_INLINE void dot_rows(const Matrix& m, const int64_t* column, int64_t first, int64_t last, Row row, Done done) {
  constexpr int64_t size = D == MODES_F32 ? 4 : 2;
  const unsigned char* columns[kDotColumns];
  for (int j = 0; j < kDotColumns; ++j) columns[j] = m.data + column[j] * m.depth * size;
  for (int64_t r = first; r < last; r += kDotRows) {
    const int count = static_cast<int>(least(kDotRows, last - r));
    const float* rows[kDotRows];
    for (int i = 0; i < kDotRows; ++i) rows[i] = row(r + least(i, count - 1));
    float tile[kDotRows][kDotColumns];
    with_rows<kDotRows>(count, [&](auto m_rows) __attribute__((always_inline)) {
      dot_tile<D, decltype(m_rows)::value>(rows, columns, m.depth, tile);
    });
    done(r, count, tile);
  }
}

// The same for a matrix with columns contiguous: two runs of columns that begin at column[0] and column[1].
template <int32_t D, class Row, class Done>
MODES_INLINE void outer_rows(const Matrix& m, const int64_t* column, const int64_t* width, int64_t first, int64_t last,
                             Row row, Done done) {
  constexpr int64_t size = D == MODES_F32 ? 4 : 2;
  const unsigned char* run[2] = {m.data + column[0] * size, m.data + column[1] * size};
  const bool full = width[0] == kLanes && width[1] == kLanes;
  for (int64_t r = first; r < last; r += kOuterRows) {
    const int count = static_cast<int>(least(kOuterRows, last - r));
    const float* rows[kOuterRows];
    for (int i = 0; i < kOuterRows; ++i) rows[i] = row(r + least(i, count - 1));
    float tile[kOuterRows][kOuterColumns];
    with_rows<kOuterRows>(count, [&](auto m_rows) __attribute__((always_inline)) {
      constexpr int M = decltype(m_rows)::value;
      if (full) return outer_tile<D, M, true>(rows, run, width, m.columns * size, m.depth, tile);
      outer_tile<D, M, false>(rows, run, width, m.columns * size, m.depth, tile);
    });
    done(r, count, tile);
  }
}

template <int32_t D>
void gate_up_block(const Layer& layer, int64_t expert, int64_t first, int64_t last) {
  const modes_args& args = *layer.args;
  const int64_t H = args.hidden, I = args.intermediate;
  const int64_t row0 = layer.routing.offsets[expert], row1 = layer.routing.offsets[expert + 1];
  const Matrix m = matrix<D>(args.gate_up, expert, 2 * I, H);
  const auto row = [&](int64_t r) { return layer.x + layer.routing.row_token[r] * H; };
  const auto bias = [&](int64_t column) {
    return args.gate_up_bias ? read_element(args.gate_up_bias, expert * 2 * I + column, D) : 0.0f;
  };

  if (!args.transposed) {
    constexpr int kPairs = kDotColumns / 2;
    static_assert(kDotRows * kPairs <= kLanes, "one activation vector per tile");
    for (int64_t c = first; c < last; c += kPairs) {
      int64_t column[kDotColumns];
      for (int q = 0; q < kPairs; ++q) {
        column[2 * q] = gate_column(args, least(c + q, last - 1));
        column[2 * q + 1] = up_column(args, least(c + q, last - 1));
      }
      dot_rows<D>(m, column, row0, row1, row, [&](int64_t r, int count, const float (*tile)[kDotColumns]) {
        vfloat gate{}, up{};
        for (int i = 0; i < count; ++i) {
          for (int q = 0; q < kPairs; ++q) {
            gate[i * kPairs + q] = tile[i][2 * q] + bias(column[2 * q]);
            up[i * kPairs + q] = tile[i][2 * q + 1] + bias(column[2 * q + 1]);
          }
        }
        const vfloat inner = activate(gate, up, args);
        for (int i = 0; i < count; ++i) {
          for (int64_t q = 0; q < least(kPairs, last - c); ++q) layer.inner[(r + i) * I + c + q] = inner[i * kPairs + q];
        }
      });
    }
    return;
  }
  for (int64_t c = first; c < last; c += kLanes) {
    const int64_t units = least(kLanes, last - c);
    int64_t column[2] = {gate_column(args, c), up_column(args, c)}, width[2] = {units, units};
    if (args.interleaved) {  // 2 * units neighbouring columns
      width[0] = least(kLanes, 2 * units);
      width[1] = 2 * units - width[0];
      column[1] = column[0] + width[0];
    }
    outer_rows<D>(m, column, width, row0, row1, row, [&](int64_t r, int count, const float (*tile)[kOuterColumns]) {
      for (int i = 0; i < count; ++i) {
        vfloat gate{}, up{};
        for (int64_t q = 0; q < units; ++q) {
          gate[q] = tile[i][args.interleaved ? 2 * q : q] + bias(gate_column(args, c + q));
          up[q] = tile[i][args.interleaved ? 2 * q + 1 : kLanes + q] + bias(up_column(args, c + q));
        }
        const vfloat inner = activate(gate, up, args);
        memcpy(layer.inner + (r + i) * I + c, &inner, static_cast<size_t>(units) * sizeof(float));
      }
    });
  }
}

template <int32_t D>
void down_block(const Layer& layer, int64_t expert, int64_t first, int64_t last) {
  const modes_args& args = *layer.args;
  const int64_t H = args.hidden, I = args.intermediate;
  const int64_t row0 = layer.routing.offsets[expert], row1 = layer.routing.offsets[expert + 1];
  const Matrix m = matrix<D>(args.down, expert, H, I);
  const auto row = [&](int64_t r) { return layer.inner + r * I; };
  const auto store = [&](int64_t r, int count, int64_t c, int64_t width, const float* tile, int64_t pitch) {
    for (int i = 0; i < count; ++i) {
      float* out = layer.outer + (r + i) * H + c;
      for (int64_t j = 0; j < width; ++j) out[j] = tile[i * pitch + j];
      if (!args.down_bias) continue;
      for (int64_t j = 0; j < width; ++j) out[j] += read_element(args.down_bias, expert * H + c + j, D);
    }
  };

  if (!args.transposed) {
    for (int64_t c = first; c < last; c += kDotColumns) {
      int64_t column[kDotColumns];
      for (int j = 0; j < kDotColumns; ++j) column[j] = least(c + j, last - 1);
      dot_rows<D>(m, column, row0, row1, row, [&](int64_t r, int count, const float (*tile)[kDotColumns]) {
        store(r, count, c, least(kDotColumns, last - c), tile[0], kDotColumns);
      });
    }
    return;
  }
  for (int64_t c = first; c < last; c += kOuterColumns) {
    const int64_t total = least(kOuterColumns, last - c);
    const int64_t width[2] = {least(kLanes, total), total - least(kLanes, total)};
    const int64_t column[2] = {c, c + width[0]};
    outer_rows<D>(m, column, width, row0, row1, row, [&](int64_t r, int count, const float (*tile)[kOuterColumns]) {
      store(r, count, c, total, tile[0], kOuterColumns);
    });
  }
}

void gate_up(const Layer& layer, int64_t expert, int64_t first, int64_t last) {
  const int32_t dtype = layer.args->weight_dtype;
  if (dtype == MODES_F32) return gate_up_block<MODES_F32>(layer, expert, first, last);
  if (dtype == MODES_BF16) return gate_up_block<MODES_BF16>(layer, expert, first, last);
  gate_up_block<MODES_F16>(layer, expert, first, last);
}

void down(const Layer& layer, int64_t expert, int64_t first, int64_t last) {
  const int32_t dtype = layer.args->weight_dtype;
  if (dtype == MODES_F32) return down_block<MODES_F32>(layer, expert, first, last);
  if (dtype == MODES_BF16) return down_block<MODES_BF16>(layer, expert, first, last);
  down_block<MODES_F16>(layer, expert, first, last);
}

void widen(const modes_args& args, int64_t token, float* x) {
  const int64_t H = args.hidden;
  const unsigned char* from = static_cast<const unsigned char*>(args.x) + token * H * 2;
  float* to = x + token * H;
  if (args.activation_dtype == MODES_BF16) {
    for (int64_t c = 0; c < H; ++c) to[c] = read_bf16(from + c * 2);
  } else {
    for (int64_t c = 0; c < H; ++c) to[c] = read_f16(from + c * 2);
  }
}

void combine(const Layer& layer, int64_t token) {
  constexpr int64_t kStrip = 256;  // stays in L1 while the slots are added one after another
  const modes_args& args = *layer.args;
  const int64_t H = args.hidden, k = args.top_k;
  const int32_t* position = layer.routing.position + (token - layer.routing.first_token) * k;
  for (int64_t c0 = 0; c0 < H; c0 += kStrip) {
    const int64_t width = least(kStrip, H - c0);
    float sum[kStrip] = {};
    for (int64_t j = 0; j < k; ++j) {
      if (position[j] < 0) continue;
      const float weight = read_element(args.expert_weights, token * k + j, args.activation_dtype);
      const float* from = layer.outer + position[j] * H + c0;
      for (int64_t c = 0; c < width; ++c) sum[c] += weight * from[c];
    }
    if (args.activation_dtype == MODES_F32) {
      memcpy(static_cast<float*>(args.out) + token * H + c0, sum, static_cast<size_t>(width) * sizeof(float));
      continue;
    }
    uint16_t* to = static_cast<uint16_t*>(args.out) + token * H + c0;
    if (args.activation_dtype == MODES_BF16) {
      for (int64_t c = 0; c < width; ++c) to[c] = bf16_bits(sum[c]);
    } else {
      for (int64_t c = 0; c < width; ++c) to[c] = f16_bits(sum[c]);
    }
  }
}

}  // namespace

const modes::ExpertKernels modes::MODES_KERNELS = {MODES_ISA, widen, gate_up, down, combine};
