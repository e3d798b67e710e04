// The C interface: rounds of (route, gate and up, down, combine) over the tokens of a call.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string_view>

#include "cpu/arguments.h"
#include "cpu/experts.h"
#include "cpu/message.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"
#include "modes.h"

namespace modes {
namespace {

// A task is one expert times this many columns: a multiple of every tile's width, small enough for many tasks.
constexpr int64_t kColumns = 96;
constexpr int64_t kTokens = 16;
// Below this much arithmetic, waking threads takes longer than the work.
constexpr double kSmallWork = 1e6;

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// How tasks are run: the caller's parallel_for, the own pool, or right here.
class Runner {
 public:
  Runner(const modes_parallel_for* parallel_for, int32_t threads) : parallel_for_(parallel_for), threads_(threads) {}

  // False when the caller's parallel_for failed.
  template <class Task>
  bool run(double work, int64_t tasks, const Task& task) const {
    const auto call = [](void* state, size_t i) { (*static_cast<const Task*>(state))(static_cast<int64_t>(i)); };
    void* state = const_cast<Task*>(&task);
    if (tasks <= 1 || work < kSmallWork) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
      return true;
    }
    if (parallel_for_) return parallel_for_->run(parallel_for_->context, static_cast<size_t>(tasks), call, state) == 0;
    pool_run(threads_, static_cast<size_t>(tasks), call, state);
    return true;
  }

 private:
  const modes_parallel_for* parallel_for_;
  int32_t threads_;
};

// Which columns of which expert task `i` is.
struct Block {
  int64_t expert, first, last;
};
Block block_of(const Routing& routing, int64_t i, int64_t columns) {
  const int64_t per_expert = blocks(columns, kColumns), first = i % per_expert * kColumns;
  return {routing.active_expert[i / per_expert], first, std::min(columns, first + kColumns)};
}

bool run_round(const Layer& layer, const Runner& runner) {
  const ExpertKernels& kernels = expert_kernels();
  const modes_args& args = *layer.args;
  const Routing& routing = layer.routing;
  const double size = static_cast<double>(args.hidden) * static_cast<double>(args.intermediate);
  const double work = 2.0 * static_cast<double>(routing.rows) * size;
  const int64_t tokens = routing.last_token - routing.first_token;
  return runner.run(2 * work, routing.active * blocks(args.intermediate, kColumns),
                    [&](int64_t i) {
                      const Block b = block_of(routing, i, args.intermediate);
                      kernels.gate_up(layer, b.expert, b.first, b.last);
                    }) &&
         runner.run(work, routing.active * blocks(args.hidden, kColumns),
                    [&](int64_t i) {
                      const Block b = block_of(routing, i, args.hidden);
                      kernels.down(layer, b.expert, b.first, b.last);
                    }) &&
         runner.run(static_cast<double>(tokens + routing.rows) * static_cast<double>(args.hidden), blocks(tokens, kTokens),
                    [&](int64_t i) {
                      const int64_t first = routing.first_token + i * kTokens;
                      const int64_t last = std::min(routing.last_token, first + kTokens);
                      for (int64_t t = first; t < last; ++t) kernels.combine(layer, t);
                    });
}

modes_status run_layer(const modes_args& args, const Runner& runner, const WorkspaceLayout& layout, void* workspace,
                       modes_message* message) {
  unsigned char* base = static_cast<unsigned char*>(workspace);
  Layer layer{};
  layer.args = &args;
  layer.x = static_cast<const float*>(args.x);
  layer.inner = reinterpret_cast<float*>(base + layout.inner);
  layer.outer = reinterpret_cast<float*>(base + layout.outer);
  layer.routing.offsets = reinterpret_cast<int64_t*>(base + layout.offsets);
  layer.routing.cursor = reinterpret_cast<int64_t*>(base + layout.cursor);
  layer.routing.active_expert = reinterpret_cast<int64_t*>(base + layout.active_expert);
  layer.routing.row_token = reinterpret_cast<int64_t*>(base + layout.row_token);
  layer.routing.position = reinterpret_cast<int32_t*>(base + layout.position);

  bool ran = true;
  if (args.activation_dtype != MODES_F32) {
    float* wide = reinterpret_cast<float*>(base + layout.x);
    const double work = static_cast<double>(args.tokens) * static_cast<double>(args.hidden);
    ran = runner.run(work, blocks(args.tokens, kTokens), [&](int64_t i) {
      const int64_t last = std::min(args.tokens, (i + 1) * kTokens);
      for (int64_t t = i * kTokens; t < last; ++t) expert_kernels().widen(args, t, wide);
    });
    layer.x = wide;
  }
  for (int64_t token = 0; ran && token < args.tokens; token = layer.routing.last_token) {
    route_tokens(args, token, layout.capacity, &layer.routing);
    ran = run_round(layer, runner);
  }
  return ran ? MODES_OK : fail(message, MODES_PARALLEL_FOR, "the caller's parallel_for failed");
}

}  // namespace

const ExpertKernels& expert_kernels() {
#if defined(__x86_64__)
  static const ExpertKernels& chosen = []() -> const ExpertKernels& {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const char* text = std::getenv("MODES_CPU_ISA");
    const std::string_view most = text ? text : "";
    if (!avx2 || most == "baseline") return kBaselineKernels;
    return avx512 && most != "avx2" ? kAvx512Kernels : kAvx2Kernels;
  }();
  return chosen;
#else
  return kBaselineKernels;
#endif
}

}  // namespace modes

const char* modes_version(void) { return MODES_VERSION; }

const char* modes_cpu_isa(void) { return modes::expert_kernels().isa; }

modes_status modes_cpu_workspace_size(const modes_args* args, size_t* bytes, modes_message* message) {
  if (message) message->text[0] = '\0';
  if (!bytes) return modes::fail(message, MODES_BAD_ARGUMENT, "bytes is null");
  const modes_status status = modes::check_sizes(args, message);
  if (status == MODES_OK) *bytes = modes::workspace_layout(*args).bytes;
  return status;
}

modes_status modes_cpu_skip_experts(const modes_args* args, const modes_parallel_for* parallel_for, void* workspace,
                                    size_t workspace_bytes, modes_message* message) {
  if (message) message->text[0] = '\0';
  modes_status status = modes::check_sizes(args, message);
  if (status == MODES_OK) status = modes::check_pointers(*args, message);
  if (status != MODES_OK) return status;
  if (args->kept) std::fill(args->kept, args->kept + args->groups, 0);
  status = modes::check_routes(*args, message);
  if (status != MODES_OK || args->tokens == 0) return status;

  const modes::WorkspaceLayout layout = modes::workspace_layout(*args);
  std::optional<modes::Scratch> own;
  if (workspace) {
    if (workspace_bytes < layout.bytes || reinterpret_cast<uintptr_t>(workspace) % MODES_ALIGNMENT != 0) {
      return modes::fail(message, MODES_BAD_WORKSPACE, "the workspace has %zu bytes, needs %zu aligned to %d",
                         workspace_bytes, layout.bytes, MODES_ALIGNMENT);
    }
  } else {
    workspace = own.emplace(layout.bytes).data();
    if (!workspace) return modes::fail(message, MODES_NO_MEMORY, "no memory for %zu bytes of workspace", layout.bytes);
  }
  return modes::run_layer(*args, modes::Runner(parallel_for, args->threads), layout, workspace, message);
}
