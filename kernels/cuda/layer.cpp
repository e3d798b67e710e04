// The C interface on CUDA devices: rounds of (route, gate and up, down, combine) over the tokens of a call.
#include <algorithm>
#include <cstdint>

#include "common/arguments.h"
#include "common/half.h"
#include "common/message.h"
#include "cuda/combine.cuh"
#include "cuda/path.h"
#include "cuda/problem.h"
#include "cuda/route.cuh"
#include "cuda/runtime.h"
#include "modes.h"

namespace modes {
namespace gpu {
namespace {

// Tokens of a round: each round reads the weights again, so there should be few. Whole tiles, whatever the path.
constexpr int64_t kRoundTokens = 32768;
constexpr int64_t kRoundBytes = int64_t{2} << 30;
constexpr int64_t kTokenStep = 256;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

modes_status check_limits(const modes_args& args, modes_message* message) {
  const struct {
    const char* name;
    int64_t value, most;
  } limits[] = {{"experts", args.experts, kMostExperts},
                {"top_k", args.top_k, 64},
                {"hidden", args.hidden, int64_t{1} << 20},
                {"intermediate", args.intermediate, int64_t{1} << 20}};
  for (const auto& limit : limits) {
    if (limit.value > limit.most) {
      return fail(message, MODES_BAD_SHAPE, "%s is `%lld`, must be at most %lld on a CUDA device", limit.name,
                  static_cast<long long>(limit.value), static_cast<long long>(limit.most));
    }
  }
  if (args.tokens * args.top_k > INT32_MAX) {
    return fail(message, MODES_BAD_SHAPE, "tokens * top_k is `%lld`, must be below 2^31 on a CUDA device",
                static_cast<long long>(args.tokens * args.top_k));
  }
  return MODES_OK;
}

modes_status check(const modes_args* args, modes_message* message) {
  const modes_status status = check_sizes(args, message);
  if (status != MODES_OK) return status;
  if (is_quantised(args->weight_dtype)) {
    return fail(message, MODES_BAD_ARGUMENT, "quantised weights are not on CUDA yet; they run on the CPU");
  }
  return check_limits(*args, message);
}

// The most tokens of a round, and byte offsets into the workspace for that many.
struct Layout {
  int64_t tokens;
  int64_t offsets, active, active_count, row_token, pair_row, counts, inner, outputs;
  int64_t bytes;  // in all
};

Layout workspace_layout(const modes_args& args) {
  const int64_t element = dtype_size(args.activation_dtype), index = sizeof(int32_t);
  const int64_t token_bytes = args.top_k * ((args.hidden + args.intermediate) * element + 2 * index);
  int64_t affordable = std::clamp(kRoundBytes / token_bytes, int64_t{1}, kRoundTokens);
  if (affordable > kTokenStep) affordable = affordable / kTokenStep * kTokenStep;
  Layout layout{};
  layout.tokens = std::min(args.tokens, affordable);
  const int64_t pairs = layout.tokens * args.top_k;
  const auto take = [&](int64_t bytes) {
    const int64_t at = layout.bytes;
    layout.bytes += round_up(bytes, MODES_CUDA_ALIGNMENT);
    return at;
  };
  layout.offsets = take((args.experts + 1) * index);
  layout.active = take(args.experts * index);
  layout.active_count = take(index);
  layout.row_token = take(pairs * index);
  layout.pair_row = take(pairs * index);
  layout.counts = take(route_scratch_bytes(pairs, args.experts));
  layout.inner = take(pairs * args.intermediate * element);
  layout.outputs = take(pairs * args.hidden * element);
  return layout;
}

// The tokens from first_token on as a problem; `workspace` may be null where only the path is asked for.
Problem make_problem(const modes_args& args, const Layout& layout, int64_t first_token, int64_t tokens,
                     unsigned char* workspace) {
  Problem problem{};
  problem.tokens = tokens;
  problem.hidden = args.hidden;
  problem.intermediate = args.intermediate;
  problem.experts = args.experts;
  problem.top_k = args.top_k;
  problem.activation_dtype = args.activation_dtype;
  problem.weight_dtype = args.weight_dtype;
  problem.activation = args.activation;
  problem.alpha = args.alpha;
  problem.limit = args.limit;
  problem.transposed = args.transposed;
  problem.interleaved = args.interleaved;
  problem.x = static_cast<const unsigned char*>(args.x) + first_token * args.hidden * dtype_size(args.activation_dtype);
  problem.gate_up = args.gate_up;
  problem.down = args.down;
  problem.gate_up_bias = args.gate_up_bias;
  problem.down_bias = args.down_bias;
  if (!workspace) return problem;
  const auto indices = [&](int64_t at) { return reinterpret_cast<int32_t*>(workspace + at); };
  problem.inner = workspace + layout.inner;
  problem.outputs = workspace + layout.outputs;
  problem.routed = {indices(layout.offsets),   indices(layout.active),   indices(layout.active_count),
                    indices(layout.row_token), indices(layout.pair_row)};
  return problem;
}

// Tokens of each round but the last: about equal, so that no round is left with a few.
int64_t round_tokens(const modes_args& args, const Layout& layout) {
  if (args.tokens <= layout.tokens) return args.tokens;
  const int64_t rounds = (args.tokens + layout.tokens - 1) / layout.tokens;
  return std::min(layout.tokens, round_up((args.tokens + rounds - 1) / rounds, kTokenStep));
}

modes_status failed_call(modes_message* message, Error error, const char* what) {
  if (means_no_device(error)) {
    return fail(message, MODES_NO_DEVICE, "no CUDA device (`%s`: %s)", error_name(error), error_text(error));
  }
  return fail(message, MODES_CUDA, "%s failed with `%s`: %s", what, error_name(error), error_text(error));
}

modes_status find_device(Device* device, modes_message* message) {
  Error error = current_device(&device->id);
  if (error == kSuccess) {
    error = read_device(device->id, &device->major, &device->minor, &device->processors, &device->shared_bytes);
  }
  if (error != kSuccess) return failed_call(message, error, "asking for the CUDA device");
  if (device->major < 8) {
    return fail(message, MODES_NO_DEVICE, "the CUDA device has compute capability `%d.%d`, the kernels need 8.0 or newer",
                device->major, device->minor);
  }
  return MODES_OK;
}

modes_status check_workspace(const Layout& layout, const void* workspace, size_t bytes, modes_message* message) {
  const size_t needed = static_cast<size_t>(layout.bytes);
  if (!workspace) return fail(message, MODES_BAD_WORKSPACE, "the workspace is null, needs %zu bytes", needed);
  if (bytes < needed || reinterpret_cast<uintptr_t>(workspace) % MODES_CUDA_ALIGNMENT != 0) {
    return fail(message, MODES_BAD_WORKSPACE, "the workspace has `%zu` bytes at `%p`, needs %zu aligned to %d", bytes,
                workspace, needed, MODES_CUDA_ALIGNMENT);
  }
  return MODES_OK;
}

Error launch_round(const modes_args& args, const Layout& layout, const Device& device, const Path& path,
                   int64_t first_token, const Problem& problem, unsigned char* workspace, Stream stream) {
  const int64_t element = dtype_size(args.activation_dtype);
  const auto* weights = static_cast<const unsigned char*>(args.expert_weights) + first_token * args.top_k * element;
  unsigned char* out = static_cast<unsigned char*>(args.out) + first_token * args.hidden * element;
  Error error = launch_route(args, first_token, problem.tokens, problem.routed, workspace + layout.counts, stream);
  if (error == kSuccess) error = path.launch(problem, device, stream);
  return error == kSuccess ? launch_combine(problem, weights, out, device, stream) : error;
}

modes_status skip_experts(const modes_args& args, Stream stream, unsigned char* workspace, size_t workspace_bytes,
                          modes_message* message) {
  const Layout layout = workspace_layout(args);
  Device device{};
  modes_status status = args.tokens > 0 ? check_workspace(layout, workspace, workspace_bytes, message) : MODES_OK;
  if (status == MODES_OK) status = find_device(&device, message);
  if (status != MODES_OK) return status;
  if (args.tokens == 0) {
    const Error error = args.kept ? launch_clear(args.kept, args.groups, stream) : kSuccess;
    return error == kSuccess ? MODES_OK : failed_call(message, error, "launching the kernels");
  }
  const int64_t round = round_tokens(args, layout);
  const Path* path = nullptr;
  for (const bool launching : {false, true}) {  // nothing is launched unless every round has a path
    for (int64_t first = 0; first < args.tokens; first += round) {
      const Problem problem = make_problem(args, layout, first, std::min(round, args.tokens - first), workspace);
      status = choose_path(problem, device, &path, message);
      if (status != MODES_OK) return status;
      if (!launching) continue;
      const Error error = launch_round(args, layout, device, *path, first, problem, workspace, stream);
      if (error != kSuccess) return failed_call(message, error, "launching the kernels");
    }
  }
  return MODES_OK;
}

}  // namespace
}  // namespace gpu
}  // namespace modes

