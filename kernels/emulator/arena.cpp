#include "emulator/arena.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "emulator/block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#endif
#endif
#if !defined(ASAN_POISON_MEMORY_REGION)
#define ASAN_POISON_MEMORY_REGION(at, bytes) (static_cast<void>(at), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) (static_cast<void>(at), static_cast<void>(bytes))
#endif

// What __shared__ declares is there; the linker makes these names, where there is any.
extern "C" unsigned char __start_modes_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_modes_shared[] __attribute__((weak, visibility("hidden")));

namespace modes {
namespace gpu {
namespace emulated {
namespace {

constexpr uint32_t kMost = 256 << 10;
constexpr uint32_t kMargin = 64 << 10;  // before and after, never to be touched
constexpr unsigned char kNan = 0xff;    // a NaN in float32, float16 and bfloat16
constexpr uint16_t kFlying = 0xffff;

struct Arena {
  unsigned char* bytes = nullptr;  // what the kernel sees
  unsigned char seen[kMost];       // the same when note_writes() looked last
  uint16_t writer[kMost];          // 0, a thread + 1 that wrote it without a fence since, or kFlying
  uint32_t size = 0;
  bool first_block = true;  // of the launch
  bool watching = false;
} arena;

bool in_arena(const void* pointer) {
  const unsigned char* p = static_cast<const unsigned char*>(pointer);
  return p >= arena.bytes - kMargin && p < arena.bytes + kMost + kMargin;
}

void add_range(Thread& thread, uint32_t begin, uint32_t end) {
  if (!thread.unfenced.empty() && thread.unfenced.back().end == begin) {
    thread.unfenced.back().end = end;
  } else {
    thread.unfenced.push_back({begin, end});
  }
}

// The address sanitizer keeps other objects' red zones in between.
__attribute__((no_sanitize_address)) void fill_static_shared() {
  volatile unsigned char* const stop = __stop_modes_shared;
  for (volatile unsigned char* p = __start_modes_shared; p != stop; ++p) *p = kNan;
}

}  // namespace

void begin_arena(int bytes) {
  if (!arena.bytes) {
    void* memory = mmap(nullptr, kMost + 2 * kMargin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("emulated GPU: no memory for shared memory");
      std::abort();
    }
    arena.bytes = static_cast<unsigned char*>(memory) + kMargin;
  }
  arena.size = static_cast<uint32_t>(bytes);
  arena.first_block = true;
  ASAN_POISON_MEMORY_REGION(arena.bytes - kMargin, kMost + 2 * kMargin);
  ASAN_UNPOISON_MEMORY_REGION(arena.bytes, arena.size);
}

void end_arena() { ASAN_POISON_MEMORY_REGION(arena.bytes, arena.size); }

void fill_shared(bool first_block) {
  arena.first_block = first_block;
  arena.watching = false;
  if (__start_modes_shared) fill_static_shared();
  std::memset(arena.bytes, kNan, arena.size);
  std::memset(arena.seen, kNan, arena.size);
  std::memset(arena.writer, 0, arena.size * sizeof arena.writer[0]);
}

bool in_dynamic_shared(const void* pointer) { return in_arena(pointer); }

// Compilers forget the section of what a template declares (GCC before 14): such an array keeps what the block before
// left, and is known by being in this library's variables.
bool in_static_shared(const void* pointer) {
  if (pointer >= __start_modes_shared && pointer < __stop_modes_shared) return true;
  static const std::pair<uintptr_t, uintptr_t> variables = [] {
    std::pair<uintptr_t, uintptr_t> range{};
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* result) {
          for (int i = 0; i < module->dlpi_phnum; ++i) {
            const auto& segment = module->dlpi_phdr[i];
            const uintptr_t begin = module->dlpi_addr + segment.p_vaddr, mine = reinterpret_cast<uintptr_t>(&arena);
            if (segment.p_type != PT_LOAD || mine < begin || mine >= begin + segment.p_memsz) continue;
            *static_cast<std::pair<uintptr_t, uintptr_t>*>(result) = {begin, begin + segment.p_memsz};
            return 1;
          }
          return 0;
        },
        &range);
    return range;
  }();
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  return at >= variables.first && at < variables.second;
}

uint32_t arena_offset(const void* pointer, uint32_t bytes, const char* what) {
  const int64_t offset = static_cast<const unsigned char*>(pointer) - arena.bytes;
  if (!in_arena(pointer)) fail("%s: %p is not in dynamic shared memory", what, pointer);
  if (offset < 0 || offset + bytes > arena.size) {
    fail("%s: bytes %lld to %lld of dynamic shared memory, which has %u", what, static_cast<long long>(offset),
         static_cast<long long>(offset) + bytes, arena.size);
  }
  return static_cast<uint32_t>(offset);
}

const unsigned char* arena_at(uint32_t address, uint32_t bytes, const char* what) {
  return arena.bytes + arena_offset(arena.bytes + static_cast<int64_t>(address) - kArenaAddress, bytes, what);
}

// To look for writes at every switch takes longer than all else, so only the block that runs first is watched.
void watch_writes() { arena.watching = arena.first_block; }

void note_writes(int id) {
  if (!arena.watching) return;
  constexpr uint32_t kChunk = 2048, kLine = 64;
  Thread& thread = *block.thread[static_cast<size_t>(id)];
  for (uint32_t chunk = 0; chunk < arena.size; chunk += kChunk) {
    const uint32_t chunk_end = std::min(chunk + kChunk, arena.size);
    if (!std::memcmp(arena.bytes + chunk, arena.seen + chunk, chunk_end - chunk)) continue;
    for (uint32_t line = chunk; line < chunk_end; line += kLine) {
      const uint32_t end = std::min(line + kLine, chunk_end);
      if (!std::memcmp(arena.bytes + line, arena.seen + line, end - line)) continue;
      for (uint32_t i = line; i < end; ++i) {
        if (arena.bytes[i] == arena.seen[i]) continue;
        if (arena.writer[i] == kFlying) {
          fail("wrote byte %u of dynamic shared memory, where a copy is still arriving", i);
        }
        arena.seen[i] = arena.bytes[i];
        arena.writer[i] = static_cast<uint16_t>(id + 1);
        add_range(thread, i, i + 1);
      }
    }
  }
}

void begin_flight(uint32_t offset, uint32_t bytes, bool generic, const char* what) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (arena.writer[i] == kFlying) {
      fail("%s: another copy is still arriving at byte %u of dynamic shared memory", what, i);
    }
    if (arena.writer[i] && !generic) {
      fail("%s: byte %u of dynamic shared memory was written by thread %d, which called no fence_async_proxy() since",
           what, i, arena.writer[i] - 1);
    }
    arena.writer[i] = kFlying;
  }
  std::memset(arena.bytes + offset, kNan, bytes);
  std::memset(arena.seen + offset, kNan, bytes);
}

