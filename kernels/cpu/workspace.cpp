#include "cpu/workspace.h"

#include <algorithm>
#include <cstdint>

#include "common/arguments.h"
#include "cpu/experts.h"

namespace modes {
namespace {

// Memory for the rows of one round, and the most tokens: every task of `down` holds a few columns of all tokens of a
// round, which have to stay in the cache.
constexpr int64_t kRoundBytes = int64_t{128} << 20;
constexpr int64_t kRoundTokens = 4096;

}  // namespace

WorkspaceLayout workspace_layout(const modes_args& args) {
  WorkspaceLayout layout{};
  const ExpertKernels& kernels = expert_kernels(args);
  const int64_t hidden = kernels.words(args.hidden), inner = kernels.words(args.intermediate);
  layout.tokens = std::min(args.tokens, kRoundTokens);
  const int64_t affordable = kRoundBytes / 4 / (hidden + inner);
  layout.capacity = std::min(layout.tokens * args.top_k, std::max({affordable, kFewestRows, args.top_k}));
  layout.capacity = std::max(std::min<int64_t>(layout.capacity, INT32_MAX), args.top_k);
  const auto take = [&](int64_t count, size_t size) {
    const size_t at = layout.bytes;
    layout.bytes += (static_cast<size_t>(count) * size + MODES_ALIGNMENT - 1) / MODES_ALIGNMENT * MODES_ALIGNMENT;
    return at;
  };
  layout.offsets = take(args.experts + 1, sizeof(int64_t));
  layout.cursor = take(args.experts, sizeof(int64_t));
  layout.active_expert = take(args.experts, sizeof(int64_t));
  layout.tasks = take(args.experts + 1, sizeof(int64_t));
  layout.row_token = take(layout.capacity, sizeof(int64_t));
  layout.row_weight = take(layout.capacity, sizeof(float));
  layout.keep = take(layout.tokens * args.top_k, 1);
  const bool wide = args.activation_dtype != MODES_F32 && kernels.word_elements == 1;
  layout.x = take(wide ? args.tokens * args.hidden : 0, sizeof(float));
  layout.gathered = take(layout.capacity * hidden, sizeof(float));
  layout.inner = take(layout.capacity * inner, sizeof(float));
  return layout;
}

}  // namespace modes
