// Tensor cores of sm_80 and newer: 16-bit activations and weights of one type.
#include "cuda/mma_launch.cuh"
#include "cuda/mma_product.cuh"

namespace modes {
namespace gpu {
namespace {

bool fits(const Problem& problem, const Device& device) {
  return device.major >= 8 && problem.activation_dtype == problem.weight_dtype &&
         (problem.activation_dtype == MODES_BF16 || problem.activation_dtype == MODES_F16) &&
         device.shared_bytes >= LargeShape<bf16, false>::kSharedBytes && fits_pieces(problem, 8, 2);
}

template <template <class, bool> class Shape, class T, bool kTransposed>
Error launch_shape(const Problem& problem, const Device& device, Stream stream) {
  using S = Shape<T, kTransposed>;
  const Work<T> gate_up = gate_up_work<T>(problem, S::kColumns, true);
  const Error failed = launch_product<S>(mma_product<S, true>, gate_up, problem, device, stream);
  if (failed != kSuccess) return failed;
  return launch_product<S>(mma_product<S, false>, down_work<T>(problem, S::kColumns), problem, device, stream);
}

// Large tiles where experts have enough rows to fill them and there are enough of them for all multiprocessors. By the
// sizes alone: how many pairs are kept is known on the device only.
bool fills_large_tiles(const Problem& problem, const Device& device) {
  using Large = LargeShape<bf16, false>;
  const int64_t pairs = problem.tokens * problem.top_k;
  const int64_t column_tiles = std::min(divide_up(problem.intermediate, Large::kHalf),
                                        divide_up(problem.hidden, Large::kColumns));
  return pairs > problem.experts * (Large::kRows / 2) && pairs / Large::kRows * column_tiles >= device.processors;
}

template <class T, bool kTransposed>
Error launch_layout(const Problem& problem, const Device& device, Stream stream) {
  if (fills_large_tiles(problem, device)) return launch_shape<LargeShape, T, kTransposed>(problem, device, stream);
  return launch_shape<SmallShape, T, kTransposed>(problem, device, stream);
}

template <class T>
Error launch_type(const Problem& problem, const Device& device, Stream stream) {
  if (problem.transposed) return launch_layout<T, true>(problem, device, stream);
  return launch_layout<T, false>(problem, device, stream);
}

Error launch_experts(const Problem& problem, const Device& device, Stream stream) {
  if (problem.activation_dtype == MODES_BF16) return launch_type<bf16>(problem, device, stream);
  return launch_type<f16>(problem, device, stream);
}

}  // namespace

const Path kMmaPath{"mma", fits, launch_experts};

}  // namespace gpu
}  // namespace modes
