// The functions of a table of expert kernels. Included by the one file per instruction set (avx512.cpp and the like).
#pragma once

#include "cpu/down.h"
#include "cpu/gate_up.h"

namespace {

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

void widen(const modes_args& args, int64_t token, float* x) {
  const int64_t H = args.hidden;
  const unsigned char* from = static_cast<const unsigned char*>(args.x) + token * H * 2;
  if (args.activation_dtype == MODES_BF16) {
    for (int64_t c = 0; c < H; ++c) x[c] = read_bf16(from + c * 2);
  } else {
    for (int64_t c = 0; c < H; ++c) x[c] = read_f16(from + c * 2);
  }
}

[[maybe_unused]] void gate_up_floats(const Layer& layer, int64_t expert, int64_t t0, int64_t t1, int64_t first, int64_t last,
                                     float* panel) {
  const int32_t dtype = layer.args->weight_dtype;
  if (dtype == MODES_F32) return gate_up<Floats, MODES_F32>(layer, expert, t0, t1, first, last, panel);
  if (dtype == MODES_BF16) return gate_up<Floats, MODES_BF16>(layer, expert, t0, t1, first, last, panel);
  if (dtype == MODES_I8) return gate_up<Floats, MODES_I8>(layer, expert, t0, t1, first, last, panel);
  if (dtype == MODES_I4) return gate_up<Floats, MODES_I4>(layer, expert, t0, t1, first, last, panel);
  gate_up<Floats, MODES_F16>(layer, expert, t0, t1, first, last, panel);
}

[[maybe_unused]] void down_floats(const Layer& layer, int64_t first, int64_t last, float* strip, float* panel) {
  const int32_t dtype = layer.args->weight_dtype;
  if (dtype == MODES_F32) return down<Floats, MODES_F32>(layer, first, last, strip, panel);
  if (dtype == MODES_BF16) return down<Floats, MODES_BF16>(layer, first, last, strip, panel);
  if (dtype == MODES_I8) return down<Floats, MODES_I8>(layer, first, last, strip, panel);
  if (dtype == MODES_I4) return down<Floats, MODES_I4>(layer, first, last, strip, panel);
  down<Floats, MODES_F16>(layer, first, last, strip, panel);
}

}  // namespace