void land(uint32_t offset, const void* data, uint32_t bytes, int writer) {
  std::memcpy(arena.bytes + offset, data, bytes);
  std::memcpy(arena.seen + offset, data, bytes);
  const int mark = arena.watching && writer != kNobody ? writer + 1 : 0;
  std::fill(arena.writer + offset, arena.writer + offset + bytes, static_cast<uint16_t>(mark));
}

void to_be_fenced(Thread& thread, uint32_t offset, uint32_t bytes) {
  if (arena.watching) add_range(thread, offset, offset + bytes);
}

void fence(Thread& thread) {
  watch_writes();
  note_writes(thread.id);
  for (const Range& range : thread.unfenced) {
    for (uint32_t i = range.begin; i < range.end; ++i) {
      if (arena.writer[i] == thread.id + 1) arena.writer[i] = 0;
    }
  }
  thread.unfenced.clear();
}

void check_visible(uint32_t offset, uint32_t bytes, const char* what) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (arena.writer[i] == 0) continue;
    if (arena.writer[i] == kFlying) {
      fail("%s reads byte %u of dynamic shared memory, where a copy is still arriving", what, i);
    }
    fail("%s reads byte %u of dynamic shared memory, which thread %d wrote and did not fence (fence_async_proxy)",
         what, i, arena.writer[i] - 1);
  }
}

}  // namespace emulated

unsigned char* dynamic_shared() { return emulated::arena.bytes; }

uint32_t shared_address(const void* pointer) {
  return emulated::arena_offset(pointer, 0, "shared_address") + emulated::kArenaAddress;
}

}  // namespace gpu
}  // namespace modes
