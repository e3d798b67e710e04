// The tiles of weights that a warp multiplies with tokens, straight from global memory to registers.
//
// The products are multiply()'s (device.cuh): 16 columns of the result, which are rows of the weights, by 16 k, with
// the k of 8 tokens. A sum does not depend on the order of k when both operands have the same: so of a step of 32 k,
// lane (g = lane / 4, c = lane % 4) takes k = 8c .. 8c + 7 of its weights and of token g, 16 bytes of each. A first
// product has the lane's first four of them where its instruction speaks of k = 2c, 2c + 1, 2c + 8, 2c + 9; a second
// has the others.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/problem.h"

namespace modes {
namespace gpu {

// One of the layer's two matrix products, for all active experts.
struct DecodeProduct {
  const void* weights;  // [E, columns, depth], or transposed [E, depth, columns]
  const void* bias;     // [E, columns] or null
  const void* from;     // gate_up: x [T, depth]; down: inner [rows, depth]
  void* to;             // gate_up: inner [rows, columns / 2]; down: outputs [rows, columns]
  int64_t columns, depth;
  int32_t tiles;  // of an expert
  int32_t interleaved, activation;
  float alpha, limit;
  Routed routed;
};

// A tile of an active expert.
struct DecodeTile {
  int32_t expert, tile;
};

// Where a result is: sums[sum] of `lane` (for gate_up that is gate's, and sums[up_sum] of `up_lane` is up's), of column
// `column` of the tile and row `row` of the 8.
struct DecodeResult {
  int32_t sum, lane, up_sum, up_lane, column, row;
};

__device__ __forceinline__ int64_t gate_column(const DecodeProduct& p, int64_t column) {
  return p.interleaved ? 2 * column : column;
}
__device__ __forceinline__ int64_t up_column(const DecodeProduct& p, int64_t column) {
  return p.interleaved ? 2 * column + 1 : p.columns / 2 + column;
}

// 8 elements of a token from k on: zeros past the end, where the weights are zeros too (a product of 0 and NaN is NaN).
template <class T>
__device__ __forceinline__ uint4 load_token(const T* from, int k, int end) {
  return k < end ? *reinterpret_cast<const uint4*>(from + k) : make_uint4(0, 0, 0, 0);
}

// Weights with the k of a column in a row: [columns, depth]. A product's first 8 columns are in a lane's first two
// sums, the other 8 in the last two: for gate_up, gate and up of the same 8 columns of the result.
template <bool GateUp, int Steps>
struct RowTile {
  static constexpr bool kGateUp = GateUp;
  static constexpr int kColumns = GateUp ? 8 : 16;  // of the result
  static constexpr int kSteps = Steps;              // of 32 k, which a lane holds at once
  static constexpr int kLoads = 2 * kSteps;
  static constexpr int kSums = 4;                   // of a lane, for 8 tokens
  static constexpr int kResults = kColumns * 8;

  // The lane's weights of kSteps steps; `k` is its first.
  template <class T>
  static __device__ __forceinline__ void load(const DecodeProduct& p, const DecodeTile& at, int k, int end,
                                              uint4 (&weights)[kLoads]) {
    const int64_t column = static_cast<int64_t>(at.tile) * kColumns + threadIdx.x % 32 / 4;
    const int64_t low = GateUp ? gate_column(p, column) : column;
    const int64_t high = GateUp ? up_column(p, column) : column + 8;
    const T* const expert = static_cast<const T*>(p.weights) + at.expert * p.columns * p.depth;
    const T* const low_from = expert + low * p.depth + k;
    const T* const high_from = expert + high * p.depth + k;
    const int high_end = high < p.columns ? end : 0;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      weights[2 * s] = load_streaming_if(k + 32 * s < end, low_from + 32 * s);
      weights[2 * s + 1] = load_streaming_if(k + 32 * s < high_end, high_from + 32 * s);
    }
  }

  template <class T>
  static __device__ __forceinline__ void add(float (&sums)[kSums], const uint4 (&weights)[kLoads], const T* from,
                                             int k, int end) {
    constexpr int kAhead = 4;  // steps of the token in registers: more do not fit beside the weights
    static_assert(kSteps % kAhead == 0);
#pragma unroll
    for (int first = 0; first < kSteps; first += kAhead) {
      uint4 x[kAhead];
#pragma unroll
      for (int s = 0; s < kAhead; ++s) x[s] = load_token(from, k + 32 * (first + s), end);
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const uint4 &low = weights[2 * (first + s)], &high = weights[2 * (first + s) + 1];
        multiply<T>(sums, {low.x, high.x, low.y, high.y}, {x[s].x, x[s].y});
        multiply<T>(sums, {low.z, high.z, low.w, high.w}, {x[s].z, x[s].w});
      }
    }
  }

