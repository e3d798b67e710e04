// float32 throughout, one fused multiply-add at a time: no tensor core has it without rounding to tf32.
#include "cuda/mma_feed.cuh"
#include "cuda/mma_launch.cuh"

namespace modes {
namespace gpu {
namespace {

// A warp computes 32 rows by 32 columns of each half, a thread every fourth row and four columns of each half: 8 x 8
// sums.
template <bool kTransposed>
struct Shape : Stages<float, 64, 128, 128, 3, kTransposed> {
  static constexpr int kBlocks = 3;
};
constexpr int kThreadRows = 8, kThreadColumns = 4;
using Sums = float[kThreadRows][2][kThreadColumns];

// Where a thread's sums lie in a tile.
template <class S>
struct Place {
  int row;     // of the tile; then every fourth
  int column;  // of a half; then every eighth, transposed the next

  __device__ __forceinline__ Place() {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    row = warp / 2 * 32 + lane / 8;
    column = warp % 2 * 32 + (S::kTransposed ? lane % 8 * 4 : lane % 8);
  }
  __device__ __forceinline__ int row_of(int i) const { return row + i * 4; }
  __device__ __forceinline__ int column_of(int j) const { return column + (S::kTransposed ? j : j * 8); }
};

__device__ __forceinline__ void read_four(float (&to)[4], const unsigned char* shared) {
  const float4 four = *reinterpret_cast<const float4*>(shared);
  to[0] = four.x;
  to[1] = four.y;
  to[2] = four.z;
  to[3] = four.w;
}

// Four of a stage's 16 deep products.
template <class S>
__device__ __forceinline__ void multiply_piece(Sums& sums, const Place<S>& place, const unsigned char* stage,
                                               int piece) {
  // Four depths of a column, or, transposed, four columns at a depth: in either case [depth][column] below.
  float columns[2][4][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int place_of_half = half * S::kHalf + place.column_of(S::kTransposed ? 0 : j);
      read_four(columns[half][j],
                stage + S::kRowsBytes + (S::kTransposed ? S::depth_piece(piece * 4 + j, place_of_half / S::kPiece)
                                                        : S::row_piece(place_of_half, piece)));
    }
  }
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    float row[4];
    read_four(row, stage + S::row_piece(place.row_of(i), piece));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) {
          sums[i][half][j] += row[k] * (S::kTransposed ? columns[half][k][j] : columns[half][j][k]);
        }
      }
    }
  }
}

template <class S>
__device__ __forceinline__ void add_bias(Sums& sums, const Place<S>& place, const Work<float>& work, const Tile& tile) {
  if (!work.bias) return;
  const float* bias = work.bias + static_cast<int64_t>(tile.expert) * work.width;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) {
      const int64_t at = static_cast<int64_t>(tile.column_tile) * work.tile_step + (half ? work.second : 0) +
                         place.column_of(j) * work.spread;
      const float v = at < (half ? work.width : work.first_limit) ? bias[at] : 0.0f;
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) sums[i][half][j] += v;
    }
  }
}

// The four columns of a thread in one half of a row that begins at `to`. `width` is a multiple of four.
template <class S>
__device__ __forceinline__ void store_four(float* to, int64_t first, const Place<S>& place, int32_t width,
                                           const float (&values)[kThreadColumns]) {
  if (S::kTransposed) {
    const int64_t at = first + place.column_of(0);
    if (at < width) *reinterpret_cast<float4*>(to + at) = make_float4(values[0], values[1], values[2], values[3]);
  } else {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) {
      const int64_t at = first + place.column_of(j);
      if (at < width) to[at] = values[j];
    }
  }
}

template <class S, bool kGated>
__device__ __forceinline__ void store_row(const float (&sums)[2][kThreadColumns], float* to, const Place<S>& place,
                                          const Work<float>& work, const Tile& tile) {
  const Gating& gating = work.gating;
  const int64_t tile_column = static_cast<int64_t>(tile.column_tile) * (kGated ? S::kHalf : S::kColumns);
  if (!kGated) {
    store_four(to, tile_column, place, work.out_width, sums[0]);
    store_four(to, tile_column + S::kHalf, place, work.out_width, sums[1]);
  } else if (S::kTransposed && work.paired) {  // gate and up in turn: two results of four columns
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = tile_column + (half * S::kHalf + place.column) / 2;
      const float(&four)[kThreadColumns] = sums[half];
      if (at < work.out_width) {
        *reinterpret_cast<float2*>(to + at) =
            make_float2(gated<false>(gating, four[0], four[1]), gated<false>(gating, four[2], four[3]));
      }
    }
  } else {
    float results[kThreadColumns];
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) results[j] = gated<false>(gating, sums[0][j], sums[1][j]);
    store_four(to, tile_column, place, work.out_width, results);
  }
}

// kGated: the epilogue of gate_up, else of down.
template <class S, bool kGated>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) float_product(const __grid_constant__ Work<float> work) {
  unsigned char* const shared = dynamic_shared();
  const Place<S> place;
  Feed<S> feed(work, shared);
#pragma unroll 1
  for (int i = 0; i < S::kCount - 1; ++i) feed.fill();
  __syncthreads();
  int slot = 0;
  for (int i = 0;; ++i) {
    const Tile tile = Feed<S>::tile(shared, i);
    if (tile.expert < 0) break;
    Sums sums = {};
#pragma unroll 1
    for (int32_t depth = 0; depth < work.depth; depth += S::kDepth) {
      copy_wait<S::kCount - 2>();
      __syncthreads();
      feed.fill();  // the stage that all threads have read before this barrier
#pragma unroll 1  // unrolled, the reads of all pieces come first and spill
      for (int piece = 0; piece < 4; ++piece) multiply_piece(sums, place, shared + slot * S::kBytes, piece);
      slot = slot + 1 == S::kCount ? 0 : slot + 1;
    }
    add_bias(sums, place, work, tile);
#pragma unroll
    for (int row = 0; row < kThreadRows; ++row) {
      const int local = place.row_of(row);
      float* to = work.out + static_cast<int64_t>(tile.row + local) * work.out_width;
      if (local < tile.rows) store_row<S, kGated>(sums[row], to, place, work, tile);
    }
  }
  copy_wait<0>();
}

bool fits(const Problem& problem, const Device& device) {
  return device.major >= 8 && problem.activation_dtype == MODES_F32 && problem.weight_dtype == MODES_F32 &&
         device.shared_bytes >= Shape<false>::kSharedBytes && fits_pieces(problem, 4, 4);
}

template <bool kTransposed>
Error launch_layout(const Problem& problem, const Device& device, Stream stream) {
  using S = Shape<kTransposed>;
  const Work<float> gate_up = gate_up_work<float>(problem, S::kColumns, false);
  const Error failed = launch_product<S>(float_product<S, true>, gate_up, problem, device, stream);
  if (failed != kSuccess) return failed;
  return launch_product<S>(float_product<S, false>, down_work<float>(problem, S::kColumns), problem, device, stream);
}

Error launch_experts(const Problem& problem, const Device& device, Stream stream) {
  if (problem.transposed) return launch_layout<true>(problem, device, stream);
  return launch_layout<false>(problem, device, stream);
}

}  // namespace

const Path kFloatPath{"float", fits, launch_experts};

}  // namespace gpu
}  // namespace modes
