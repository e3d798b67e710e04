// What a tensor load knows of a tensor: the emulated GPU's CUtensorMap.
#pragma once

#include <cstdint>

#include "emulator/runtime.h"

namespace modes {
namespace gpu {

struct TensorMap {
  const unsigned char* base;
  int rank, element_bytes;
  bool swizzled;        // 128 bytes
  uint64_t sizes[3];    // innermost first
  uint64_t strides[3];  // bytes
  uint32_t box[3];
};

enum class Swizzle { kNone, k128Bytes };

// As cuda/tensor_map.h has it.
Error make_tensor_map(TensorMap* map, const void* base, int32_t dtype, int rank, const uint64_t* sizes,
                      const uint64_t* strides, const uint32_t* box, Swizzle swizzle);

}  // namespace gpu
}  // namespace modes
