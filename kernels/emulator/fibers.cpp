#include "emulator/fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define MODES_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MODES_ADDRESS_SANITIZER 1
#endif
#endif
#if defined(MODES_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#endif

// void modes_switch_stack(void** save, void* to): what a called function must keep goes on the stack, whose address
// goes to *save; then the same backwards from `to`. setjmp would do, but sanitizers take it for the end of the frames
// it leaves.
#if defined(__linux__) && defined(__x86_64__)
asm(R"(
.text
.globl modes_switch_stack
.hidden modes_switch_stack
.type modes_switch_stack, @function
modes_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size modes_switch_stack, .-modes_switch_stack
)");
constexpr int kSavedWords = 8;  // six registers, the return address, and a word that aligns the stack as a call does
constexpr int kReturnWord = 6;
#elif defined(__linux__) && defined(__aarch64__)
asm(R"(
.text
.globl modes_switch_stack
.hidden modes_switch_stack
.type modes_switch_stack, %function
modes_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size modes_switch_stack, .-modes_switch_stack
)");
constexpr int kSavedWords = 20;
constexpr int kReturnWord = 11;
#else
#error "the emulated GPU runs on Linux, x86-64 or aarch64"
#endif

extern "C" void modes_switch_stack(void** save, void* to);

namespace modes {
namespace gpu {
namespace emulated {
namespace {

#if defined(MODES_ADDRESS_SANITIZER)
constexpr size_t kStackBytes = 512 << 10;  // frames with red zones
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kGuardBytes = 64 << 10;  // a page of any size

Fiber* left = nullptr;     // who switched last
Fiber* entered = nullptr;  // and to whom

}  // namespace

Fiber::~Fiber() {
  if (mapping_) munmap(mapping_, kGuardBytes + kStackBytes);
}

void Fiber::start(void (*entry)(void*), void* argument) {
  if (!mapping_) {
    mapping_ = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED || mprotect(mapping_, kGuardBytes, PROT_NONE) != 0) {
      std::perror("emulated GPU: no memory for a thread's stack");
      std::abort();
    }
    stack_ = static_cast<char*>(mapping_) + kGuardBytes;
    stack_bytes_ = kStackBytes;
  }
#if defined(MODES_ADDRESS_SANITIZER)
  __asan_unpoison_memory_region(stack_, stack_bytes_);  // the frames that the thread before left for good
#endif
  entry_ = entry;
  argument_ = argument;
  fake_stack_ = nullptr;
  void** top = reinterpret_cast<void**>(const_cast<char*>(static_cast<const char*>(stack_)) + stack_bytes_);
  void** words = top - kSavedWords;
  for (int i = 0; i < kSavedWords; ++i) words[i] = nullptr;
  words[kReturnWord] = reinterpret_cast<void*>(&Fiber::enter);
  stack_pointer_ = words;
}

void Fiber::enter() {
#if defined(MODES_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(nullptr, &left->stack_, &left->stack_bytes_);
#endif
  entered->entry_(entered->argument_);
  std::abort();  // it left for good
}

void Fiber::switch_over(Fiber& from, Fiber& to, bool last) {
  left = &from;
  entered = &to;
#if defined(MODES_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack_, to.stack_, to.stack_bytes_);
  modes_switch_stack(&from.stack_pointer_, to.stack_pointer_);
  __sanitizer_finish_switch_fiber(from.fake_stack_, &left->stack_, &left->stack_bytes_);
#else
  static_cast<void>(last);
  modes_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#endif
}

}  // namespace emulated
}  // namespace gpu
}  // namespace modes
