// The grouped product on tensor cores: rows of an expert by its weights, from the feed's stages to the epilogue.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/mma_epilogue.cuh"
#include "cuda/mma_feed.cuh"

namespace modes {
namespace gpu {

// A block of warps, kWarpRows by kWarpColumns; a warp computes 32 columns of each half. kBlocks: of one multiprocessor.
template <class T, bool kTransposed>
struct LargeShape : Stages<T, 128, 256, 256, 4, kTransposed> {
  static constexpr int kWarpRows = 2, kWarpColumns = 4, kBlocks = 1;
};
template <class T, bool kTransposed>
struct SmallShape : Stages<T, 64, 128, 128, 4, kTransposed> {
  static constexpr int kWarpRows = 2, kWarpColumns = 2, kBlocks = 3;
};

template <int kRowBlocks>
struct Fragments {
  uint32_t rows[kRowBlocks][4];
  uint32_t columns[2 * kHalfBlocks][2];
};

// Where a warp reads its 16 of a stage's 32 deep rows and columns. The swizzle depends on the lane only.
template <class S>
class Reader {
  static constexpr int kRowBlocks = S::kRows / S::kWarpRows / 16;

 public:
  __device__ __forceinline__ Reader(int row, int column, int lane) {
    rows_ = S::row_piece(row + lane % 16, lane / 16);
    if (S::kTransposed) {
      columns_ = S::kRowsBytes + S::depth_piece(lane % 16, column / 8 + lane / 16);
    } else {
      columns_ = S::kRowsBytes + S::row_piece(column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }
  }

  template <int kDeep>
  __device__ __forceinline__ void read(Fragments<kRowBlocks>& to, const unsigned char* stage) const {
    // Two pieces deeper, and two pieces to the right: one bit of the swizzled place.
    const unsigned char* rows = stage + (rows_ ^ (kDeep * 32));
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) load_matrices(to.rows[m], rows + m * 16 * 64);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int pair = 0; pair < kHalfBlocks / 2; ++pair) {
        uint32_t four[4];
        if (S::kTransposed) {
          load_matrices_transposed(
              four, stage + (columns_ ^ (pair * 32)) + kDeep * 16 * S::kColumnBytes + half * S::kColumnBytes / 2);
        } else {
          load_matrices(four, stage + (columns_ ^ (kDeep * 32)) + (half * S::kHalf + pair * 16) * 64);
        }
        const int n = half * kHalfBlocks + pair * 2;
        to.columns[n][0] = four[0];
        to.columns[n][1] = four[1];
        to.columns[n + 1][0] = four[2];
        to.columns[n + 1][1] = four[3];
      }
    }
  }

 private:
  int rows_, columns_;
};

template <class T, int kRowBlocks>
__device__ __forceinline__ void multiply_fragments(float (&sums)[kRowBlocks][2 * kHalfBlocks][4],
                                                   const Fragments<kRowBlocks>& fragments) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int i = 0; i < 2 * kHalfBlocks; ++i) {
      const int n = m % 2 ? 2 * kHalfBlocks - 1 - i : i;  // back and forth: a fragment is used again at the turn
      multiply<T>(sums[m][n], fragments.rows[m], fragments.columns[n]);
    }
  }
}

// kGated: the epilogue of gate_up, else of down.
template <class S, bool kGated>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    mma_product(const __grid_constant__ Work<typename S::T> work) {
  using T = typename S::T;
  constexpr int kRowBlocks = S::kRows / S::kWarpRows / 16;
  unsigned char* const shared = dynamic_shared();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int row = warp / S::kWarpColumns * (S::kRows / S::kWarpRows), column = warp % S::kWarpColumns * 32;
  const Reader<S> reader(row, column, lane);
  Feed<S> feed(work, shared);
#pragma unroll 1
  for (int i = 0; i < S::kCount - 1; ++i) feed.fill();
  copy_wait<S::kCount - 2>();
  __syncthreads();
  Fragments<kRowBlocks> now, deeper;
  int slot = 0;
  reader.template read<0>(now, shared);

  for (int i = 0;; ++i) {
    if (Feed<S>::tile(shared, i).expert < 0) break;
    // A warp without rows keeps the others company, and leaves them the tensor cores.
    const bool has_rows = row < Feed<S>::tile(shared, i).rows;
    float sums[kRowBlocks][2 * kHalfBlocks][4] = {};
#pragma unroll 1
    for (int32_t depth = 0; depth < work.depth; depth += S::kDepth) {
      reader.template read<1>(deeper, shared + slot * S::kBytes);
      feed.fill();  // the stage that all warps have read before the last barrier
      if (has_rows) multiply_fragments<T>(sums, now);
      copy_wait<S::kCount - 2>();
      __syncthreads();
      slot = slot + 1 == S::kCount ? 0 : slot + 1;
      reader.template read<0>(now, shared + slot * S::kBytes);  // of the next tile, maybe
      if (has_rows) multiply_fragments<T>(sums, deeper);
    }
    const Epilogue<S, kRowBlocks> epilogue{work, Feed<S>::tile(shared, i), row, column, lane};
    if (!has_rows) continue;
    epilogue.add_bias(sums);
    if (!kGated) {
      epilogue.store_sums(sums);
    } else if (work.paired) {
      epilogue.store_pairs(sums);
    } else {
      epilogue.store_halves(sums);
    }
  }
  copy_wait<0>();
}

}  // namespace gpu
}  // namespace modes
