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

// Buffers waiting to be used again: one lends the smallest that is large enough, and takes back what is larger than its
// smallest. Memory of calls and of their tasks is kept apart, or many tasks would let many calls' worth of memory stay.
template <int Slots>
class Shelf {
 public:
  Buffer take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    Buffer* found = nullptr;
    for (Buffer& slot : slots_) {
      if (slot.data && slot.bytes >= bytes && (!found || slot.bytes < found->bytes)) found = &slot;
    }
    return found ? std::exchange(*found, Buffer{}) : Buffer{};
  }
  // What is not kept, for the system.
  void* give(Buffer buffer) {
    std::lock_guard<std::mutex> lock(mutex_);
    Buffer* smallest = &slots_[0];
    for (Buffer& slot : slots_) {
      if (slot.bytes < smallest->bytes) smallest = &slot;
    }
    return smallest->bytes < buffer.bytes ? std::exchange(*smallest, buffer).data : buffer.data;
  }

 private:
  std::mutex mutex_;
  Buffer slots_[Slots] = {};
};

// What is larger goes back to the system at once.
constexpr size_t kLargestTask = size_t{4} << 20, kLargestCall = size_t{256} << 20;
Shelf<64> tasks;
Shelf<4> calls;

}  // namespace

Scratch::Scratch(size_t bytes) {
  const Buffer kept = bytes <= kLargestTask ? tasks.take(bytes) : calls.take(bytes);
  data_ = kept.data;
  bytes_ = kept.bytes;
  if (data_) return;
  bytes_ = (bytes + MODES_ALIGNMENT - 1) / MODES_ALIGNMENT * MODES_ALIGNMENT;
  data_ = std::aligned_alloc(MODES_ALIGNMENT, bytes_);
}

Scratch::~Scratch() {
  void* unwanted = data_;
  if (data_ && bytes_ <= kLargestTask) {
    unwanted = tasks.give({data_, bytes_});
  } else if (data_ && bytes_ <= kLargestCall) {
    unwanted = calls.give({data_, bytes_});
  }
  std::free(unwanted);
}

}  // namespace modes
