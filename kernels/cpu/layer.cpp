// The C interface: rounds of (route, gather, gate and up, down) over the tokens of a call.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>

#include "common/arguments.h"
#include "common/message.h"
#include "cpu/experts.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"
#include "modes.h"

namespace modes {
namespace {

constexpr int64_t kTokens = 16;  // of a task that widens x
// Below this much arithmetic, waking threads takes longer than the work.
constexpr double kSmallWork = 1e6;
// As many tasks as keep 64 threads busy: with fewer, tasks are made smaller.
constexpr int64_t kEnoughTasks = 256;

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

// Tasks of all active experts in one row: expert after expert, each with as many as it asks for.
class Tasks {
 public:
  template <class Count>
  Tasks(const Routing& routing, int64_t* start, const Count& count) : routing_(routing), start_(start) {
    start_[0] = 0;
    for (int64_t a = 0; a < routing.active; ++a) start_[a + 1] = start_[a] + count(routing.active_expert[a]);
  }
  int64_t count() const { return start_[routing_.active]; }
  // The expert of task i, and the task's number within the expert.
  std::pair<int64_t, int64_t> at(int64_t i) const {
    const int64_t a = std::upper_bound(start_, start_ + routing_.active + 1, i) - start_ - 1;
    return {routing_.active_expert[a], i - start_[a]};
  }

 private:
  const Routing& routing_;
  int64_t* start_;  // [active + 1]
};

// How gate_up is cut: columns and tiles of one task. Smaller cuts read rows or pack weights more often.
struct Cut {
  int64_t columns, tiles;
};

// One call of the C interface, with everything its rounds share.
class Call {
 public:
  Call(const modes_args& args, const Runner& runner, const WorkspaceLayout& layout, unsigned char* workspace)
      : args_(args), runner_(runner), kernels_(expert_kernels(args)), tokens_(layout.tokens), capacity_(layout.capacity) {
    const auto place = [&](auto** pointer, size_t at) {
      *pointer = reinterpret_cast<std::remove_reference_t<decltype(*pointer)>>(workspace + at);
    };
    Routing& routing = layer_.routing;
    layer_.args = &args;
    layer_.x = static_cast<const unsigned char*>(args.x);
    place(&layer_.gathered, layout.gathered);
    place(&layer_.inner, layout.inner);
    place(&routing.offsets, layout.offsets);
    place(&routing.cursor, layout.cursor);
    place(&routing.active_expert, layout.active_expert);
    place(&routing.row_token, layout.row_token);
    place(&routing.row_weight, layout.row_weight);
    place(&routing.keep, layout.keep);
    place(&start_, layout.tasks);
    place(&wide_, layout.x);
  }

  modes_status run(modes_message* message) {
    if (!widen()) return fail(message, MODES_PARALLEL_FOR, "the caller's parallel_for failed");
    for (int64_t token = 0; token < args_.tokens; token = layer_.routing.last_token) {
      route_tokens(args_, token, tokens_, capacity_, &layer_.routing);
      if (!gather() || !gate_up() || !down()) return fail(message, MODES_PARALLEL_FOR, "the caller's parallel_for failed");
      if (no_memory_) return fail(message, MODES_NO_MEMORY, "no memory for the scratch space of a task");
    }
    return MODES_OK;
  }

 private:
  int64_t rows(int64_t expert) const { return layer_.routing.offsets[expert + 1] - layer_.routing.offsets[expert]; }
  double size() const { return static_cast<double>(args_.hidden) * static_cast<double>(args_.intermediate); }

  bool widen() {
    if (args_.activation_dtype == MODES_F32 || kernels_.word_elements > 1) return true;
    layer_.x = reinterpret_cast<const unsigned char*>(wide_);
    const double work = static_cast<double>(args_.tokens) * static_cast<double>(args_.hidden);
    return runner_.run(work, blocks(args_.tokens, kTokens), [&](int64_t i) {
      const int64_t last = std::min(args_.tokens, (i + 1) * kTokens);
      for (int64_t t = i * kTokens; t < last; ++t) kernels_.widen(args_, t, wide_ + t * args_.hidden);
    });
  }