modes_status modes_cuda_devices(int32_t* count, modes_message* message) {
  if (message) message->text[0] = '\0';
  if (!count) return modes::fail(message, MODES_BAD_ARGUMENT, "count is null");
  int devices = 0;
  const modes::gpu::Error error = modes::gpu::device_count(&devices);
  *count = error == modes::gpu::kSuccess ? devices : 0;
  if (error == modes::gpu::kSuccess || modes::gpu::means_no_device(error)) return MODES_OK;
  return modes::gpu::failed_call(message, error, "counting the CUDA devices");
}

modes_status modes_cuda_workspace_size(const modes_args* args, size_t* bytes, modes_message* message) {
  if (message) message->text[0] = '\0';
  if (!bytes) return modes::fail(message, MODES_BAD_ARGUMENT, "bytes is null");
  const modes_status status = modes::gpu::check(args, message);
  if (status == MODES_OK) *bytes = static_cast<size_t>(modes::gpu::workspace_layout(*args).bytes);
  return status;
}

modes_status modes_cuda_path(const modes_args* args, const char** name, modes_message* message) {
  using namespace modes::gpu;
  if (message) message->text[0] = '\0';
  if (!name) return modes::fail(message, MODES_BAD_ARGUMENT, "name is null");
  Device device{};
  modes_status status = check(args, message);
  if (status == MODES_OK) status = modes::check_pointers(*args, message);
  if (status == MODES_OK) status = find_device(&device, message);
  if (status != MODES_OK) return status;
  const Layout layout = workspace_layout(*args);
  const Path* path = nullptr;
  status = choose_path(make_problem(*args, layout, 0, round_tokens(*args, layout), nullptr), device, &path, message);
  if (status == MODES_OK) *name = path->name;
  return status;
}

modes_status modes_cuda_skip_experts(const modes_args* args, void* stream, void* workspace, size_t workspace_bytes,
                                     modes_message* message) {
  if (message) message->text[0] = '\0';
  modes_status status = modes::gpu::check(args, message);
  if (status == MODES_OK) status = modes::check_pointers(*args, message);
  if (status != MODES_OK) return status;
  return modes::gpu::skip_experts(*args, static_cast<modes::gpu::Stream>(stream), static_cast<unsigned char*>(workspace),
                                  workspace_bytes, message);
}
