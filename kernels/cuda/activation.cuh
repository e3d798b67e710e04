// act(gate, up): modes_activation in float32.
#pragma once

#include "cuda/device.cuh"
#include "modes.h"

namespace modes {
namespace gpu {

__device__ __forceinline__ float activate(int32_t activation, float alpha, float limit, float gate, float up) {
  if (activation == MODES_SILU) return gate / (1.0f + exponential(-gate)) * up;
  if (activation == MODES_GELU_TANH) {
    const float inside = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
    return 0.5f * gate * (1.0f + hyperbolic_tangent(inside)) * up;
  }
  // min and max that keep a NaN: a comparison with NaN is false.
  const float g = gate > limit ? limit : gate;
  const float u = up > limit ? limit : up < -limit ? -limit : up;
  return g / (1.0f + exponential(-alpha * g)) * (u + 1.0f);
}

}  // namespace gpu
}  // namespace modes
