// mbarrier: barriers in shared memory with phases, arrivals and bytes to come.
#include "emulator/barriers.h"

#include "emulator/arena.h"
#include "emulator/block.h"

namespace modes {
namespace gpu {
namespace emulated {
namespace {

constexpr int kMostArrivals = (1 << 20) - 1;
// In the eight bytes, so that a kernel that writes over its barriers is found.
constexpr uint64_t kHere = 0x6d6f646573626172u;

void put(Barrier* barrier, uint64_t value) {
  if (in_dynamic_shared(barrier)) {
    land(arena_offset(barrier, sizeof value, "barrier_init"), &value, sizeof value, kNobody);
  } else if (in_static_shared(barrier)) {
    *barrier = value;
  } else {
    fail("barrier_init: %p is not shared memory", static_cast<void*>(barrier));
  }
}

PhaseBarrier& state(Barrier* barrier, const char* what) {
  const auto found = block.phase.find(barrier);
  if (found == block.phase.end()) fail("%s: there was no barrier_init of %p", what, static_cast<void*>(barrier));
  if (*barrier != kHere) fail("%s: something wrote over the barrier at %p", what, static_cast<void*>(barrier));
  return found->second;
}

void turn_if_complete(PhaseBarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.arrivals;
  for (int id : b.waiting) wake(id);
  b.waiting.clear();
}

void arrive(Barrier* barrier, int bytes, const char* what) {
  checkpoint();
  PhaseBarrier& b = state(barrier, what);
  if (!b.pending) fail("%s: more than the %d arrivals that the barrier was made for", what, b.arrivals);
  b.bytes += bytes;
  --b.pending;
  turn_if_complete(b);
  checkpoint();
}

}  // namespace

void barrier_bytes(Barrier* barrier, int bytes) {
  PhaseBarrier& b = state(barrier, "tensor_load");
  b.bytes -= bytes;
  turn_if_complete(b);
}

void barrier_ready_for_load(Barrier* barrier) {
  if (!state(barrier, "tensor_load").visible) {
    fail("tensor_load: its barrier was made without a barrier_init_done() since");
  }
}

}  // namespace emulated

void barrier_init(Barrier* barrier, int arrivals) {
  using namespace emulated;
  require(8, "barrier_init");
  check_aligned(barrier, 8, "barrier_init");
  if (arrivals < 1 || arrivals > kMostArrivals) {
    fail("barrier_init: `%d` arrivals, expected 1..%d", arrivals, kMostArrivals);
  }
  watch_writes();
  note_writes(block.current->id);
  put(barrier, kHere);
  block.phase[barrier] = {arrivals, arrivals, 0, 0, block.current->id, false, {}};
}

void barrier_init_done() {
  using namespace emulated;
  for (auto& [at, b] : block.phase) {
    if (b.made_by == block.current->id) b.visible = true;
  }
  fence_async_proxy();
}

void barrier_arrive(Barrier* barrier) { emulated::arrive(barrier, 0, "barrier_arrive"); }

void barrier_arrive_expect(Barrier* barrier, int bytes) {
  if (bytes < 0) emulated::fail("barrier_arrive_expect: `%d` bytes", bytes);
  emulated::arrive(barrier, bytes, "barrier_arrive_expect");
}

void barrier_wait(Barrier* barrier, int parity) {
  using namespace emulated;
  if (parity != 0 && parity != 1) fail("barrier_wait: the parity is `%d`, expected 0 or 1", parity);
  // Woken, it may find that a second phase is over too, and waits on: as a GPU's thread may that tries too late.
  while ((state(barrier, "barrier_wait").phase & 1) == parity) {
    state(barrier, "barrier_wait").waiting.push_back(block.current->id);
    wait("barrier_wait", barrier, parity);
  }
  checkpoint();
}

}  // namespace gpu
}  // namespace modes
