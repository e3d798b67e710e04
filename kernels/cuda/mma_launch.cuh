// What the paths of grouped products share on the host: whether they fit, their two products, and their grids.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/mma_work.cuh"
#include "cuda/path.h"

namespace modes {
namespace gpu {

inline bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Rows of `piece` elements at a time from aligned pointers, and sizes that kernels keep in 32 bits.
inline bool fits_pieces(const Problem& problem, int64_t piece, uintptr_t element) {
  constexpr int64_t kMost = int64_t{1} << 29;
  return problem.hidden % piece == 0 && problem.intermediate % piece == 0 && problem.hidden <= kMost &&
         problem.intermediate <= kMost && problem.experts <= kMost && problem.tokens * problem.top_k <= kMost &&
         aligned(problem.x, 16) && aligned(problem.gate_up, 16) && aligned(problem.down, 16) &&
         aligned(problem.gate_up_bias, element) && aligned(problem.down_bias, element);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The most tiles there can be, as all that the host knows is that there are at most T * k rows.
inline int64_t most_tiles(const Problem& problem, int64_t rows, int64_t column_tiles) {
  const int64_t pairs = problem.tokens * problem.top_k;
  return (pairs / rows + std::min(problem.experts, pairs)) * column_tiles;
}

// `columns` weight columns a tile. Interleaved gate and up lie in a tile as they do in the weights, for an epilogue of
// neighbours, with `pairs_in_tiles` or where 16 bytes hold both; else each is loaded into a half of its own.
template <class T>
Work<T> gate_up_work(const Problem& problem, int32_t columns, bool pairs_in_tiles) {
  Work<T> work{};
  const auto intermediate = static_cast<int32_t>(problem.intermediate);
  work.offsets = problem.routed.offsets;
  work.experts = static_cast<int32_t>(problem.experts);
  work.rows = static_cast<const T*>(problem.x);
  work.row_token = problem.routed.row_token;
  work.depth = static_cast<int32_t>(problem.hidden);
  work.weights = static_cast<const T*>(problem.gate_up);
  work.width = 2 * intermediate;
  work.column_tiles = static_cast<int32_t>(divide_up(intermediate, columns / 2));
  work.spread = 1;
  work.paired = problem.interleaved && (pairs_in_tiles || problem.transposed);
  if (work.paired) {
    work.tile_step = columns;
    work.second = columns / 2;
    work.first_limit = work.width;
  } else if (problem.interleaved) {
    work.tile_step = columns;
    work.second = 1;
    work.first_limit = work.width;
    work.spread = 2;
  } else {
    work.tile_step = columns / 2;
    work.second = intermediate;
    work.first_limit = intermediate;
  }
  work.bias = static_cast<const T*>(problem.gate_up_bias);
  work.out = static_cast<T*>(problem.inner);
  work.out_width = intermediate;
  work.gating = gating_of(problem);
  return work;
}

template <class T>
Work<T> down_work(const Problem& problem, int32_t columns) {
  Work<T> work{};
  work.offsets = problem.routed.offsets;
  work.experts = static_cast<int32_t>(problem.experts);
  work.rows = static_cast<const T*>(problem.inner);
  work.depth = static_cast<int32_t>(problem.intermediate);
  work.weights = static_cast<const T*>(problem.down);
  work.width = static_cast<int32_t>(problem.hidden);
  work.column_tiles = static_cast<int32_t>(divide_up(problem.hidden, columns));
  work.tile_step = columns;
  work.second = columns / 2;
  work.first_limit = work.width;
  work.spread = 1;
  work.bias = static_cast<const T*>(problem.down_bias);
  work.out = static_cast<T*>(problem.outputs);
  work.out_width = work.width;
  return work;
}

// As many blocks as run at the same time; each takes tiles until there are none. The runtime keeps 1 KiB a block.
template <class S, class T>
Error launch_product(void (*kernel)(Work<T>), const Work<T>& work, const Problem& problem, const Device& device,
                     Stream stream) {
  const int together = std::max(1, std::min(S::kBlocks, (device.shared_bytes + 1024) / (S::kSharedBytes + 1024)));
  const int64_t tiles = most_tiles(problem, S::kRows, work.column_tiles);
  const int64_t blocks = std::min<int64_t>(tiles, static_cast<int64_t>(device.processors) * together);
  return launch(kernel, Launch{blocks, S::kThreads, S::kSharedBytes, stream}, work);
}

}  // namespace gpu
}  // namespace modes
