// cuda/runtime.h for the emulated GPU: every pointer is the host's, every launch is over when it returns.
//
// $MODES_EMULATED_DEVICE says what it pretends to be: "8.0", "8.6", "8.9", "9.0" (the default), "12.0", or "none".
// $MODES_EMULATED_SEED picks the schedule: the order of blocks and threads, and when asynchronous work happens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

namespace modes {
namespace gpu {

enum Error { kSuccess = 0, kInvalidValue = 1, kNoDevice = 100 };
using Stream = void*;

bool means_no_device(Error error);
const char* error_name(Error error);
const char* error_text(Error error);
Error device_count(int* count);
Error current_device(int* id);
Error read_device(int id, int* major, int* minor, int* processors, int* shared_bytes);

struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;
  Stream stream;
  bool overlap = false;
};

namespace emulated {
// Calls kernel(arguments) once for every thread of every block.
Error run(void (*kernel)(const void* arguments), const void* arguments, const Launch& how);
}  // namespace emulated

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  };
  const Call call{kernel, {static_cast<Parameters>(arguments)...}};
  return emulated::run(
      [](const void* p) {
        const Call& call = *static_cast<const Call*>(p);
        std::apply(call.kernel, call.arguments);
      },
      &call, how);
}

}  // namespace gpu
}  // namespace modes
