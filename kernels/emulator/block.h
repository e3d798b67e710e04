// The block of threads that runs: who may run next, who waits for what, and the asynchronous work under way.
//
// A thread runs until it waits, or until a checkpoint() lets another one run. All that hardware leaves open is picked
// from the seed. What a kernel does wrong ends the process, with a message that names block, thread and seed.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "emulator/device.h"
#include "emulator/fibers.h"
#include "emulator/runtime.h"

namespace modes {
namespace gpu {
namespace emulated {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 4;  // warps
constexpr int kNobody = -1;

struct Random {
  uint64_t state;
  uint32_t below(uint32_t n) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(((state >> 32) * n) >> 32);
  }
};

// One cp.async of 16 bytes.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
  bool arrived;
};
struct Range {
  uint32_t begin, end;  // offsets in the dynamic shared memory
};

struct Thread {
  Fiber fiber;
  int id = 0;
  bool exited = false;
  const char* waits_for = nullptr;  // null: it can run
  const void* waits_at = nullptr;   // a Barrier
  int wait_number = 0;              // of a named barrier, or a parity
  uint32_t wait_mask = 0;           // of a warp's collective; 0: it waits for something else
  const void* input = nullptr;      // of the collective it waits in
  void* output = nullptr;
  std::vector<std::vector<Copy>> copies;  // by group, oldest first; the last group is open
  int flying = 0;                         // of them, not arrived
  std::vector<Range> unfenced;            // written, and not yet before a fence_async_proxy()
};

// A collective that some of its threads have reached.
struct Warp;
struct Rendezvous {
  const char* name;
  uint32_t mask, arrived;
  void (*act)(Warp& warp, uint32_t mask);
};

struct Product {
  bool half;
  int columns;
  uint64_t a, b;
  bool accumulate;
  int accumulators;  // index in Warp::accumulators
};
// The registers that products under way own: the kernel's copies hold poison until they are waited for.
struct Accumulators {
  float* registers[kWarp];
  int columns;
  int group;  // the last that writes them
  std::vector<float> values;  // [16, columns]
  bool free;
};
struct Warp {
  int first = 0;  // thread
  std::vector<Rendezvous> open;
  std::vector<Product> products;  // of groups not waited for, in order
  size_t done = 0;                // of them
  std::vector<int> product_groups;  // the group of each
  int group = 0;                  // the open one
  bool fenced = false;            // product_begin() since registers came back
  std::vector<Product> begun;     // all of them, to compare with the warpgroup's other warps
  std::vector<Accumulators> accumulators;
};

struct NamedBarrier {
  int threads = 0;  // expected; 0: nobody waits
  std::vector<int> waiting;
};

struct PhaseBarrier {
  int arrivals, pending;
  int64_t bytes;  // expected minus arrived
  int phase;
  int made_by;
  bool visible;  // barrier_init_done()
  std::vector<int> waiting;
};

struct Block {
  Random random{1};
  uint64_t seed = 0;
  int threads = 0, live = 0;
  Thread* current = nullptr;
  std::vector<std::unique_ptr<Thread>> thread;  // kept from block to block
  std::vector<Warp> warp;
  std::vector<int> ready;
  NamedBarrier named[16];
  std::unordered_map<const void*, PhaseBarrier> phase;
  int flying = 0;  // copies
  Fiber host;
  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;
  int eagerness = 0;  // of asynchronous work: one chance in so many at every switch; 0: only when it must
  int bias = 0;       // how the next thread is picked

  Warp& warp_of(const Thread& t) { return warp[static_cast<size_t>(t.id / kWarp)]; }
};
extern Block block;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Of the current thread: until wake().
void wait(const char* what, const void* at = nullptr, int number = 0, uint32_t mask = 0);
void wake(int thread);

void checkpoint();
void require(int major, const char* what);  // the emulated device has it

// A collective of the threads of `mask`: the last to reach it calls act(warp, mask) for all, on their input and output.
void meet(const char* name, uint32_t mask, const void* input, void* output, void (*act)(Warp& warp, uint32_t mask));
void leave_collectives(Thread& thread);  // it exits

// The asynchronous work. Each does one thing that is due, or returns false: nothing is.
bool copy_arrives();
bool piece_arrives();
bool product_happens();
void begin_work();  // of a block
void end_work();    // of a block: aborts where something was left under way

}  // namespace emulated
}  // namespace gpu
}  // namespace modes
