// Few tokens: bound by reading weights, of which only the active experts' are read.
#include "cuda/decode_kernel.cuh"
#include "cuda/path.h"

namespace modes {
namespace gpu {
namespace {

constexpr int64_t kMostTokens = 64;
constexpr int kFewRows = 8;  // a group: what one product multiplies

bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

bool fits(const Problem& problem, const Device& device) {
  const bool halves = problem.activation_dtype == MODES_F16 || problem.activation_dtype == MODES_BF16;
  // Depths and tiles are counted in 32 bits.
  const int64_t most = int64_t{1} << 30;
  const bool small = problem.hidden < most && problem.intermediate < most && problem.experts < most &&
                     problem.experts * (problem.hidden / 16 + 1) < most &&
                     problem.experts * (problem.intermediate / 8 + 1) < most;
  return device.major >= 8 && problem.tokens <= kMostTokens && halves &&
         problem.weight_dtype == problem.activation_dtype && problem.hidden % 8 == 0 && problem.intermediate % 8 == 0 &&
         small && aligned(problem.x, 16) && aligned(problem.gate_up, 16) && aligned(problem.down, 16) &&
         aligned(problem.gate_up_bias, 2) && aligned(problem.down_bias, 2);
}

template <class T, class Tile, int kWarps, int kGroups>
Error launch_tiles(DecodeProduct product, int64_t most_active, const Device& device, Stream stream) {
  const int64_t results = Tile::kGateUp ? product.columns / 2 : product.columns;
  product.tiles = static_cast<int32_t>((results + Tile::kColumns - 1) / Tile::kColumns);
  const int64_t resident = int64_t{device.processors} * (kDecodeWarpsOfProcessor / kWarps);
  const int64_t items = most_active * product.tiles;
  const Launch how{items < resident ? items : resident, 32 * kWarps, decode_shared_bytes<Tile, kWarps>(), stream,
                   device.major >= 9};
  return launch(decode<T, Tile, kWarps, kGroups>, how, product);
}

template <class T, bool kGateUp>
Error launch_product(const DecodeProduct& product, const Problem& problem, const Device& device, Stream stream) {
  const int64_t pairs = problem.tokens * problem.top_k;
  const int64_t most_active = pairs < problem.experts ? pairs : problem.experts;
  const bool few = problem.tokens <= kFewRows;  // unless a token has an expert twice
  // More rows at once leave fewer registers for weights. A lane then still has 8 loads of 16 bytes under way.
  if (problem.transposed) {
    return few ? launch_tiles<T, TransposedTile<kGateUp, 2>, 8, 1>(product, most_active, device, stream)
               : launch_tiles<T, TransposedTile<kGateUp, 1>, 8, 3>(product, most_active, device, stream);
  }
  // As many warps as find 8 steps of 32 k each, so that one tile alone has all its weights under way.
  if (product.depth > 4 * 8 * 32) {
    return few ? launch_tiles<T, RowTile<kGateUp, 8>, 8, 1>(product, most_active, device, stream)
               : launch_tiles<T, RowTile<kGateUp, 4>, 8, 4>(product, most_active, device, stream);
  }
  return few ? launch_tiles<T, RowTile<kGateUp, 8>, 4, 1>(product, most_active, device, stream)
             : launch_tiles<T, RowTile<kGateUp, 4>, 4, 4>(product, most_active, device, stream);
}

template <class T>
Error launch_both(const Problem& problem, const Device& device, Stream stream) {
  DecodeProduct product{};
  product.interleaved = problem.interleaved;
  product.activation = problem.activation;
  product.alpha = problem.alpha;
  product.limit = problem.limit;
  product.routed = problem.routed;

  product.weights = problem.gate_up;
  product.bias = problem.gate_up_bias;
  product.from = problem.x;
  product.to = problem.inner;
  product.columns = 2 * problem.intermediate;
  product.depth = problem.hidden;
  const Error failed = launch_product<T, true>(product, problem, device, stream);
  if (failed != kSuccess) return failed;

  product.weights = problem.down;
  product.bias = problem.down_bias;
  product.from = problem.inner;
  product.to = problem.outputs;
  product.columns = problem.hidden;
  product.depth = problem.intermediate;
  return launch_product<T, false>(product, problem, device, stream);
}

Error launch_experts(const Problem& problem, const Device& device, Stream stream) {
  return problem.activation_dtype == MODES_F16 ? launch_both<f16>(problem, device, stream)
                                               : launch_both<bf16>(problem, device, stream);
}

}  // namespace

const Path kDecodePath{"decode", fits, launch_experts};

}  // namespace gpu
}  // namespace modes
