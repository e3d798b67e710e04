#include "emulator/block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <string>

#include "emulator/arena.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace modes {
namespace gpu {
namespace emulated {

Block block;

namespace {

std::mutex one_launch;
uint64_t launches = 0;

// What a thread waits for, in words.
std::string waits(const Thread& t) {
  char text[160];
  if (t.wait_mask) {
    std::snprintf(text, sizeof text, "%s of the threads 0x%08x of its warp", t.waits_for, t.wait_mask);
  } else if (t.waits_at) {
    std::snprintf(text, sizeof text, "%s(%p, %d)", t.waits_for, t.waits_at, t.wait_number);
  } else if (t.wait_number) {
    std::snprintf(text, sizeof text, "%s(%d)", t.waits_for, t.wait_number);
  } else {
    std::snprintf(text, sizeof text, "%s", t.waits_for);
  }
  return text;
}

[[noreturn]] void deadlock() {
  std::map<std::string, std::vector<int>> waiting;
  for (int i = 0; i < block.threads; ++i) {
    const Thread& t = *block.thread[static_cast<size_t>(i)];
    if (t.waits_for) waiting[waits(t)].push_back(i);
  }
  std::string text;
  for (const auto& [what, who] : waiting) {
    text += "\n  " + std::to_string(who.size()) + " threads, from thread " + std::to_string(who.front());
    text += ", wait for " + what;
  }
  fail("deadlock, %d threads are over and%s", block.threads - block.live, text.c_str());
}

// One thing that is under way happens.
bool something_happens() {
  bool (*const kinds[])() = {copy_arrives, piece_arrives, product_happens};
  const uint32_t first = block.random.below(3);
  for (uint32_t i = 0; i < 3; ++i) {
    if (kinds[(first + i) % 3]()) return true;
  }
  return false;
}

size_t pick() {
  const uint32_t count = static_cast<uint32_t>(block.ready.size());
  if (block.bias == 1 && block.random.below(8)) return count - 1;  // whoever came last: one warp runs ahead
  if (block.bias == 2 && block.random.below(8)) {                  // one of a few, by a fixed order of warps
    size_t best = block.random.below(count);
    const auto rank = [](size_t i) {
      const uint64_t warp = static_cast<uint64_t>(block.ready[i] / kWarp);
      return (warp * 0x9e3779b97f4a7c15u ^ block.seed * 0xbf58476d1ce4e5b9u) >> 7;
    };
    for (int tries = 0; tries < 4; ++tries) {
      const size_t other = block.random.below(count);
      if (rank(other) < rank(best)) best = other;
    }
    return best;
  }
  return block.random.below(count);
}

// Leaves the current thread for the next.
void next() {
  Thread* from = block.current;
  if (from) note_writes(from->id);
  if (block.eagerness && block.random.below(static_cast<uint32_t>(block.eagerness)) == 0) something_happens();
  while (block.ready.empty() && block.live) {
    if (!something_happens()) deadlock();
  }
  const bool last = from && from->exited;
  Fiber& here = from ? from->fiber : block.host;
  if (block.ready.empty()) {
    block.current = nullptr;
    Fiber::switch_over(here, block.host, last);
    return;
  }
  const size_t i = pick();
  Thread& to = *block.thread[static_cast<size_t>(block.ready[i])];
  block.ready[i] = block.ready.back();
  block.ready.pop_back();
  block.current = &to;
  threadIdx = {static_cast<unsigned>(to.id), 0, 0};
  if (from != &to) Fiber::switch_over(here, to.fiber, last);
}

void run_thread(void*) {
  block.kernel(block.arguments);
  Thread& me = *block.current;
  me.exited = true;
  --block.live;
  leave_collectives(me);
  next();
}

void run_block(bool first) {
  block.live = block.threads;
  block.warp.assign(static_cast<size_t>((block.threads + kWarp - 1) / kWarp), Warp{});
  for (size_t w = 0; w < block.warp.size(); ++w) block.warp[w].first = static_cast<int>(w) * kWarp;
  for (NamedBarrier& barrier : block.named) barrier = {};
  block.phase.clear();
  block.ready.clear();
  constexpr int kEagerness[] = {0, 0, 2, 8, 64};
  block.eagerness = kEagerness[block.random.below(5)];
  block.bias = static_cast<int>(block.random.below(4));
  fill_shared(first);
  begin_work();
  while (static_cast<int>(block.thread.size()) < block.threads) block.thread.push_back(std::make_unique<Thread>());
  for (int i = 0; i < block.threads; ++i) {
    Thread& t = *block.thread[static_cast<size_t>(i)];
    t.id = i;
    t.exited = false;
    t.waits_for = nullptr;
    t.copies.assign(1, {});
    t.flying = 0;
    t.unfenced.clear();
    t.fiber.start(run_thread, nullptr);
    block.ready.push_back(i);
  }
  block.current = nullptr;
  next();
  end_work();
}

uint64_t seed_of_environment() {
  const char* text = std::getenv("MODES_EMULATED_SEED");
  if (!text || !*text) return 0;
  char* end = nullptr;
  const uint64_t seed = std::strtoull(text, &end, 10);
  if (*end) {
    std::fprintf(stderr, "MODES_EMULATED_SEED is `%s`, expected a whole number\n", text);
    std::abort();
  }
  return seed;
}

}  // namespace

void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulated GPU: block %u", blockIdx.x);
  if (block.current) std::fprintf(stderr, ", thread %d", block.current->id);
  std::fprintf(stderr, " (seed %llu): ", static_cast<unsigned long long>(block.seed));
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fputc('\n', stderr);
  std::abort();
}

void wait(const char* what, const void* at, int number, uint32_t mask) {
  Thread& me = *block.current;
  me.waits_for = what;
  me.waits_at = at;
  me.wait_number = number;
  me.wait_mask = mask;
  next();
}

void wake(int thread) {
  block.thread[static_cast<size_t>(thread)]->waits_for = nullptr;
  block.ready.push_back(thread);
}

void checkpoint() {
  if (block.random.below(4)) return;
  block.ready.push_back(block.current->id);
  next();
}

Error run(void (*kernel)(const void*), const void* arguments, const Launch& how) {
  if (how.blocks == 0) return kSuccess;
  int major, minor, processors, shared_bytes;
  if (const Error failed = read_device(0, &major, &minor, &processors, &shared_bytes)) return failed;
  if (how.blocks < 0 || how.blocks > INT32_MAX || how.threads < 1 || how.threads > 1024 || how.shared_bytes < 0 ||
      how.shared_bytes > shared_bytes) {
    return kInvalidValue;
  }
  const std::lock_guard<std::mutex> lock(one_launch);
  block.seed = seed_of_environment();
  block.random.state = (block.seed + 1) * 0x9e3779b97f4a7c15u ^ ++launches * 0xbf58476d1ce4e5b9u;
  if (!block.random.state) block.random.state = 1;
  for (int i = 0; i < 4; ++i) block.random.below(2);
  block.kernel = kernel;
  block.arguments = arguments;
  block.threads = how.threads;
  blockDim = {static_cast<unsigned>(how.threads), 1, 1};
  gridDim = {static_cast<unsigned>(how.blocks), 1, 1};
  begin_arena(how.shared_bytes);
  std::vector<unsigned> order(static_cast<size_t>(how.blocks));
  std::iota(order.begin(), order.end(), 0u);
  for (uint32_t left = gridDim.x; left > 1; --left) std::swap(order[left - 1], order[block.random.below(left)]);
  for (unsigned i : order) {
    blockIdx = {i, 0, 0};
    run_block(i == order.front());
  }
  end_arena();
  return kSuccess;
}

}  // namespace emulated
}  // namespace gpu
}  // namespace modes
