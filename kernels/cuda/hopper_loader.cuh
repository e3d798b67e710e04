// What the warpgroup that loads does: it keeps the ring full, across tiles.
#pragma once

#include "cuda/hopper_tiles.cuh"

namespace modes {
namespace gpu {
namespace hopper {

// Thread 0: the weights of a stage; the boxes from rows `first` and `second` go one below the other. The barrier is to
// expect `bytes`, those of other loads included.
__device__ __forceinline__ void load_weights(Shared& shared, int stage, const TensorMap& first_map, int first,
                                             const TensorMap& second_map, int second, int k, int expert, int bytes) {
  barrier_arrive_expect(&shared.full[stage], bytes);
  tensor_load(shared.weights[stage], first_map, &shared.full[stage], k, first, expert);
  tensor_load(shared.weights[stage] + kBoxRows * kRowBytes, second_map, &shared.full[stage], k, second, expert);
}

// Copies of 16 bytes are over when the thread that started them has waited, so a stage is called full this many stages
// after its copies began. With the two stages that the consumers work on, that fills the ring: no more than 2.
constexpr int kCopiesBehind = 2;
static_assert(kCopiesBehind + 2 <= kStages, "the loader would wait for consumers that wait for it");
constexpr int kGatherArrivals = kWarpgroup + 1;  // every thread for its copies, and one that expects the weights

// The rows of x that the tiles need, in the layout of a swizzled tensor load, and the weights of gate and up. All
// threads of the warpgroup.
template <class T>
__device__ __forceinline__ void load_gate_up(Shared& shared, const TensorMap& gate, const TensorMap& up,
                                             const Problem& problem, int column_tiles) {
  const int hidden = static_cast<int>(problem.hidden), steps = (hidden + kDepth - 1) / kDepth;
  const int experts = static_cast<int>(problem.experts);
  // Eight threads copy a row's 128 bytes; a thread does rows first_row, first_row + 16, ...
  const int first_row = threadIdx.x / 8, chunk = threadIdx.x % 8;
  const int offset = first_row * kRowBytes + (chunk ^ first_row % 8) * 16;
  constexpr int kRowsApart = kWarpgroup / 8, kCopies = kTileRows / kRowsApart;

  Place at, copied;
  int under_way = 0;
  Tile tile;
  for (int index = blockIdx.x; find_tile(shared, experts, column_tiles, index, tile); index += gridDim.x) {
    const T* source[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = first_row + i * kRowsApart;
      source[i] = nullptr;  // past the expert's end: the stage keeps what it holds, nobody stores what becomes of it
      if (row < tile.rows) {
        const int64_t token = problem.routed.row_token[tile.row + row];
        source[i] = static_cast<const T*>(problem.x) + token * hidden + chunk * 8;
      }
    }
    for (int step = 0; step < steps; ++step) {
      barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
      if (threadIdx.x == 0) {
        const int column = tile.column_tile * kBoxRows;
        load_weights(shared, at.stage, gate, column, up, column, step * kDepth, tile.expert, kWeightBytes);
      }
      unsigned char* to = shared.inputs[at.stage] + offset;
      const bool inside = step * kDepth + chunk * 8 < hidden;  // else zeros
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (!source[i]) continue;
        copy_async(to + i * kRowsApart * kRowBytes, source[i] + (inside ? step * kDepth : 0), inside ? 16 : 0);
      }
      copy_commit();
      at.advance();
      if (++under_way <= kCopiesBehind) continue;
      copy_wait<kCopiesBehind>();
      fence_async_proxy();
      barrier_arrive(&shared.full[copied.stage]);
      copied.advance();
      --under_way;
    }
  }
  copy_wait<0>();
  fence_async_proxy();
  for (; under_way > 0; --under_way, copied.advance()) barrier_arrive(&shared.full[copied.stage]);
}

// The rows of `inner` and the weights of down, both by tensor loads. One warp.
__device__ __forceinline__ void load_down(Shared& shared, const TensorMap& inner, const TensorMap& down,
                                          const Problem& problem, int column_tiles) {
  const int steps = static_cast<int>((problem.intermediate + kDepth - 1) / kDepth);
  const int experts = static_cast<int>(problem.experts);
  fence_async_proxy();  // the kernel before stored `inner` the ordinary way
  Place at;
  Tile tile;
  for (int index = blockIdx.x; find_tile(shared, experts, column_tiles, index, tile); index += gridDim.x) {
    if (threadIdx.x != 0) continue;
    const int column = tile.column_tile * kTileColumns;
    for (int step = 0; step < steps; ++step, at.advance()) {
      barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
      load_weights(shared, at.stage, down, column, down, column + kBoxRows, step * kDepth, tile.expert,
                   kWeightBytes + kInputBytes);
      tensor_load(shared.inputs[at.stage], inner, &shared.full[at.stage], step * kDepth, tile.row);
    }
  }
}

}  // namespace hopper
}  // namespace gpu
}  // namespace modes