  bool gather() {
    constexpr int64_t kTiles = 8;
    const Tasks tasks(layer_.routing, start_, [&](int64_t expert) {
      return kernels_.panelled(args_, rows(expert)) ? blocks(kernels_.tiles(rows(expert)), kTiles) : 0;
    });
    const double work = static_cast<double>(layer_.routing.rows) * static_cast<double>(args_.hidden);
    return runner_.run(work, tasks.count(), [&](int64_t i) {
      const auto [expert, part] = tasks.at(i);
      const int64_t last = std::min(kernels_.tiles(rows(expert)), (part + 1) * kTiles);
      kernels_.gather(layer_, expert, part * kTiles, last);
    });
  }

  int64_t gate_up_parts(int64_t expert, Cut cut) const {
    const int64_t tiles = kernels_.panelled(args_, rows(expert)) ? blocks(kernels_.tiles(rows(expert)), cut.tiles) : 1;
    return blocks(args_.intermediate, cut.columns) * tiles;
  }

  bool gate_up() {
    Cut cut{};
    for (const Cut& next : {Cut{96, 32}, Cut{96, 16}, Cut{48, 8}, Cut{16, 8}}) {
      cut = next;
      int64_t tasks = 0;
      for (int64_t a = 0; a < layer_.routing.active; ++a) tasks += gate_up_parts(layer_.routing.active_expert[a], cut);
      if (tasks >= kEnoughTasks) break;
    }
    const Tasks tasks(layer_.routing, start_, [&](int64_t expert) { return gate_up_parts(expert, cut); });
    const int64_t columns = blocks(args_.intermediate, cut.columns);
    return runner_.run(4 * static_cast<double>(layer_.routing.rows) * size(), tasks.count(), [&](int64_t i) {
      const auto [expert, part] = tasks.at(i);
      const int64_t first = part % columns * cut.columns, last = std::min(args_.intermediate, first + cut.columns);
      const int64_t tile = part / columns * cut.tiles, most = std::min(rows(expert), cut.tiles * kernels_.tile_rows);
      std::optional<Scratch> panel;
      if (kernels_.panelled(args_, rows(expert)) && !scratch(&panel, kernels_.panel_words(most, args_.hidden))) return;
      kernels_.gate_up(layer_, expert, tile, std::min(kernels_.tiles(rows(expert)), tile + cut.tiles), first, last,
                       panel ? static_cast<float*>(panel->data()) : nullptr);
    });
  }

  bool down() {
    const int64_t tokens = layer_.routing.last_token - layer_.routing.first_token;
    // Wider strips read rows less often; narrower ones make enough tasks of a small layer.
    const int64_t width = std::max(kernels_.panel_columns, blocks(args_.hidden, 64) >= 64 ? int64_t{64} : int64_t{32});
    int64_t most = 0;  // rows of an expert
    for (int64_t e = 0; e < args_.experts; ++e) most = std::max(most, rows(e));
    const int64_t strip = tokens * width, panel = kernels_.panel_words(most, args_.intermediate);
    const double work = 2 * static_cast<double>(layer_.routing.rows) * size();
    return runner_.run(work, blocks(args_.hidden, width), [&](int64_t i) {
      std::optional<Scratch> own;
      if (!scratch(&own, panel + strip)) return;
      float* memory = static_cast<float*>(own->data());
      kernels_.down(layer_, i * width, std::min(args_.hidden, (i + 1) * width), memory + panel, memory);
    });
  }

  // Memory of one task; false, and noted, when there is none.
  bool scratch(std::optional<Scratch>* own, int64_t floats) {
    if (own->emplace(static_cast<size_t>(floats) * sizeof(float)).data()) return true;
    no_memory_ = true;
    return false;
  }

  const modes_args& args_;
  const Runner& runner_;
  const ExpertKernels& kernels_;
  const int64_t tokens_, capacity_;  // of a round
  Layer layer_{};
  int64_t* start_ = nullptr;
  float* wide_ = nullptr;
  std::atomic<bool> no_memory_{false};
};

}  // namespace
}  // namespace modes

const char* modes_version(void) { return MODES_VERSION; }

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
  modes_status status = modes::check_isa(message);
  if (status == MODES_OK) status = modes::check_sizes(args, message);
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
  const modes::Runner runner(parallel_for, args->threads);
  return modes::Call(*args, runner, layout, static_cast<unsigned char*>(workspace)).run(message);
}
