// What threads of a warp, or of a block, reach together.
#include <algorithm>
#include <cstring>

#include "emulator/block.h"

namespace modes {
namespace gpu {
namespace emulated {
namespace {

constexpr const char* kSyncThreads = "__syncthreads";

Thread& thread_of(const Warp& warp, int lane) { return *block.thread[static_cast<size_t>(warp.first + lane)]; }
bool exists(const Warp& warp, int lane) { return warp.first + lane < block.threads; }
bool over(const Warp& warp, int lane) { return !exists(warp, lane) || thread_of(warp, lane).exited; }

uint32_t over_lanes(const Warp& warp) {
  uint32_t lanes = 0;
  for (int lane = 0; lane < kWarp; ++lane) lanes |= static_cast<uint32_t>(over(warp, lane)) << lane;
  return lanes;
}

// Aborts where a thread of the warp waits for this one at another collective than this: neither could go on.
void check_converged(const Warp& warp, const char* name, uint32_t mask, int number) {
  const uint32_t me = 1u << (block.current->id % kWarp);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (over(warp, lane)) continue;
    const Thread& other = thread_of(warp, lane);
    if (&other == block.current || !other.waits_for || other.waits_at) continue;
    const bool expected = mask ? (mask >> lane & 1u) != 0 : true;
    if (other.wait_mask ? (other.wait_mask & me) == 0 : !expected) continue;
    if (!std::strcmp(other.waits_for, name) && other.wait_mask == mask && other.wait_number == number) continue;
    if (other.wait_mask && mask && !expected) continue;
    fail("its warp diverges: it is at %s (mask 0x%08x, barrier %d), thread %d waits in %s (mask 0x%08x, barrier %d)",
         name, mask, number, other.id, other.waits_for, other.wait_mask, other.wait_number);
  }
}

bool complete(const Warp& warp, const Rendezvous& r) { return (r.mask & ~(r.arrived | over_lanes(warp))) == 0; }

// Everyone of it goes on, but for the current thread, which never waited.
void finish(Warp& warp, size_t index) {
  const Rendezvous r = warp.open[index];
  warp.open.erase(warp.open.begin() + static_cast<int64_t>(index));
  if (r.act) r.act(warp, r.arrived);
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((r.arrived >> lane & 1u) && &thread_of(warp, lane) != block.current) wake(warp.first + lane);
  }
}

int expected_at(int barrier) { return barrier == 0 ? block.live : block.named[barrier].threads; }

void open_barrier(int number) {
  NamedBarrier& barrier = block.named[number];
  std::vector<int> waiting;
  waiting.swap(barrier.waiting);
  barrier.threads = 0;
  std::vector<char> here(static_cast<size_t>(block.threads), 0);
  for (int id : waiting) here[static_cast<size_t>(id)] = 1;
  for (int id : waiting) {
    const Warp& warp = block.warp_of(*block.thread[static_cast<size_t>(id)]);
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!over(warp, lane) && !here[static_cast<size_t>(warp.first + lane)]) {
        fail("barrier %d opens with thread %d, but thread %d of its warp is elsewhere", number, id, warp.first + lane);
      }
    }
  }
  for (int id : waiting) {
    if (block.thread[static_cast<size_t>(id)].get() != block.current) wake(id);
  }
}

void arrive(const char* name, int number, int threads) {
  check_converged(block.warp_of(*block.current), name, 0, number);
  NamedBarrier& barrier = block.named[number];
  if (barrier.threads && barrier.threads != threads) {
    fail("barrier %d is for %d threads here, for %d where others wait", number, threads, barrier.threads);
  }
  barrier.threads = threads;
  barrier.waiting.push_back(block.current->id);
  if (static_cast<int>(barrier.waiting.size()) == expected_at(number)) {
    open_barrier(number);
    checkpoint();
  } else {
    wait(name, nullptr, number);
  }
}

struct ShuffleInput {
  uint64_t value;
  int from;  // lane
};

}  // namespace

