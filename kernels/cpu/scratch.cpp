#include "cpu/scratch.h"

#include <cstdlib>
#include <mutex>
#include <utility>

#include "modes.h"

namespace modes {
namespace {

struct Buffer {
  void* data;
  size_t bytes;
};

// Buffers waiting to be used again. Few, and none of unusual size: what is larger goes back to the system at once.
constexpr int kSlots = 72;  // the tasks of 64 threads, and some calls
constexpr size_t kLargestKept = size_t{256} << 20;
std::mutex shelf_mutex;
Buffer shelf[kSlots];

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), bytes_(bytes) {
  {
    std::lock_guard<std::mutex> lock(shelf_mutex);
    for (Buffer& slot : shelf) {
      if (!slot.data || slot.bytes < bytes) continue;
      const Buffer taken = std::exchange(slot, Buffer{});
      data_ = taken.data;
      bytes_ = taken.bytes;
      return;
    }
  }
  bytes_ = (bytes + MODES_ALIGNMENT - 1) / MODES_ALIGNMENT * MODES_ALIGNMENT;
  data_ = std::aligned_alloc(MODES_ALIGNMENT, bytes_);
}

Scratch::~Scratch() {
  void* unwanted = data_;
  if (data_ && bytes_ <= kLargestKept) {
    std::lock_guard<std::mutex> lock(shelf_mutex);
    Buffer* smallest = &shelf[0];
    for (Buffer& slot : shelf) {
      if (slot.bytes < smallest->bytes) smallest = &slot;
    }
    if (smallest->bytes < bytes_) unwanted = std::exchange(*smallest, Buffer{data_, bytes_}).data;
  }
  std::free(unwanted);
}

}  // namespace modes
