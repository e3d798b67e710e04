// Scratch memory for calls that bring none: kept between calls, because fresh pages cost more than small layers.
#pragma once

#include <cstddef>

namespace modes {

// Holds a buffer of at least `bytes`, aligned to MODES_ALIGNMENT, until it goes out of scope; data() is null when there
// was no memory. Every concurrent call gets its own.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace modes
