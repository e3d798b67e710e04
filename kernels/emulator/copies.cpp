// cp.async: 16 bytes at a time, in groups of each thread.
#include <cstring>

#include "emulator/arena.h"
#include "emulator/block.h"

namespace modes {
namespace gpu {
namespace emulated {
namespace {

void arrive(Thread& thread, Copy& copy) {
  unsigned char data[16] = {};
  std::memcpy(data, copy.from, static_cast<size_t>(copy.bytes));
  if (in_dynamic_shared(copy.to)) {
    land(arena_offset(copy.to, 16, "copy_async"), data, 16, thread.id);
  } else {
    std::memcpy(copy.to, data, 16);
  }
  copy.arrived = true;
  --thread.flying;
  --block.flying;
}

}  // namespace

void check_aligned(const void* pointer, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes)) {
    fail("%s: the address %p is not a multiple of %d", what, pointer, bytes);
  }
}

bool copy_arrives() {
  if (!block.flying) return false;
  size_t i = block.random.below(static_cast<uint32_t>(block.threads));
  while (!block.thread[i]->flying) i = (i + 1) % static_cast<size_t>(block.threads);
  Thread& thread = *block.thread[i];
  uint32_t skip = block.random.below(static_cast<uint32_t>(thread.flying));
  for (auto& group : thread.copies) {
    for (Copy& copy : group) {
      if (copy.arrived || skip--) continue;
      arrive(thread, copy);
      return true;
    }
  }
  fail("a copy was lost");
}

void copy_wait(int groups) {
  Thread& me = *block.current;
  const size_t keep = static_cast<size_t>(groups) + 1;  // with the open one
  while (me.copies.size() > keep) {
    for (Copy& copy : me.copies.front()) {
      if (!copy.arrived) arrive(me, copy);
      if (in_dynamic_shared(copy.to)) to_be_fenced(me, arena_offset(copy.to, 16, "copy_async"), 16);
    }
    me.copies.erase(me.copies.begin());
  }
  checkpoint();
}

}  // namespace emulated

void copy_async(void* shared, const void* global, int bytes) {
  using namespace emulated;
  check_aligned(shared, 16, "copy_async to shared memory");
  check_aligned(global, 16, "copy_async from global memory");
  if (bytes != 0 && bytes != 16) fail("copy_async: `%d` bytes, expected 0 or 16", bytes);
  if (in_dynamic_shared(global) || in_static_shared(global)) fail("copy_async: the source %p is shared memory", global);
  Thread& me = *block.current;
  note_writes(me.id);
  if (in_dynamic_shared(shared)) {
    begin_flight(arena_offset(shared, 16, "copy_async"), 16, true, "copy_async");
  } else if (in_static_shared(shared)) {
    std::memset(shared, 0xff, 16);
  } else {
    fail("copy_async: the destination %p is not shared memory", shared);
  }
  me.copies.back().push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, false});
  ++me.flying;
  ++block.flying;
}

void copy_commit() {
  emulated::block.current->copies.emplace_back();
  emulated::checkpoint();
}

}  // namespace gpu
}  // namespace modes
