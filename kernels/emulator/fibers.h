// Stacks that one thread of the host switches between: what a CUDA thread runs on.
#pragma once

#include <cstddef>

namespace modes {
namespace gpu {
namespace emulated {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls entry(argument), which ends with a switch that leaves it for good. Its stack is
  // made on the first call and used again on later ones.
  void start(void (*entry)(void*), void* argument);

  // From the fiber that runs (or the host's own stack, a Fiber never started) to another. With `last`, `from` is done.
  static void switch_over(Fiber& from, Fiber& to, bool last = false);

 private:
  static void enter();

  void* stack_pointer_ = nullptr;
  const void* stack_ = nullptr;  // lowest usable address; of the host's stack: as the sanitizer reports it
  size_t stack_bytes_ = 0;
  void* mapping_ = nullptr;
  void* fake_stack_ = nullptr;  // the address sanitizer's
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
};

}  // namespace emulated
}  // namespace gpu
}  // namespace modes
