// One grouped product, rows of an expert by columns of its weights, and how its tiles are found on the device.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/mma_gating.cuh"
#include "cuda/problem.h"

namespace modes {
namespace gpu {

// outputs of row r of expert e = weights[e] . rows[row_token ? row_token[r] : r], then the epilogue.
//
// The weight columns of a tile are two halves side by side. They follow one another in the weights, or the first is of
// gate columns and the second of the same columns of up (`second` away), so that both meet in one thread's registers.
template <class T>
struct Work {
  const int32_t* offsets;    // [experts + 1]
  int32_t experts;
  const T* rows;             // [*, depth]
  const int32_t* row_token;  // or null
  int32_t depth;
  const T* weights;          // [experts, width, depth], transposed [experts, depth, width]
  int32_t width;             // weight columns of an expert
  int32_t column_tiles;
  int32_t tile_step;         // weight columns from a tile's first half to the next tile's
  int32_t second;            // weight columns from a tile's first half to its second
  int32_t first_limit;       // columns of a first half end here, those of a second half at `width`
  int32_t spread;            // weight columns between neighbours in a half: 1, or 2 where gate and up are told apart
  const T* bias;             // [experts, width] or null
  T* out;                    // [*, out_width]
  int32_t out_width;
  bool paired;               // gate and up are neighbouring columns
  Gating gating;
};

// A tile as blocks of threads hand it on. expert < 0: there is no more.
struct Tile {
  int32_t expert, row, rows, column_tile;  // `rows` rows from row `row`
};

// The tiles of a grouped product in order: by expert, then by columns, then by rows, so that those that run at the same
// time share their weights. A block takes every gridDim.x-th. A warp finds them together.
class Walk {
 public:
  __device__ __forceinline__ Walk() : next_(static_cast<int32_t>(blockIdx.x)), first_expert_(0), before_(0) {}

  template <int kRows, class T>
  __device__ __forceinline__ Tile next(const Work<T>& work) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int32_t item = next_;
    next_ += static_cast<int32_t>(gridDim.x);
    for (; first_expert_ < work.experts; first_expert_ += 32) {
      const int32_t expert = first_expert_ + lane;
      int32_t begin = 0, end = 0;
      if (expert < work.experts) {
        begin = work.offsets[expert];
        end = work.offsets[expert + 1];
      }
      const int32_t tiles = (end - begin + kRows - 1) / kRows * work.column_tiles;
      int32_t through = tiles;
      for (int step = 1; step < 32; step *= 2) {
        const int32_t lower = __shfl_up_sync(kFullMask, through, step);
        if (lane >= step) through += lower;
      }
      const uint32_t reached = __ballot_sync(kFullMask, item < before_ + through);
      if (reached != 0) {
        const int owner = __ffs(static_cast<int>(reached)) - 1;
        const int32_t local = item - before_ - __shfl_sync(kFullMask, through - tiles, owner);
        begin = __shfl_sync(kFullMask, begin, owner);
        end = __shfl_sync(kFullMask, end, owner);
        const int32_t row_tiles = (end - begin + kRows - 1) / kRows;
        const int32_t column_tile = local / row_tiles;
        const int32_t row = begin + (local - column_tile * row_tiles) * kRows;
        return Tile{first_expert_ + owner, row, end - row < kRows ? end - row : kRows, column_tile};
      }
      before_ += __shfl_sync(kFullMask, through, 31);
    }
    return Tile{-1, 0, 0, 0};
  }

 private:
  int32_t next_;          // the tile that is asked for next
  int32_t first_expert_;  // no tile of an expert before this one is left
  int32_t before_;        // tiles of the experts before it
};

}  // namespace gpu
}  // namespace modes