void meet(const char* name, uint32_t mask, const void* input, void* output, void (*act)(Warp&, uint32_t)) {
  Thread& me = *block.current;
  Warp& warp = block.warp_of(me);
  const int lane = me.id % kWarp;
  if (!(mask >> lane & 1u)) fail("%s: the mask 0x%08x does not name this thread (lane %d)", name, mask, lane);
  check_converged(warp, name, mask, 0);
  me.input = input;
  me.output = output;
  size_t i = 0;
  while (i < warp.open.size() && (std::strcmp(warp.open[i].name, name) || warp.open[i].mask != mask)) ++i;
  if (i == warp.open.size()) warp.open.push_back({name, mask, 0, act});
  warp.open[i].arrived |= 1u << lane;
  if (complete(warp, warp.open[i])) {
    finish(warp, i);
    checkpoint();
  } else {
    wait(name, nullptr, 0, mask);
  }
}

void leave_collectives(Thread& thread) {
  Warp& warp = block.warp_of(thread);
  for (size_t i = 0; i < warp.open.size();) {
    if (complete(warp, warp.open[i])) {
      finish(warp, i);
    } else {
      ++i;
    }
  }
  if (block.live && static_cast<int>(block.named[0].waiting.size()) == block.live) open_barrier(0);
}

uint64_t shuffle(Shuffle how, uint32_t mask, uint64_t value, int lanes, int width) {
  if (width < 1 || width > kWarp || (width & (width - 1))) {
    fail("a shuffle's width is `%d`, expected 1, 2, 4, 8, 16 or 32", width);
  }
  const int lane = block.current->id % kWarp;
  const int first = lane & ~(width - 1);
  ShuffleInput input{value, lane};
  const char* name = "__shfl_sync";
  if (how == Shuffle::kFrom) {
    input.from = first | (lanes & (width - 1));
  } else if (how == Shuffle::kXor) {
    name = "__shfl_xor_sync";
    input.from = (lane ^ lanes) < first + width ? lane ^ lanes : lane;
  } else if (how == Shuffle::kUp) {
    name = "__shfl_up_sync";
    input.from = lane - lanes >= first ? lane - lanes : lane;
  } else {
    name = "__shfl_down_sync";
    input.from = lane + lanes < first + width ? lane + lanes : lane;
  }
  uint64_t result = 0;
  meet(name, mask, &input, &result, [](Warp& warp, uint32_t here) {
    for (int to = 0; to < kWarp; ++to) {
      if (!(here >> to & 1u)) continue;
      const int from = static_cast<const ShuffleInput*>(thread_of(warp, to).input)->from;
      // From a thread that takes no part: undefined.
      *static_cast<uint64_t*>(thread_of(warp, to).output) =
          here >> from & 1u ? static_cast<const ShuffleInput*>(thread_of(warp, from).input)->value : ~uint64_t{0};
    }
  });
  return result;
}

uint32_t ballot(const char* name, uint32_t mask, bool vote) {
  uint32_t votes = 0;
  meet(name, mask, &vote, &votes, [](Warp& warp, uint32_t here) {
    uint32_t all = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((here >> lane & 1u) && *static_cast<const bool*>(thread_of(warp, lane).input)) all |= 1u << lane;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (here >> lane & 1u) *static_cast<uint32_t*>(thread_of(warp, lane).output) = all;
    }
  });
  return votes;
}

uint32_t match(uint32_t mask, uint64_t value) {
  uint32_t same = 0;
  meet("__match_any_sync", mask, &value, &same, [](Warp& warp, uint32_t here) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(here >> lane & 1u)) continue;
      uint32_t lanes = 0;
      for (int other = 0; other < kWarp; ++other) {
        if ((here >> other & 1u) && *static_cast<const uint64_t*>(thread_of(warp, lane).input) ==
                                        *static_cast<const uint64_t*>(thread_of(warp, other).input)) {
          lanes |= 1u << other;
        }
      }
      *static_cast<uint32_t*>(thread_of(warp, lane).output) = lanes;
    }
  });
  return same;
}

}  // namespace emulated

void barrier_sync(int barrier, int threads) {
  if (barrier < 1 || barrier > 15) emulated::fail("barrier_sync: the barrier is `%d`, expected 1..15", barrier);
  if (threads < 1 || threads % emulated::kWarp) {
    emulated::fail("barrier_sync(%d): `%d` threads, expected a multiple of 32", barrier, threads);
  }
  emulated::arrive("barrier_sync", barrier, threads);
}

}  // namespace gpu
}  // namespace modes

void __syncthreads() { modes::gpu::emulated::arrive(modes::gpu::emulated::kSyncThreads, 0, 0); }
void __syncwarp(unsigned mask) { modes::gpu::emulated::meet("__syncwarp", mask, nullptr, nullptr, nullptr); }
