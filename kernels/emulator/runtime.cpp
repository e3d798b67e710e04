#include "emulator/runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/block.h"

namespace modes {
namespace gpu {
namespace {

// Few processors, so that persistent kernels go around more than once.
struct Emulated {
  const char* name;
  int major, minor, processors, shared_bytes;
};
constexpr Emulated kDevices[] = {{"8.0", 8, 0, 2, 163 << 10}, {"8.6", 8, 6, 2, 99 << 10},  {"8.9", 8, 9, 3, 99 << 10},
                                 {"9.0", 9, 0, 3, 227 << 10}, {"12.0", 12, 0, 4, 99 << 10}};

// Null: there is no device.
const Emulated* device() {
  const char* name = std::getenv("MODES_EMULATED_DEVICE");
  if (!name || !*name) name = "9.0";
  if (!std::strcmp(name, "none")) return nullptr;
  for (const Emulated& one : kDevices) {
    if (!std::strcmp(one.name, name)) return &one;
  }
  std::fprintf(stderr, "MODES_EMULATED_DEVICE is `%s`, expected 8.0, 8.6, 8.9, 9.0, 12.0 or none\n", name);
  std::abort();
}

}  // namespace

bool means_no_device(Error error) { return error == kNoDevice; }

const char* error_name(Error error) {
  return error == kSuccess ? "kSuccess" : error == kInvalidValue ? "kInvalidValue" : "kNoDevice";
}

const char* error_text(Error error) {
  return error == kSuccess ? "no error" : error == kInvalidValue ? "invalid argument" : "no emulated device";
}

Error device_count(int* count) {
  *count = device() ? 1 : 0;
  return *count ? kSuccess : kNoDevice;
}

Error current_device(int* id) {
  *id = 0;
  return device() ? kSuccess : kNoDevice;
}

Error read_device(int id, int* major, int* minor, int* processors, int* shared_bytes) {
  const Emulated* one = device();
  if (!one) return kNoDevice;
  if (id != 0) return kInvalidValue;
  *major = one->major;
  *minor = one->minor;
  *processors = one->processors;
  *shared_bytes = one->shared_bytes;
  return kSuccess;
}

namespace emulated {

void require(int major, const char* what) {
  int has = 0, minor = 0, processors, shared_bytes;
  if (read_device(0, &has, &minor, &processors, &shared_bytes) || has < major) {
    fail("%s needs a device of compute capability %d.0 or newer, this is %d.%d", what, major, has, minor);
  }
}

}  // namespace emulated

}  // namespace gpu
}  // namespace modes
