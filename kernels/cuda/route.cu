// Compiled with --fmad=false (emulated: -ffp-contract=off), see common/route.h.
//
// Pairs are in token order, and so are the rows of an expert: a pair's row is the expert's first row, plus the kept pairs
// of that expert in blocks before its own, in warps before its own, and before it in its warp. Each warp has a contiguous
// section of the block's pairs and counts in its own counters, so that no order depends on time.
#include "cuda/route.cuh"

#include "common/route.h"
#include "cuda/device.cuh"

namespace modes {
namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlockPairs = 2048;  // of a block; as many or fewer are done by one block alone
constexpr int kSharedGroups = 64;  // groups that a block counts in shared memory

struct Pairs {
  int64_t experts, groups;
  int32_t pairs, top_k;
  int32_t activation_dtype;
  bool wide_ids, per_expert;
  const void* ids;      // of the first token's pairs on
  const void* weights;  // the same
  const float* score;   // the same, or null
  const int32_t* group;  // of the first token on
  const float* tau;
  const float* score_scale;
  int32_t* kept;  // [G] int64, of which only the lower halves are added to: there are fewer than 2^31 pairs; or null
  int32_t section;  // pairs of a warp, a multiple of 32
  Routed routed;
};

__device__ __forceinline__ int64_t expert_id(const Pairs& in, int pair) {
  return in.wide_ids ? static_cast<const int64_t*>(in.ids)[pair] : static_cast<const int32_t*>(in.ids)[pair];
}

// The weight of a slot, as float32.
struct Weights {
  const void* weights;
  int32_t dtype;
  int64_t first;  // of the token's slots
  __device__ __forceinline__ float operator()(int64_t slot) const {
    if (dtype == MODES_F32) return static_cast<const float*>(weights)[first + slot];
    if (dtype == MODES_F16) return to_float(static_cast<const f16*>(weights)[first + slot]);
    return to_float(static_cast<const bf16*>(weights)[first + slot]);
  }
};

// The expert of a kept pair, kSkipped or kInvalid.
__device__ int decide(const Pairs& in, int pair) {
  const int token = pair / in.top_k;
  const int64_t group = in.group[token], expert = expert_id(in, pair);
  if (group < 0 || group >= in.groups || expert < 0 || expert >= in.experts) return kInvalid;
  float score;
  if (in.score) {
    score = in.score[pair];
  } else {
    const Weights weight{in.weights, in.activation_dtype, static_cast<int64_t>(token) * in.top_k};
    const float scale = in.score_scale[in.per_expert ? group * in.experts + expert : group];
    score = route_score(scale, weight(pair - weight.first), route_sum(in.top_k, weight));
  }
  return route_keep(score, in.tau[group]) ? static_cast<int>(expert) : kSkipped;
}

// Adds the kept pairs of a warp's 32 to their groups.
__device__ void count_kept(const Pairs& in, int pair, bool kept, int* group_counts) {
  const int lane = threadIdx.x % 32;
  const int group = kept ? in.group[pair / in.top_k] : -1;
  const uint32_t same = __match_any_sync(kFullMask, group);
  if (!kept || __ffs(same) - 1 != lane) return;
  if (in.groups <= kSharedGroups) {
    atomicAdd(&group_counts[group], __popc(same));
  } else {
    atomicAdd(&in.kept[2 * static_cast<int64_t>(group)], __popc(same));
  }
}

// Decides the pairs from first_pair on that this block has. Leaves in pair_row the rank of a kept pair among those of its
// expert and warp (each thread writes, and later reads, its own pairs only), in counts[warp][expert] how many there are.
__device__ void decide_block(const Pairs& in, int first_pair, int* counts, int* group_counts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, experts = static_cast<int>(in.experts);
  for (int i = threadIdx.x; i < kWarps * experts; i += kThreads) counts[i] = 0;
  for (int i = threadIdx.x; i < kSharedGroups; i += kThreads) group_counts[i] = 0;
  __syncthreads();
  int* const own = counts + warp * experts;
  for (int at = 0; at < in.section; at += 32) {
    const int pair = first_pair + warp * in.section + at + lane;
    const int expert = pair < in.pairs ? decide(in, pair) : kSkipped;
    const bool kept = expert >= 0;
    const uint32_t same = __match_any_sync(kFullMask, expert);
    const int before = __popc(same & ((1u << lane) - 1));
    const int rank = kept ? own[expert] + before : expert;
    __syncwarp();
    if (kept && before == __popc(same) - 1) own[expert] = rank + 1;
    if (pair < in.pairs) in.routed.pair_row[pair] = rank;
    if (in.kept) count_kept(in, pair, kept, group_counts);
    __syncwarp();
  }
  __syncthreads();
  if (in.kept && in.groups <= kSharedGroups && threadIdx.x < in.groups && group_counts[threadIdx.x] > 0) {
    atomicAdd(&in.kept[2 * threadIdx.x], group_counts[threadIdx.x]);
  }
}

// counts[warp][expert] becomes the number in the warps before; returns the block's.
__device__ int sum_warps(int* counts, int experts, int expert) {
  int sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    const int here = counts[warp * experts + expert];
    counts[warp * experts + expert] = sum;
    sum += here;
  }
  return sum;
}

