// 16-bit elements as the emulated products read them.
#pragma once

#include <cstdint>

#include "emulator/device.h"

namespace modes {
namespace gpu {
namespace emulated {

const float* half_values();  // [65536]: of every float16

template <class T>
float widen(uint16_t bits) {
  return to_float(T{bits});
}
template <>
inline float widen<f16>(uint16_t bits) {
  static const float* const values = half_values();
  return values[bits];
}

}  // namespace emulated
}  // namespace gpu
}  // namespace modes
