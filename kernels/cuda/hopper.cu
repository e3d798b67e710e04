// Many tokens on Hopper (sm_90a): products of whole warpgroups on tiles that tensor loads bring, by blocks that stay.
//
// Each block has one processor to itself and computes every gridDim.x-th tile. One of its warpgroups loads, through a
// ring of stages that runs on across tiles; two multiply. Weights are used as they are: the accumulators of a tile of
// gate_up are 128 columns of gate and the same 128 of up, so that the activation has both in one thread's registers.
// Rows of x are gathered while they are loaded. A tile runs past its expert's last row; what it computes there is not
// stored.
#include "cuda/hopper_consumer.cuh"
#include "cuda/hopper_loader.cuh"
#include "cuda/mma_gating.cuh"
#include "cuda/path.h"
#include "cuda/tensor_map.h"

#include <algorithm>

// For other architectures of the same library the kernels are empty.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MODES_EMULATED)
#define MODES_HOPPER_KERNELS 1
#else
#define MODES_HOPPER_KERNELS 0
#endif

namespace modes {
namespace gpu {
namespace {

using namespace hopper;

constexpr int kGateUpColumns = kBoxRows;

// act(gate, up). The activation that most models have is spared the constants of the others.
template <bool kSilu>
__device__ __forceinline__ float activated(const Gating& gating, float gate, float up) {
  if (kSilu) return quotient_fast(gate, 1.0f + exponential_fast(-gate)) * up;
  return gated<true>(gating, gate, up);
}

int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

template <class T, bool kSilu>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_gate_up(const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up, const Problem problem,
                   const Gating gating) {
#if MODES_HOPPER_KERNELS
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int experts = static_cast<int>(problem.experts), intermediate = static_cast<int>(problem.intermediate);
  const int column_tiles = (intermediate + kGateUpColumns - 1) / kGateUpColumns;
  const int steps = static_cast<int>((problem.hidden + kDepth - 1) / kDepth);
  if (threadIdx.x == 0) {
    prefetch_map(gate);
    prefetch_map(up);
  }
  prepare(shared, problem.routed, experts, kGatherArrivals);

  const int warp = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < 4) {
    registers_fewer<kLoaderRegisters>();
    load_gate_up<T>(shared, gate, up, problem, column_tiles);
    return;
  }
  registers_more<kConsumerRegisters>();
  const int consumer = warp / 4 - 1, lane = threadIdx.x % 32;
  const int own_row = consumer * 64 + warp % 4 * 16;  // of the tile: the warp's first
  const int64_t bias_step = problem.interleaved ? 2 : 1, bias_up = problem.interleaved ? 1 : intermediate;
  float sums[kTileColumns / 2] = {};
  Place at;
  Tile tile;
  for (int index = blockIdx.x; find_tile(shared, experts, column_tiles, index, tile); index += gridDim.x) {
    const int column0 = tile.column_tile * kGateUpColumns;
    uint32_t gate_bias[kGateUpColumns / 64], up_bias[kGateUpColumns / 64];
#pragma unroll
    for (int block = 0; block < kGateUpColumns / 64; ++block) {  // here, so that they arrive meanwhile
      const int column = column0 + block * 64 + lane * 2;
      const bool inside = problem.gate_up_bias && column < intermediate;
      const T* bias = static_cast<const T*>(problem.gate_up_bias) + int64_t{tile.expert} * 2 * intermediate;
      gate_bias[block] = inside ? load_pair(bias + column * bias_step, bias_step) : 0;
      up_bias[block] = inside ? load_pair(bias + column * bias_step + bias_up, bias_step) : 0;
    }
    multiply_tile<T>(shared, at, steps, consumer, consumer * 64 < tile.rows, sums);
    if (own_row >= tile.rows) continue;
#pragma unroll
    for (int block = 0; block < kGateUpColumns / 64; ++block) {
      uint32_t words[2][8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float2 gate_added = unpack<T>(__shfl_sync(kFullMask, gate_bias[block], 4 * c + lane % 4));
        const float2 up_added = unpack<T>(__shfl_sync(kFullMask, up_bias[block], 4 * c + lane % 4));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at_gate = (block * 64 + 8 * c) / 2 + 2 * half, at_up = at_gate + kGateUpColumns / 2;
          words[half][c] =
              pack<T>(activated<kSilu>(gating, sums[at_gate] + gate_added.x, sums[at_up] + up_added.x),
                      activated<kSilu>(gating, sums[at_gate + 1] + gate_added.y, sums[at_up + 1] + up_added.y));
        }
      }
      const int column = column0 + block * 64;
      T* to = static_cast<T*>(problem.inner) + int64_t{tile.row + own_row} * intermediate + column;
      store_block(shared.results[warp - 4], words, to, intermediate, tile.rows - own_row, intermediate - column);
    }
  }
#endif
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_down(const __grid_constant__ TensorMap inner, const __grid_constant__ TensorMap down,
                const Problem problem) {
#if MODES_HOPPER_KERNELS
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int experts = static_cast<int>(problem.experts), hidden = static_cast<int>(problem.hidden);
  const int column_tiles = (hidden + kTileColumns - 1) / kTileColumns;
  const int steps = static_cast<int>((problem.intermediate + kDepth - 1) / kDepth);
  if (threadIdx.x == 0) {
    prefetch_map(inner);
    prefetch_map(down);
  }
  prepare(shared, problem.routed, experts, 1);

  const int warp = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < 4) {
    registers_fewer<kLoaderRegisters>();
    if (warp == 0) load_down(shared, inner, down, problem, column_tiles);
    return;
  }
  registers_more<kConsumerRegisters>();
  const int consumer = warp / 4 - 1, lane = threadIdx.x % 32;
  const int own_row = consumer * 64 + warp % 4 * 16;
  float sums[kTileColumns / 2] = {};
  Place at;
  Tile tile;
  for (int index = blockIdx.x; find_tile(shared, experts, column_tiles, index, tile); index += gridDim.x) {
    const int column0 = tile.column_tile * kTileColumns;
    uint32_t bias[kTileColumns / 64];
#pragma unroll
    for (int block = 0; block < kTileColumns / 64; ++block) {
      const int column = column0 + block * 64 + lane * 2;
      const bool inside = problem.down_bias && column < hidden;
      const T* from = static_cast<const T*>(problem.down_bias) + int64_t{tile.expert} * hidden + column;
      bias[block] = inside ? load_pair(from, 1) : 0;
    }
    multiply_tile<T>(shared, at, steps, consumer, consumer * 64 < tile.rows, sums);
    if (own_row >= tile.rows) continue;
#pragma unroll
    for (int block = 0; block < kTileColumns / 64; ++block) {
      uint32_t words[2][8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float2 added = unpack<T>(__shfl_sync(kFullMask, bias[block], 4 * c + lane % 4));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at_sum = (block * 64 + 8 * c) / 2 + 2 * half;
          words[half][c] = pack<T>(sums[at_sum] + added.x, sums[at_sum + 1] + added.y);
        }
      }
      const int column = column0 + block * 64;
      T* to = static_cast<T*>(problem.outputs) + int64_t{tile.row + own_row} * hidden + column;
      store_block(shared.results[warp - 4], words, to, hidden, tile.rows - own_row, hidden - column);
    }
  }
#endif
}

bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Few tokens are the decode path's, which comes before this one in the list.
bool fits(const Problem& p, const Device& device) {
  if (device.major != 9 || device.minor != 0 || device.shared_bytes < static_cast<int>(sizeof(Shared))) return false;
  if (p.activation_dtype != p.weight_dtype || p.weight_dtype == MODES_F32 || p.transposed) return false;
  if (p.hidden % 8 != 0 || p.intermediate % 8 != 0 || p.experts > kMostExperts) return false;
  if (!aligned(p.x, 16) || !aligned(p.gate_up, 16) || !aligned(p.down, 16)) return false;
  if (!aligned(p.gate_up_bias, 2) || !aligned(p.down_bias, 2)) return false;
  // Sizes, rows and indices of tiles, with a grid's step to spare, are 32-bit.
  constexpr int64_t kMost = int64_t{1} << 30;
  const int64_t columns = std::max(tiles_of(p.hidden, kTileColumns), tiles_of(p.intermediate, kGateUpColumns));
  return p.hidden <= kMost && p.intermediate <= kMost && p.tokens <= kMost / p.top_k &&
         columns <= kMost / (p.experts + tiles_of(p.tokens * p.top_k, kTileRows));
}

template <class T>
Error launch_typed(const Problem& p, const Device& device, Stream stream) {
  const uint64_t hidden = static_cast<uint64_t>(p.hidden), intermediate = static_cast<uint64_t>(p.intermediate);
  const uint64_t experts = static_cast<uint64_t>(p.experts), rows = static_cast<uint64_t>(p.tokens * p.top_k);
  const uint32_t box[3] = {kDepth, kBoxRows, 1};
  const uint32_t inner_box[2] = {kDepth, kTileRows};

  // Gate and up are two tensors of [E, I, H] in one, with rows apart where they are interleaved.
  const uint64_t apart = p.interleaved ? 2 : 1, up_from = p.interleaved ? 1 : intermediate;
  const uint64_t gate_sizes[3] = {hidden, intermediate, experts};
  const uint64_t gate_strides[2] = {apart * hidden * sizeof(T), 2 * intermediate * hidden * sizeof(T)};
  const T* gate_weights = static_cast<const T*>(p.gate_up);
  const uint64_t down_sizes[3] = {intermediate, hidden, experts};
  const uint64_t down_strides[2] = {intermediate * sizeof(T), hidden * intermediate * sizeof(T)};
  const uint64_t inner_sizes[2] = {intermediate, rows};
  const uint64_t inner_strides[1] = {intermediate * sizeof(T)};
  TensorMap gate, up, down, inner;
  const int32_t dtype = p.weight_dtype;
  Error failed = make_tensor_map(&gate, gate_weights, dtype, 3, gate_sizes, gate_strides, box, Swizzle::k128Bytes);
  if (failed == kSuccess) {
    failed = make_tensor_map(&up, gate_weights + up_from * hidden, dtype, 3, gate_sizes, gate_strides, box,
                             Swizzle::k128Bytes);
  }
  if (failed == kSuccess) {
    failed = make_tensor_map(&down, p.down, dtype, 3, down_sizes, down_strides, box, Swizzle::k128Bytes);
  }
  if (failed == kSuccess) {
    failed = make_tensor_map(&inner, p.inner, dtype, 2, inner_sizes, inner_strides, inner_box, Swizzle::k128Bytes);
  }
  if (failed != kSuccess) return failed;

  const auto blocks = [&](int64_t column_tiles) {
    const int64_t row_tiles = std::min(p.experts + tiles_of(p.tokens * p.top_k, kTileRows), p.tokens * p.top_k);
    return std::min<int64_t>(device.processors, column_tiles * row_tiles);
  };
  constexpr int kSharedBytes = static_cast<int>(sizeof(Shared));
  Launch how{blocks(tiles_of(p.intermediate, kGateUpColumns)), kThreads, kSharedBytes, stream, true};
  const auto kernel = p.activation == MODES_SILU ? hopper_gate_up<T, true> : hopper_gate_up<T, false>;
  failed = launch(kernel, how, gate, up, p, gating_of(p));
  if (failed != kSuccess) return failed;
  how.blocks = blocks(tiles_of(p.hidden, kTileColumns));
  return launch(hopper_down<T>, how, inner, down, p);
}

Error launch_experts(const Problem& problem, const Device& device, Stream stream) {
  if (problem.tokens == 0) return kSuccess;
  if (problem.weight_dtype == MODES_BF16) return launch_typed<bf16>(problem, device, stream);
  return launch_typed<f16>(problem, device, stream);
}

}  // namespace

const Path kHopperPath{"hopper", fits, launch_experts};

}  // namespace gpu
}  // namespace modes
