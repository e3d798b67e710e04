// A product of all active experts, in which every weight is read once: by the warp that multiplies it.
//
// A block takes one tile of columns of one expert at a time, and its warps share the tile's k; their sums meet in
// shared memory and are added in the order of the warps. A warp has the next weights under way before it needs them:
// those of its next k, else of the block's next tile, so that the memory stays busy while results are added and
// written.
//
// What may overlap: each kernel of a layer waits for the one before it, and only then lets the one after it start. (The
// first, of routing, starts when all before it has ended, and may let the next start at once.) So when a kernel starts,
// all kernels up to the one before the previous have ended, and what they wrote is in L2 or in memory: gate_up's blocks
// have all seen the end of routing when down's first block starts. Therefore down may read, while gate_up still runs,
// what routing wrote (past L1, whose lines may be older) and weights; not `inner`. Nothing is written before the wait.
#pragma once

#include "cuda/decode_tiles.cuh"

namespace modes {
namespace gpu {

// Of both kernels, at 128 registers a thread.
constexpr int kDecodeWarpsOfProcessor = 16;

__device__ __forceinline__ int32_t read_past_l1(const int32_t* pointer) {
  return *static_cast<const volatile int32_t*>(pointer);
}

// Adds up the warps' sums for 8 rows from `first_row` on, of which `rows` exist, and writes the results.
template <class T, class Tile, int kWarps>
__device__ __forceinline__ void store_results(const DecodeProduct& p, const DecodeTile& at, const float* sums,
                                              int64_t first_row, int rows) {
  const int64_t columns = Tile::kGateUp ? p.columns / 2 : p.columns;
  const T* const bias = p.bias ? static_cast<const T*>(p.bias) + at.expert * p.columns : nullptr;
  for (int index = threadIdx.x; index < Tile::kResults; index += 32 * kWarps) {
    const DecodeResult result = Tile::result(p, index);
    const int64_t column = static_cast<int64_t>(at.tile) * Tile::kColumns + result.column;
    if (result.row >= rows || column >= columns) continue;
    float value = 0.0f, up = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      value += sums[(warp * Tile::kSums + result.sum) * 32 + result.lane];
      if (Tile::kGateUp) up += sums[(warp * Tile::kSums + result.up_sum) * 32 + result.up_lane];
    }
    if (Tile::kGateUp) {
      if (bias) {
        value += to_float(bias[gate_column(p, column)]);
        up += to_float(bias[up_column(p, column)]);
      }
      value = activate(p.activation, p.alpha, p.limit, value, up);
    } else if (bias) {
      value += to_float(bias[column]);
    }
    static_cast<T*>(p.to)[(first_row + result.row) * columns + column] = from_float<T>(value);
  }
}

template <class Tile, int kWarps>
constexpr int decode_shared_bytes() {
  return 2 * kWarps * Tile::kSums * 32 * static_cast<int>(sizeof(float));
}

// kGroups: groups of 8 rows of an expert that are multiplied at once; the weights are read again for more.
template <class T, class Tile, int kWarps, int kGroups>
__global__ void __launch_bounds__(32 * kWarps, kDecodeWarpsOfProcessor / kWarps)
    decode(const __grid_constant__ DecodeProduct p) {
  constexpr int kBlockSums = kWarps * Tile::kSums * 32;
  float* const shared = reinterpret_cast<float*>(dynamic_shared());  // [2][kWarps][kSums][32]: used in turn
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int steps = static_cast<int>((p.depth + 31) / 32);
  const int begin = steps * warp / kWarps * 32 + lane % 4 * 8;  // the lane's first k
  const int warp_end = steps * (warp + 1) / kWarps * 32;
  const int end = warp_end < p.depth ? warp_end : static_cast<int>(p.depth);
  const int warp_steps = steps * (warp + 1) / kWarps - steps * warp / kWarps;

  if (Tile::kGateUp) wait_for_previous_kernel();
  // Both at once; where nothing is active this block's place is not set, but there.
  int item = blockIdx.x;
  const int items = read_past_l1(p.routed.active_count) * p.tiles;
  DecodeTile tile{read_past_l1(p.routed.active + item / p.tiles), item % p.tiles};
  uint4 weights[Tile::kLoads];
  if (item < items) Tile::template load<T>(p, tile, begin, end, weights);
  if (!Tile::kGateUp) wait_for_previous_kernel();
  allow_next_kernel();

  int turn = 0;
  while (item < items) {
    item += gridDim.x;
    DecodeTile next{};
    if (item < items) next = {p.routed.active[item / p.tiles], item % p.tiles};
    const int first_row = p.routed.offsets[tile.expert], rows = p.routed.offsets[tile.expert + 1] - first_row;
    for (int row = 0; row < rows; row += 8 * kGroups) {
      const int groups = (rows - row + 7) / 8;  // kGroups of them now
      int sources[kGroups];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        // Lanes past the last row have it again: columns of a product do not touch each other.
        const int own = row + 8 * group + lane / 4;
        sources[group] = first_row + (own < rows ? own : rows - 1);
        if (Tile::kGateUp) sources[group] = p.routed.row_token[sources[group]];
      }
      float sums[kGroups][Tile::kSums] = {};
      for (int step = 0; step < warp_steps; step += Tile::kSteps) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          const T* const from = static_cast<const T*>(p.from) + p.depth * sources[group];
          if (group < groups) Tile::template add<T>(sums[group], weights, from, begin + 32 * step, end);
        }
        const bool same_rows = step + Tile::kSteps < warp_steps, same_tile = same_rows || row + 8 * kGroups < rows;
        if (same_tile || item < items) {
          const int k = same_rows ? begin + 32 * (step + Tile::kSteps) : begin;
          Tile::template load<T>(p, same_tile ? tile : next, k, end, weights);
        }
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (group >= groups) break;
        float* const to = shared + turn * kBlockSums;
        turn ^= 1;
#pragma unroll
        for (int i = 0; i < Tile::kSums; ++i) to[(warp * Tile::kSums + i) * 32 + lane] = sums[group][i];
        __syncthreads();  // and nobody still reads what was here two turns ago
        store_results<T, Tile, kWarps>(p, tile, to, first_row + row + 8 * group, rows - row - 8 * group);
      }
    }
    tile = next;
  }
}

}  // namespace gpu
}  // namespace modes
