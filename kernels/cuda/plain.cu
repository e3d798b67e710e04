// The path that computes everything: any dtypes, layouts, sizes and alignment of the weights. Tiles of x and of weights
// are widened to float32 in shared memory; each thread multiplies and adds, in order of k.
#include <cstring>

#include "cuda/activation.cuh"
#include "cuda/device.cuh"
#include "cuda/path.h"

namespace modes {
namespace gpu {
namespace {

constexpr int kTile = 32;  // rows, columns and depth of a tile
constexpr int kThreads = 256;
constexpr int kRows = kTile * kTile / kThreads;  // of a thread, all in one column
constexpr int kBlocksPerProcessor = 4;

using Tile = float[kTile][kTile + 1];

// Element i of what need not be aligned.
template <class W>
__device__ __forceinline__ float read(const W* base, int64_t i, bool aligned) {
  if (aligned) return to_float(base[i]);
  unsigned char bytes[sizeof(W)];
  for (int b = 0; b < static_cast<int>(sizeof(W)); ++b) bytes[b] = reinterpret_cast<const unsigned char*>(base + i)[b];
  W value;
  memcpy(&value, bytes, sizeof value);
  return to_float(value);
}

template <class W>
__device__ __forceinline__ bool is_aligned(const W* base) {
  return reinterpret_cast<uintptr_t>(base) % sizeof(W) == 0;
}

// One expert's matrix [columns, depth], or [depth, columns] when transposed.
template <class W>
struct Matrix {
  const W* elements;
  int64_t columns, depth;
  bool transposed, aligned;

  // tile[c][d] = element (column(c), first_depth + d), zero outside of the depth or where column(c) is negative. The
  // threads of a warp read what lies side by side.
  template <class Column>
  __device__ __forceinline__ void load(Tile& tile, const Column& column, int64_t first_depth) const {
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int c = transposed ? i % kTile : i / kTile, d = transposed ? i / kTile : i % kTile;
      const int64_t at = column(c), down = first_depth + d;
      const bool inside = at >= 0 && down < depth;
      tile[c][d] = inside ? read(elements, transposed ? down * columns + at : at * depth + down, aligned) : 0.0f;
    }
  }
};

// Rows of one expert, up to kTile, and where they come from: by their token, or one after the other.
template <class A>
struct Rows {
  const A* elements;
  const int32_t* row_token;  // null: row r is the r-th
  int64_t first, last, width;

  __device__ __forceinline__ void load(Tile& tile, int64_t first_depth) const {
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int64_t row = first + i / kTile, column = first_depth + i % kTile;
      float value = 0.0f;
      if (row < last && column < width) {
        value = to_float(elements[(row_token ? row_token[row] : row) * width + column]);
      }
      tile[i / kTile][i % kTile] = value;
    }
  }
};

// Calls work(expert, first row, last row, column tile) for the block's share of all tiles: they are dealt in turn.
template <class Work>
__device__ __forceinline__ void for_tiles(const Routed& routed, int64_t columns, const Work& work) {
  const int64_t column_tiles = (columns + kTile - 1) / kTile;
  int64_t tile = blockIdx.x;  // counted from the first tile of the expert on
  for (int a = 0; a < *routed.active_count; ++a) {
    const int expert = routed.active[a];
    const int64_t first = routed.offsets[expert], last = routed.offsets[expert + 1];
    const int64_t tiles = (last - first + kTile - 1) / kTile * column_tiles;
    for (; tile < tiles; tile += gridDim.x) work(expert, first + tile / column_tiles * kTile, last, tile % column_tiles);
    tile -= tiles;
  }
}

template <class A, class W>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) plain_gate_up(const __grid_constant__ Problem in) {
  __shared__ Tile x, gate_tile, up_tile;
  wait_for_previous_kernel();
  const int64_t H = in.hidden, I = in.intermediate;
  const int column = threadIdx.x % kTile, first_row = threadIdx.x / kTile * kRows;
  const W* const weights = static_cast<const W*>(in.gate_up);
  const W* const bias = static_cast<const W*>(in.gate_up_bias);
  for_tiles(in.routed, I, [&](int expert, int64_t first, int64_t last, int64_t column_tile) {
    const Rows<A> rows{static_cast<const A*>(in.x), in.routed.row_token, first, last, H};
    const Matrix<W> matrix{weights + expert * 2 * I * H, 2 * I, H, in.transposed != 0, is_aligned(weights)};
    const auto gate_at = [&](int64_t i) { return i >= I ? -1 : in.interleaved ? 2 * i : i; };
    const auto up_at = [&](int64_t i) { return i >= I ? -1 : in.interleaved ? 2 * i + 1 : I + i; };
    const int64_t first_column = column_tile * kTile;
    float gate[kRows] = {}, up[kRows] = {};
    for (int64_t depth = 0; depth < H; depth += kTile) {
      rows.load(x, depth);
      matrix.load(gate_tile, [&](int c) { return gate_at(first_column + c); }, depth);
      matrix.load(up_tile, [&](int c) { return up_at(first_column + c); }, depth);
      __syncthreads();
      for (int d = 0; d < kTile; ++d) {
        for (int r = 0; r < kRows; ++r) {
          gate[r] += x[first_row + r][d] * gate_tile[column][d];
          up[r] += x[first_row + r][d] * up_tile[column][d];
        }
      }
      __syncthreads();
    }
    const int64_t i = first_column + column;
    if (i >= I) return;
    const int64_t biases = expert * 2 * I;
    const float gate_bias = bias ? read(bias, biases + gate_at(i), is_aligned(bias)) : 0.0f;
    const float up_bias = bias ? read(bias, biases + up_at(i), is_aligned(bias)) : 0.0f;
    for (int r = 0; r < kRows && first + first_row + r < last; ++r) {
      const float inner = activate(in.activation, in.alpha, in.limit, gate[r] + gate_bias, up[r] + up_bias);
      static_cast<A*>(in.inner)[(first + first_row + r) * I + i] = from_float<A>(inner);
    }
  });
}

