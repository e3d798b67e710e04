// What the warpgroups that multiply do: the products of a tile, and its results on their way to memory.
#pragma once

#include "cuda/hopper_tiles.cuh"

namespace modes {
namespace gpu {
namespace hopper {

// sums = this warpgroup's 64 rows . the tile's 256 rows of weights, over `steps` stages. Without `any_rows` nothing is
// multiplied, and the stages are given back all the same.
template <class T>
__device__ __forceinline__ void multiply_tile(Shared& shared, Place& at, int steps, int warpgroup, bool any_rows,
                                              float (&sums)[kTileColumns / 2]) {
  const bool first_lane = threadIdx.x % 32 == 0;
  if (!any_rows) {
    for (int step = 0; step < steps; ++step, at.advance()) {
      barrier_wait(&shared.full[at.stage], at.parity);
      __syncwarp();  // every lane has seen this phase, before the next can begin
      if (first_lane) barrier_arrive(&shared.empty[at.stage]);
    }
    return;
  }
  int before = 0;
  for (int step = 0; step < steps; ++step) {
    barrier_wait(&shared.full[at.stage], at.parity);
    const uint64_t rows = tile_descriptor(shared.inputs[at.stage] + warpgroup * 64 * kRowBytes);
    const uint64_t weights = tile_descriptor(shared.weights[at.stage]);
    product_begin();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {  // 32 bytes further each: a descriptor counts in 16
      product<T, kTileColumns>(sums, rows + 2 * k, weights + 2 * k, step > 0 || k > 0);
    }
    product_commit();
    product_wait<1>();  // the product of the step before is over: its stage is free
    if (step > 0 && first_lane) barrier_arrive(&shared.empty[before]);
    before = at.stage;
    at.advance();
  }
  product_wait<0>();
  product_results(sums);
  if (first_lane) barrier_arrive(&shared.empty[before]);
}

// Two elements of a bias, `step` apart, as pack() has them. A lane loads those of two columns before the products, and
// the lanes that need them get them from it.
template <class T>
__device__ __forceinline__ uint32_t load_pair(const T* bias, int64_t step) {
  return static_cast<uint32_t>(bias[0].bits) | static_cast<uint32_t>(bias[step].bits) << 16;
}

// A warp's 16 rows of 64 elements from registers to memory, through its own place in shared memory, so that 8 lanes
// write 128 bytes of one row. words[half][c]: elements 8c + 2 * (lane % 4) and the next of row lane / 4 + 8 * half.
// `to`: the first element; only the first `rows` rows and `columns` columns (a multiple of 8) are written.
template <class T>
__device__ __forceinline__ void store_block(unsigned char* results, const uint32_t (&words)[2][8], T* to,
                                            int64_t stride, int rows, int columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
#pragma unroll
    for (int c = 0; c < 8; ++c) {  // 16-byte chunks change places by row, so that no two lanes meet in a bank
      *reinterpret_cast<uint32_t*>(results + row * kRowBytes + ((c ^ row % 8) * 16) + lane % 4 * 4) = words[half][c];
    }
  }
  __syncwarp();
  const int c = lane % 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 8 + 4 * i;
    const uint4 chunk = *reinterpret_cast<const uint4*>(results + row * kRowBytes + (c ^ row % 8) * 16);
    if (row < rows && 8 * c < columns) *reinterpret_cast<uint4*>(to + row * stride + 8 * c) = chunk;
  }
  __syncwarp();
}

}  // namespace hopper
}  // namespace gpu
}  // namespace modes
