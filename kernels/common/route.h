// Which pairs are kept: the one definition of score and threshold, for every device.
//
// Compile whatever includes this with -ffp-contract=off (nvcc: --fmad=false): a fused multiply-add would decide a pair
// at the threshold differently from the plain float32 code in PyTorch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MODES_HOST_DEVICE __host__ __device__
#else
#define MODES_HOST_DEVICE
#endif

namespace modes {

// Sum of one token's routing weights, in slot order. `weight(j)` is the weight of slot j as float32.
template <class Weight>
MODES_HOST_DEVICE inline float route_sum(int64_t top_k, Weight weight) {
  float sum = 0.0f;
  for (int64_t j = 0; j < top_k; ++j) sum = sum + weight(j);
  return sum;
}

// MoDES eq. 3: the layer's importance for the token's group times the routing probability among the top-k.
MODES_HOST_DEVICE inline float route_score(float scale, float weight, float sum) {
  const float pi = weight / sum;
  return scale * pi;
}

// MoDES eq. 5. Written so that a comparison with NaN keeps: a broken token must not become a token of zeros.
MODES_HOST_DEVICE inline bool route_keep(float score, float tau) { return !(score < tau); }

}  // namespace modes
