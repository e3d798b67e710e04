// The three activations as one formula without branches: an unrolled epilogue has room for one of them, not for three.
#pragma once

#include "cuda/device.cuh"
#include "cuda/problem.h"

namespace modes {
namespace gpu {

// g = min(gate, limit), u = clamp(up, +-limit): g * sigmoid(g * (linear + cubic * g^2)) * (u + shift).
// The tanh form of gelu is one of these, as 0.5 * (1 + tanh(y)) = sigmoid(2 * y).
struct Gating {
  float linear, cubic, limit, shift;
};

inline Gating gating_of(const Problem& problem) {
  const float unlimited = __builtin_huge_valf();
  if (problem.activation == MODES_SILU) return {1.0f, 0.0f, unlimited, 0.0f};
  if (problem.activation == MODES_GELU_TANH) return {1.5957691216f, 1.5957691216f * 0.044715f, unlimited, 0.0f};
  return {problem.alpha, 0.0f, problem.limit, 1.0f};
}

// kRounded: the result goes to 16 bits, so that the approximations of exp and of the quotient do not show.
template <bool kRounded>
__device__ __forceinline__ float gated(const Gating& gating, float gate, float up) {
  // min and max that keep a NaN: a comparison with NaN is false.
  const float g = gate > gating.limit ? gating.limit : gate;
  const float below = up > gating.limit ? gating.limit : up;
  const float u = below < -gating.limit ? -gating.limit : below;  // in two steps: one of three choices is a branch
  // Bounded, so that an infinite square times a zero is no NaN. The sigmoid has long reached 0 or 1 there.
  const float square = g * g > 1e12f ? 1e12f : g * g;
  const float z = g * (gating.linear + gating.cubic * square);
  if (kRounded) return quotient_fast(g, 1.0f + exponential_fast(-z)) * (u + gating.shift);
  return g / (1.0f + exponential(-z)) * (u + gating.shift);
}

}  // namespace gpu
}  // namespace modes
