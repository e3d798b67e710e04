#include "cuda/combine.cuh"

#include <cstring>

#include "cuda/device.cuh"

namespace modes {
namespace gpu {
namespace {

constexpr int kThreads = 256;

struct Sum {
  int64_t tokens, hidden;
  int32_t top_k;
  int32_t columns;      // threads of a token in a block, a power of two; the others have other tokens
  int32_t parts;        // blocks that share a token
  const int32_t* pair_row;
  const void* outputs;  // [rows, H]
  const void* weights;  // [T, k]
  void* out;            // [T, H]
};


template <class A, int N>
__device__ __forceinline__ void load(const A* from, float (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = to_float(*from);
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    if constexpr (N == 4) {
      for (int i = 0; i < 4; ++i) memcpy(&to[i], &word[i], 4);
    } else {
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<A>(word[i]);
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
      }
    }
  }
}

template <class A, int N>
__device__ __forceinline__ void store(A* to, const float (&from)[N]) {
  if constexpr (N == 1) {
    *to = from_float<A>(from[0]);
  } else {
    uint32_t word[4];
    if constexpr (N == 4) {
      for (int i = 0; i < 4; ++i) memcpy(&word[i], &from[i], 4);
    } else {
      for (int i = 0; i < 4; ++i) word[i] = pack<A>(from[2 * i], from[2 * i + 1]);
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

template <class A, int N>
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Sum in) {
  wait_for_previous_kernel();
  const int64_t block = blockIdx.x;
  const int64_t token = block / in.parts * (kThreads / in.columns) + threadIdx.x / in.columns;
  const int64_t column = (block % in.parts * in.columns + threadIdx.x % in.columns) * N;
  if (token >= in.tokens || column >= in.hidden) return;
  const A* const outputs = static_cast<const A*>(in.outputs) + column;
  const A* const weights = static_cast<const A*>(in.weights) + token * in.top_k;
  const int32_t* const rows = in.pair_row + token * in.top_k;
  float sum[N] = {};
  bool invalid = false;
  for (int j = 0; j < in.top_k; ++j) {
    const int row = rows[j];
    invalid |= row == kInvalid;
    if (row < 0) continue;
    const float weight = to_float(weights[j]);
    float value[N];
    load<A, N>(outputs + row * in.hidden, value);
    for (int i = 0; i < N; ++i) sum[i] += weight * value[i];
  }
  if (invalid) {
    const uint32_t bits = 0x7fc00000u;
    for (int i = 0; i < N; ++i) memcpy(&sum[i], &bits, 4);
  }
  store<A, N>(static_cast<A*>(in.out) + token * in.hidden + column, sum);
}

template <class A>
Error launch_for(Sum sum, bool overlap, Stream stream) {
  constexpr int kMany = 16 / sizeof(A);
  const bool many = sum.hidden % kMany == 0 && reinterpret_cast<uintptr_t>(sum.out) % 16 == 0;
  const int64_t columns = many ? sum.hidden / kMany : sum.hidden;
  sum.columns = 1;
  while (sum.columns < kThreads && sum.columns < columns) sum.columns *= 2;
  sum.parts = static_cast<int32_t>((columns + sum.columns - 1) / sum.columns);
  const int64_t at_once = kThreads / sum.columns;
  const Launch how{(sum.tokens + at_once - 1) / at_once * sum.parts, kThreads, 0, stream, overlap};
  return many ? launch(combine<A, kMany>, how, sum) : launch(combine<A, 1>, how, sum);
}

}  // namespace

Error launch_combine(const Problem& problem, const void* weights, void* out, const Device& device, Stream stream) {
  const Sum sum{problem.tokens,          problem.hidden,  static_cast<int32_t>(problem.top_k), 0, 0,
                problem.routed.pair_row, problem.outputs, weights,                             out};
  const bool overlap = device.major >= 9;
  if (problem.activation_dtype == MODES_F32) return launch_for<float>(sum, overlap, stream);
  if (problem.activation_dtype == MODES_F16) return launch_for<f16>(sum, overlap, stream);
  return launch_for<bf16>(sum, overlap, stream);
}

}  // namespace gpu
}  // namespace modes