template <class A, class W>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) plain_down(const __grid_constant__ Problem in) {
  __shared__ Tile x, tile;
  wait_for_previous_kernel();
  const int64_t H = in.hidden, I = in.intermediate;
  const int column = threadIdx.x % kTile, first_row = threadIdx.x / kTile * kRows;
  const W* const weights = static_cast<const W*>(in.down);
  const W* const bias = static_cast<const W*>(in.down_bias);
  for_tiles(in.routed, H, [&](int expert, int64_t first, int64_t last, int64_t column_tile) {
    const Rows<A> rows{static_cast<const A*>(in.inner), nullptr, first, last, I};
    const Matrix<W> matrix{weights + expert * I * H, H, I, in.transposed != 0, is_aligned(weights)};
    const int64_t first_column = column_tile * kTile;
    float sum[kRows] = {};
    for (int64_t depth = 0; depth < I; depth += kTile) {
      rows.load(x, depth);
      matrix.load(tile, [&](int c) { return first_column + c < H ? first_column + c : -1; }, depth);
      __syncthreads();
      for (int d = 0; d < kTile; ++d) {
        for (int r = 0; r < kRows; ++r) sum[r] += x[first_row + r][d] * tile[column][d];
      }
      __syncthreads();
    }
    const int64_t i = first_column + column;
    if (i >= H) return;
    const float own_bias = bias ? read(bias, expert * H + i, is_aligned(bias)) : 0.0f;
    for (int r = 0; r < kRows && first + first_row + r < last; ++r) {
      static_cast<A*>(in.outputs)[(first + first_row + r) * H + i] = from_float<A>(sum[r] + own_bias);
    }
  });
}

template <class A, class W>
Error launch_for(const Problem& problem, const Device& device, Stream stream) {
  const Launch how{int64_t{kBlocksPerProcessor} * device.processors, kThreads, 0, stream, device.major >= 9};
  const Error failed = launch(plain_gate_up<A, W>, how, problem);
  return failed == kSuccess ? launch(plain_down<A, W>, how, problem) : failed;
}

template <class A>
Error launch_for(const Problem& problem, const Device& device, Stream stream) {
  if (problem.weight_dtype == MODES_F32) return launch_for<A, float>(problem, device, stream);
  if (problem.weight_dtype == MODES_F16) return launch_for<A, f16>(problem, device, stream);
  return launch_for<A, bf16>(problem, device, stream);
}

Error launch_plain(const Problem& problem, const Device& device, Stream stream) {
  if (problem.activation_dtype == MODES_F32) return launch_for<float>(problem, device, stream);
  if (problem.activation_dtype == MODES_F16) return launch_for<f16>(problem, device, stream);
  return launch_for<bf16>(problem, device, stream);
}

bool fits_plain(const Problem&, const Device&) { return true; }

}  // namespace

const Path kPlainPath = {"plain", fits_plain, launch_plain};

}  // namespace gpu
}  // namespace modes
