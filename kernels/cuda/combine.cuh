// The sum over a token's kept pairs.
#pragma once

#include "cuda/path.h"
#include "cuda/problem.h"

namespace modes {
namespace gpu {

// Launches out[t] = weights[t, 0] * outputs[row of (t, 0)] + weights[t, 1] * ... in slot order, in float32, rounded once.
// A token without kept pairs gets zeros, one with an invalid pair NaN. `weights` is [T, k] and `out` [T, H], both of
// activation_dtype and aligned to it.
Error launch_combine(const Problem& problem, const void* weights, void* out, const Device& device, Stream stream);

}  // namespace gpu
}  // namespace modes
