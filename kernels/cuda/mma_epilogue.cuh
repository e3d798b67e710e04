// From a warp's sums in registers to rows in memory: bias, activation, rounding, 16-byte stores.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/mma_work.cuh"

namespace modes {
namespace gpu {

// A warp has sums[m][n]: 16-row blocks by eight 8-column blocks, four of the tile's first half and four of its second.
constexpr int kHalfBlocks = 4;

// Lane c of four has word j in words[j] and gets word c of lanes 0..3, in their order.
__device__ __forceinline__ void transpose_words(uint32_t (&words)[4], int lane) {
  const bool high = (lane & 2) != 0, odd = (lane & 1) != 0;
  const uint32_t a = __shfl_xor_sync(kFullMask, high ? words[0] : words[2], 2);
  const uint32_t b = __shfl_xor_sync(kFullMask, high ? words[1] : words[3], 2);
  words[0] = high ? a : words[0];
  words[1] = high ? b : words[1];
  words[2] = high ? words[2] : a;
  words[3] = high ? words[3] : b;
  const uint32_t c = __shfl_xor_sync(kFullMask, odd ? words[0] : words[1], 1);
  const uint32_t d = __shfl_xor_sync(kFullMask, odd ? words[2] : words[3], 1);
  words[0] = odd ? c : words[0];
  words[1] = odd ? words[1] : c;
  words[2] = odd ? d : words[2];
  words[3] = odd ? words[3] : d;
}

template <class S, int kRowBlocks>
struct Epilogue {
  using T = typename S::T;
  using Sums = float[kRowBlocks][2 * kHalfBlocks][4];

  const Work<T>& work;
  Tile tile;
  int row;     // of the tile, the warp's first
  int column;  // of a half, the warp's first
  int lane;

  __device__ __forceinline__ void add_bias(Sums& sums) const {
    if (!work.bias) return;
    const T* bias = work.bias + static_cast<int64_t>(tile.expert) * work.width;
#pragma unroll
    for (int n = 0; n < 2 * kHalfBlocks; ++n) {
      const bool is_second = n >= kHalfBlocks;
      const int64_t at = static_cast<int64_t>(tile.column_tile) * work.tile_step + (is_second ? work.second : 0) +
                         column + n % kHalfBlocks * 8 + lane % 4 * 2;
      float low = 0.0f, high = 0.0f;
      if (at < (is_second ? work.width : work.first_limit)) {
        low = to_float(bias[at]);
        high = to_float(bias[at + 1]);
      }
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        sums[m][n][0] += low;
        sums[m][n][1] += high;
        sums[m][n][2] += low;
        sums[m][n][3] += high;
      }
    }
  }

  // Eight columns from `at` of a row of the warp.
  __device__ __forceinline__ void store(int m, int upper, int64_t at, const uint32_t (&words)[4]) const {
    const int local = row + m * 16 + upper * 8 + lane / 4;
    if (local >= tile.rows || at >= work.out_width) return;
    *reinterpret_cast<uint4*>(work.out + static_cast<int64_t>(tile.row + local) * work.out_width + at) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }

  __device__ __forceinline__ float gate_up(float gate, float up) const { return gated<true>(work.gating, gate, up); }

  // First halves are gate, second halves up, of S::kHalf columns of `out`.
  __device__ __forceinline__ void store_halves(const Sums& sums) const {
    const int64_t at = static_cast<int64_t>(tile.column_tile) * S::kHalf + column + lane % 4 * 8;
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        uint32_t words[4];
#pragma unroll
        for (int n = 0; n < kHalfBlocks; ++n) {
          const float(&gate)[4] = sums[m][n];
          const float(&up)[4] = sums[m][n + kHalfBlocks];
          words[n] = pack<T>(gate_up(gate[2 * upper], up[2 * upper]), gate_up(gate[2 * upper + 1], up[2 * upper + 1]));
        }
        transpose_words(words, lane);
        store(m, upper, at, words);
      }
    }
  }

  // Even columns are gate, odd columns up.
  __device__ __forceinline__ void store_pairs(const Sums& sums) const {
    const int c = lane % 4;
    const int64_t at =
        static_cast<int64_t>(tile.column_tile) * S::kHalf + c / 2 * (S::kHalf / 2) + column / 2 + c % 2 * 8;
    const bool odd = (lane & 1) != 0;
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        uint32_t words[4];
#pragma unroll
        for (int n = 0; n < kHalfBlocks; ++n) {
          // An even lane takes its own and its neighbour's result in the first block, an odd one in the second.
          const float(&first)[4] = sums[m][2 * n];
          const float(&second)[4] = sums[m][2 * n + 1];
          const float a = gate_up(first[2 * upper], first[2 * upper + 1]);
          const float b = gate_up(second[2 * upper], second[2 * upper + 1]);
          const float other = __shfl_xor_sync(kFullMask, odd ? a : b, 1);
          words[n] = odd ? pack<T>(other, b) : pack<T>(a, other);
        }
        transpose_words(words, lane);
        const uint32_t middle = words[1];
        words[1] = words[2];
        words[2] = middle;
        store(m, upper, at, words);
      }
    }
  }

  __device__ __forceinline__ void store_sums(const Sums& sums) const {
    const int64_t at = static_cast<int64_t>(tile.column_tile) * S::kColumns + column + lane % 4 * 8;
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t words[4];
#pragma unroll
          for (int n = 0; n < kHalfBlocks; ++n) {
            const float(&sum)[4] = sums[m][half * kHalfBlocks + n];
            words[n] = pack<T>(sum[2 * upper], sum[2 * upper + 1]);
          }
          transpose_words(words, lane);
          store(m, upper, at + half * S::kHalf, words);
        }
      }
    }
  }
};

}  // namespace gpu
}  // namespace modes