// starts[e], which holds the number of rows of expert e, becomes its first row. With `publish`, one block of the grid
// writes offsets and active experts.
__device__ void start_experts(const Pairs& in, int* starts, bool publish) {
  __shared__ int warp_rows[kWarps], warp_active[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, experts = static_cast<int>(in.experts);
  const int each = (experts + kThreads - 1) / kThreads;
  const int first = threadIdx.x * each, last = first + each < experts ? first + each : experts;
  int rows = 0, active = 0;
  for (int e = first; e < last; ++e) {
    rows += starts[e];
    active += starts[e] > 0;
  }
  // Inclusive sums over the lanes, then over the warps.
  int rows_to = rows, active_to = active;
  for (int step = 1; step < 32; step *= 2) {
    const int other_rows = __shfl_up_sync(kFullMask, rows_to, step);
    const int other_active = __shfl_up_sync(kFullMask, active_to, step);
    if (lane >= step) {
      rows_to += other_rows;
      active_to += other_active;
    }
  }
  if (lane == 31) {
    warp_rows[warp] = rows_to;
    warp_active[warp] = active_to;
  }
  __syncthreads();
  int row = rows_to - rows, place = active_to - active;
  for (int w = 0; w < warp; ++w) {
    row += warp_rows[w];
    place += warp_active[w];
  }
  for (int e = first; e < last; ++e) {
    const int count = starts[e];
    starts[e] = row;
    if (publish) {
      in.routed.offsets[e] = row;
      if (count > 0) in.routed.active[place++] = e;
    }
    row += count;
  }
  if (publish && threadIdx.x == kThreads - 1) {
    in.routed.offsets[experts] = row;
    *in.routed.active_count = place;
  }
  __syncthreads();
}

__device__ void set_row(const Pairs& in, int pair, int row) {
  in.routed.pair_row[pair] = row;
  in.routed.row_token[row] = pair / in.top_k;
}

// Everything, for at most kBlockPairs pairs.
__global__ void __launch_bounds__(kThreads) route_few(const __grid_constant__ Pairs in, bool clear) {
  __shared__ int group_counts[kSharedGroups];
  int* const counts = reinterpret_cast<int*>(dynamic_shared());  // [kWarps][E]
  const int experts = static_cast<int>(in.experts);
  int* const starts = counts + kWarps * experts;  // [E]
  allow_next_kernel();
  if (in.kept && clear) {
    for (int64_t i = threadIdx.x; i < 2 * in.groups; i += kThreads) in.kept[i] = 0;
  }
  decide_block(in, 0, counts, group_counts);
  for (int e = threadIdx.x; e < experts; e += kThreads) starts[e] = sum_warps(counts, experts, e);
  __syncthreads();
  start_experts(in, starts, true);
  const int warp = threadIdx.x / 32;
  const int first = warp * in.section, last = first + in.section < in.pairs ? first + in.section : in.pairs;
  for (int pair = first + static_cast<int>(threadIdx.x % 32); pair < last; pair += 32) {
    const int rank = in.routed.pair_row[pair];
    if (rank < 0) continue;
    const int expert = static_cast<int>(expert_id(in, pair));
    set_row(in, pair, starts[expert] + counts[warp * experts + expert] + rank);
  }
}

// Ranks within each block, and blocks[block][expert]: its kept pairs.
__global__ void __launch_bounds__(kThreads) route_count(const __grid_constant__ Pairs in, int* blocks) {
  __shared__ int group_counts[kSharedGroups];
  int* const counts = reinterpret_cast<int*>(dynamic_shared());  // [kWarps][E]
  const int warp = threadIdx.x / 32, experts = static_cast<int>(in.experts);
  const int block_first = static_cast<int>(blockIdx.x) * kBlockPairs;
  decide_block(in, block_first, counts, group_counts);
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    blocks[static_cast<int64_t>(blockIdx.x) * experts + e] = sum_warps(counts, experts, e);
  }
  __syncthreads();
  const int first = block_first + warp * in.section;
  const int last = first + in.section < in.pairs ? first + in.section : in.pairs;
  for (int pair = first + static_cast<int>(threadIdx.x % 32); pair < last; pair += 32) {
    const int rank = in.routed.pair_row[pair];
    if (rank >= 0) in.routed.pair_row[pair] = rank + counts[warp * experts + expert_id(in, pair)];
  }
}