  static __device__ __forceinline__ DecodeResult result(const DecodeProduct&, int index) {
    const int sum = index / 32, lane = index % 32;
    return {sum, lane, sum + 2, lane, lane / 4 + sum / 2 * 8, lane % 4 * 2 + sum % 2};
  }
};

// Weights with the columns of a k in a row: [depth, columns]. A lane loads 8 columns of each of its 8 k, and has four
// products of 16 columns in them: product j has the lane's columns 2j and 2j + 1, in its first and in its last sums. Of
// gate_up not interleaved, the first 16 lanes have gate's columns and the others up's.
template <bool GateUp, int Steps>
struct TransposedTile {
  static constexpr bool kGateUp = GateUp;
  static constexpr int kColumns = GateUp ? 32 : 64;
  static constexpr int kSteps = Steps;
  static constexpr int kLoads = 8 * kSteps;
  static constexpr int kSums = 16;
  static constexpr int kResults = kColumns * 8;

  template <class T>
  static __device__ __forceinline__ void load(const DecodeProduct& p, const DecodeTile& at, int k, int end,
                                              uint4 (&weights)[kLoads]) {
    const int g = threadIdx.x % 32 / 4;
    int64_t column = int64_t{64} * at.tile + 8 * g;
    int64_t columns = p.columns;
    if (GateUp && !p.interleaved) {
      columns /= 2;
      column = int64_t{32} * at.tile + 8 * (g % 4);
    }
    if (column >= columns) end = 0;
    if (GateUp && !p.interleaved && g >= 4) column += columns;
    const T* const from = static_cast<const T*>(p.weights) + (at.expert * p.depth + k) * p.columns + column;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        weights[8 * s + i] = load_streaming_if(k + 32 * s < end, from + (32 * s + i) * p.columns);
      }
    }
  }

  template <class T>
  static __device__ __forceinline__ void add(float (&sums)[kSums], const uint4 (&weights)[kLoads], const T* from,
                                             int k, int end) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint4 x = load_token(from, k + 32 * s, end);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4* const w = weights + 8 * s + 4 * half;
        const uint32_t b[2] = {half ? x.z : x.x, half ? x.w : x.y};
        add_product<T>(sums, 0, w[0].x, w[1].x, w[2].x, w[3].x, b);
        add_product<T>(sums, 4, w[0].y, w[1].y, w[2].y, w[3].y, b);
        add_product<T>(sums, 8, w[0].z, w[1].z, w[2].z, w[3].z, b);
        add_product<T>(sums, 12, w[0].w, w[1].w, w[2].w, w[3].w, b);
      }
    }
  }

  static __device__ __forceinline__ DecodeResult result(const DecodeProduct& p, int index) {
    const int row = index % 4 * 2;
    if (!GateUp || !p.interleaved) {
      const int lanes = GateUp ? 16 : 32;
      const int sum = index / lanes, lane = index % lanes;
      return {sum, lane, sum, lane + 16, lane / 4 * 8 + sum / 2, row + sum % 2};
    }
    const int lane = index % 32, product = index / 64, second = index / 32 % 2;
    return {4 * product + second, lane, 4 * product + 2 + second, lane, lane / 4 * 4 + product, row + second};
  }

 private:
  // The same two columns of four k.
  template <class T>
  static __device__ __forceinline__ void add_product(float (&sums)[kSums], int first, uint32_t k0, uint32_t k1,
                                                     uint32_t k2, uint32_t k3, const uint32_t (&b)[2]) {
    float d[4] = {sums[first], sums[first + 1], sums[first + 2], sums[first + 3]};
    multiply<T>(d, {lows(k0, k1), highs(k0, k1), lows(k2, k3), highs(k2, k3)}, b);
    sums[first] = d[0], sums[first + 1] = d[1], sums[first + 2] = d[2], sums[first + 3] = d[3];
  }
  static __device__ __forceinline__ uint32_t lows(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
  static __device__ __forceinline__ uint32_t highs(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }
};

}  // namespace gpu
}  // namespace modes
