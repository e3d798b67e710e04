// How the Hopper kernels cut a grouped product into tiles, and what of a tile is in shared memory.
#pragma once

#include "cuda/hopper_device.cuh"
#include "cuda/problem.h"

namespace modes {
namespace gpu {
namespace hopper {

// One warpgroup loads, two multiply, 64 rows of the tile each; one block per processor.
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kLoaderRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kLoaderRegisters + kConsumers * kConsumerRegisters) <= 65536, "a processor's registers");

constexpr int kTileRows = 64 * kConsumers;
constexpr int kTileColumns = 256;  // columns of accumulators: rows of the weights
constexpr int kBoxRows = 128;      // rows of the weights in one tensor load, two a stage
constexpr int kDepth = 64;         // elements of k in a stage: rows of 128 bytes, swizzled
constexpr int kStages = 4;
constexpr int kRowBytes = 128;
constexpr int kWeightBytes = kTileColumns * kRowBytes;
constexpr int kInputBytes = kTileRows * kRowBytes;
constexpr int kMostExperts = 1024;
constexpr int kBlockBytes = 16 * kRowBytes;  // a warp's results on their way out: 16 rows of 64 elements

struct Shared {
  unsigned char inputs[kStages][kInputBytes];    // rows of activations
  unsigned char weights[kStages][kWeightBytes];  // two boxes, one below the other: one product's 256 rows
  unsigned char results[kConsumers * 4][kBlockBytes];
  Barrier full[kStages], empty[kStages];
  int32_t offsets[kMostExperts + 1];     // routed.offsets
  int32_t first_tile[kMostExperts + 1];  // row tiles of the experts before
};

static_assert(sizeof(Shared) <= 227 * 1024, "what a block can have on sm_90");

// A stage of the ring, and the parity of its barriers' phase in this round.
struct Place {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// Rows from `row` on, of which `rows` are the expert's (more than kTileRows, or fewer: the others are not stored), by
// the columns from column_tile * width on.
struct Tile {
  int expert = 0, row = 0, rows = 0, column_tile = 0;
};

// Every thread of the block, once, before it reads what other kernels wrote. `full_arrivals`: a stage's, in a phase.
__device__ __forceinline__ void prepare(Shared& shared, const Routed& routed, int experts, int full_arrivals) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.full[s], full_arrivals);
      barrier_init(&shared.empty[s], kConsumers * 4);  // one of each warp
    }
    barrier_init_done();
  }
  wait_for_previous_kernel();
  allow_next_kernel();
  for (int e = threadIdx.x; e <= experts; e += kThreads) shared.offsets[e] = routed.offsets[e];
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int before = 0;
    for (int e0 = 0; e0 < experts; e0 += 32) {
      const int e = e0 + lane;
      int sum = e < experts ? (shared.offsets[e + 1] - shared.offsets[e] + kTileRows - 1) / kTileRows : 0;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int left = __shfl_up_sync(kFullMask, sum, distance);
        if (lane >= distance) sum += left;
      }
      if (e < experts) shared.first_tile[e + 1] = before + sum;
      before += __shfl_sync(kFullMask, sum, 31);
    }
    if (lane == 0) shared.first_tile[0] = 0;
  }
  __syncthreads();
}

// The tile of this index, in the order expert, column tile, row tile: blocks that run at the same time share weights.
// Called by whole warps, with `tile` as the call before left it (indices only grow). False past the last tile.
__device__ __forceinline__ bool find_tile(const Shared& shared, int experts, int column_tiles, int index, Tile& tile) {
  const int lane = threadIdx.x % 32;
  const int row_tiles_before = index / column_tiles;
  int passed;
  do {  // experts that end before it
    const int e = tile.expert + lane;
    const bool ends_before = e < experts && shared.first_tile[e + 1] <= row_tiles_before;
    passed = __popc(__ballot_sync(kFullMask, ends_before));
    tile.expert += passed;
  } while (passed == 32);
  if (tile.expert >= experts) return false;
  const int first = shared.first_tile[tile.expert];
  const int row_tiles = shared.first_tile[tile.expert + 1] - first;
  const int within = index - first * column_tiles;
  tile.column_tile = within / row_tiles;
  const int skipped_rows = (within % row_tiles) * kTileRows;
  tile.row = shared.offsets[tile.expert] + skipped_rows;
  tile.rows = shared.offsets[tile.expert + 1] - tile.row;
  return true;
}

}  // namespace hopper
}  // namespace gpu
}  // namespace modes