// blocks[block][expert] becomes the number in the blocks before; totals[expert] all. A warp has an expert.
__global__ void __launch_bounds__(kThreads) route_sum_blocks(int* blocks, int block_count, int* totals, int experts) {
  const int expert = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int first = 0; first < block_count; first += 32) {
    const int64_t at = static_cast<int64_t>(first + lane) * experts + expert;
    const bool here = first + lane < block_count && expert < experts;
    const int count = here ? blocks[at] : 0;
    int to = count;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kFullMask, to, step);
      if (lane >= step) to += other;
    }
    if (here) blocks[at] = before + to - count;
    before += __shfl_sync(kFullMask, to, 31);
  }
  if (lane == 0 && expert < experts) totals[expert] = before;
}

// The rows, from the ranks within blocks.
__global__ void __launch_bounds__(kThreads) route_place(const __grid_constant__ Pairs in, const int* blocks,
                                                        const int* totals) {
  int* const starts = reinterpret_cast<int*>(dynamic_shared());  // [E]
  const int experts = static_cast<int>(in.experts);
  for (int e = threadIdx.x; e < experts; e += kThreads) starts[e] = totals[e];
  __syncthreads();
  start_experts(in, starts, blockIdx.x == 0);
  const int* const before = blocks + static_cast<int64_t>(blockIdx.x) * experts;
  const int first = static_cast<int>(blockIdx.x) * kBlockPairs;
  const int last = first + kBlockPairs < in.pairs ? first + kBlockPairs : in.pairs;
  for (int pair = first + static_cast<int>(threadIdx.x); pair < last; pair += kThreads) {
    const int rank = in.routed.pair_row[pair];
    if (rank < 0) continue;
    const int expert = static_cast<int>(expert_id(in, pair));
    set_row(in, pair, starts[expert] + before[expert] + rank);
  }
}

__global__ void __launch_bounds__(kThreads) clear_kept(int64_t* values, int64_t count) {
  const int64_t threads = int64_t{kThreads} * gridDim.x;
  for (int64_t i = threadIdx.x + static_cast<int64_t>(blockIdx.x) * kThreads; i < count; i += threads) values[i] = 0;
}

int64_t blocks_of(int64_t pairs) { return (pairs + kBlockPairs - 1) / kBlockPairs; }

const void* advance(const void* pointer, int64_t elements, int64_t bytes) {
  return static_cast<const unsigned char*>(pointer) + elements * bytes;
}

}  // namespace

int64_t route_scratch_bytes(int64_t pairs, int64_t experts) {
  return pairs <= kBlockPairs ? 0 : (blocks_of(pairs) + 1) * experts * static_cast<int64_t>(sizeof(int));
}

Error launch_clear(int64_t* kept, int64_t groups, Stream stream) {
  const int64_t blocks = (groups + kThreads - 1) / kThreads;
  return launch(clear_kept, Launch{blocks < 256 ? blocks : 256, kThreads, 0, stream}, kept, groups);
}

Error launch_route(const modes_args& args, int64_t first_token, int64_t tokens, const Routed& routed, void* scratch,
                   Stream stream) {
  const int64_t first = first_token * args.top_k, pairs = tokens * args.top_k;
  Pairs in{};
  in.experts = args.experts;
  in.groups = args.groups;
  in.pairs = static_cast<int32_t>(pairs);
  in.top_k = static_cast<int32_t>(args.top_k);
  in.activation_dtype = args.activation_dtype;
  in.wide_ids = args.id_dtype == MODES_I64;
  in.per_expert = args.score_scale_per_expert != 0;
  in.ids = advance(args.expert_ids, first, in.wide_ids ? 8 : 4);
  in.weights = advance(args.expert_weights, first, args.activation_dtype == MODES_F32 ? 4 : 2);
  in.score = args.score ? args.score + first : nullptr;
  in.group = args.group + first_token;
  in.tau = args.tau;
  in.score_scale = args.score_scale;
  in.kept = reinterpret_cast<int32_t*>(args.kept);
  in.routed = routed;
  const int experts = static_cast<int>(args.experts), bytes = experts * static_cast<int>(sizeof(int));

  if (pairs <= kBlockPairs) {
    in.section = static_cast<int32_t>((pairs + kThreads - 1) / kThreads * 32);
    return launch(route_few, Launch{1, kThreads, (kWarps + 1) * bytes, stream}, in, first_token == 0);
  }
  in.section = kBlockPairs / kWarps;
  const int64_t blocks = blocks_of(pairs);
  int* const counts = static_cast<int*>(scratch);
  int* const totals = counts + blocks * experts;
  Error failed = kSuccess;
  if (args.kept && first_token == 0) failed = launch_clear(args.kept, args.groups, stream);
  if (failed == kSuccess) failed = launch(route_count, Launch{blocks, kThreads, kWarps * bytes, stream}, in, counts);
  if (failed == kSuccess) {
    failed = launch(route_sum_blocks, Launch{(experts + kWarps - 1) / kWarps, kThreads, 0, stream}, counts,
                    static_cast<int>(blocks), totals, experts);
  }
  if (failed == kSuccess) failed = launch(route_place, Launch{blocks, kThreads, bytes, stream}, in, counts, totals);
  return failed;
}

}  // namespace gpu
}  // namespace modes
