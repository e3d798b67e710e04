// What a kernel of the MoE layer is given: sizes, device pointers, and the kept pairs sorted by expert.
#pragma once

#include <cstdint>

#include "modes.h"

namespace modes {
namespace gpu {

// The kept pairs, as the route kernels leave them on the device; nothing of it is ever read by the host. A kept pair is a
// "row": row r belongs to expert e when offsets[e] <= r < offsets[e + 1]; rows of one expert are in token order. There are
// at most T * k rows.
struct Routed {
  int32_t* offsets;     // [E + 1]
  int32_t* active;      // [E]: experts with rows, ascending; the first `*active_count` are set
  int32_t* active_count;  // [1]
  int32_t* row_token;   // [T * k]: the token of a row
  int32_t* pair_row;    // [T * k]: the row of pair t * k + j; kSkipped, or kInvalid where its id or group is
};
constexpr int32_t kSkipped = -1, kInvalid = -2;

// One layer on the device. A, W, B: element types of activations, weights and biases (modes_dtype); B is W.
// `inner` and `outputs` have a row each for a kept pair, in the order of `routed`, of activation_dtype:
//   inner[r]   = act(gate[e] . x[token] + gate_bias[e], up[e] . x[token] + up_bias[e])        [T * k, I]
//   outputs[r] = down[e] . inner[r] + down_bias[e]                                           [T * k, H]
// A path computes both; the weights of the pairs, and the sum over a token's pairs, are combine.cuh's.
struct Problem {
  int64_t tokens, hidden, intermediate, experts, top_k;
  int32_t activation_dtype, weight_dtype;
  int32_t activation;               // modes_activation
  float alpha, limit;               // swiglu_oai only
  int32_t transposed, interleaved;  // as in modes_args
  const void* x;                    // [T, H] A, 16-byte aligned where the path asks for it
  const void* gate_up;              // W
  const void* down;                 // W
  const void* gate_up_bias;         // [E, 2I] W or null
  const void* down_bias;            // [E, H] W or null
  void* inner;                      // workspace, 128-byte aligned
  void* outputs;                    // workspace, 128-byte aligned
  Routed routed;
};

}  // namespace gpu
}  // namespace modes
