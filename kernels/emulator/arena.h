// The block's dynamic shared memory, as large as the launch asked for, and what is known of its bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace modes {
namespace gpu {
namespace emulated {

struct Thread;

constexpr uint32_t kArenaAddress = 1024;  // where shared memory starts in 32-bit addresses

void begin_arena(int bytes);  // of a launch
void fill_shared(bool first_block);  // of a block: NaN patterns, in what __shared__ declares too
void end_arena();

bool in_dynamic_shared(const void* pointer);  // or a little beyond it
bool in_static_shared(const void* pointer);

// Its offset, or an abort that says `what` needs it there.
uint32_t arena_offset(const void* pointer, uint32_t bytes, const char* what);
// The memory at a 32-bit address.
const unsigned char* arena_at(uint32_t address, uint32_t bytes, const char* what);

// The asynchronous proxy (tensor loads, products of warpgroups) is in use: writes are watched from here on.
void watch_writes();
// Marks what changed since the last call as written by this thread.
void note_writes(int thread);

// What emulated instructions write. In flight: poison that no product may read. `generic`: not by the asynchronous
// proxy. `writer`: whose generic write it is, or kNobody.
void begin_flight(uint32_t offset, uint32_t bytes, bool generic, const char* what);
void land(uint32_t offset, const void* data, uint32_t bytes, int writer);
void to_be_fenced(Thread& thread, uint32_t offset, uint32_t bytes);  // these bytes, by its next fence
void fence(Thread& thread);
// Aborts unless the asynchronous proxy sees these bytes.
void check_visible(uint32_t offset, uint32_t bytes, const char* what);

}  // namespace emulated
}  // namespace gpu
}  // namespace modes
