#include "cuda/path.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "common/message.h"

namespace modes {
namespace gpu {
namespace {

const Path* const kPaths[] = {&kDecodePath, &kHopperPath, &kMmaPath, &kFloatPath, &kPlainPath};

}  // namespace

modes_status choose_path(const Problem& problem, const Device& device, const Path** path, modes_message* message) {
  const char* asked = std::getenv("MODES_CUDA_PATH");
  if (!asked || !*asked) {
    for (const Path* one : kPaths) {
      if (!one->fits(problem, device)) continue;
      *path = one;
      return MODES_OK;
    }
    return fail(message, MODES_BAD_ARGUMENT, "no CUDA kernel computes this layer");
  }
  std::string names;
  for (const Path* one : kPaths) {
    if (std::strcmp(one->name, asked) == 0) {
      *path = one;
      if (one->fits(problem, device)) return MODES_OK;
      return fail(message, MODES_BAD_ARGUMENT,
                  "MODES_CUDA_PATH is `%s`, which does not compute this layer on this device (%d.%d)", asked, device.major,
                  device.minor);
    }
    names += names.empty() ? one->name : std::string(", ") + one->name;
  }
  return fail(message, MODES_BAD_ARGUMENT, "MODES_CUDA_PATH is `%s`, expected one of %s", asked, names.c_str());
}

}  // namespace gpu
}  // namespace modes
