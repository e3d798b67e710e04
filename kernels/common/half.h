// float16 and bfloat16 elements as float32 and back. Bits are read with memcpy: mapped weights may have any alignment.
#pragma once

#include <cstdint>
#include <cstring>

#include "modes.h"

namespace modes {

#if defined(__aarch64__)
using half = __fp16;
#else
using half = _Float16;
#endif

}  // namespace modes

// The hot file is compiled once per instruction set: what it inlines must not be shared between those objects, or the
// linker could pick a copy the CPU cannot run. So these are internal to each.
namespace {

inline int64_t dtype_size(int32_t dtype) { return dtype == MODES_F32 ? 4 : 2; }

// Elements of quantised weights that are stored together; the block of a scale is one or several of these.
constexpr int kQuantisedGroup = 32;
inline bool is_quantised(int32_t weight_dtype) { return weight_dtype == MODES_I8 || weight_dtype == MODES_I4; }

inline float read_f32(const unsigned char* p) {
  float v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline float read_f16(const unsigned char* p) {
  modes::half v;
  memcpy(&v, p, sizeof v);
  return static_cast<float>(v);
}

inline float read_bf16(const unsigned char* p) {
  uint16_t high;
  memcpy(&high, p, sizeof high);
  const uint32_t bits = static_cast<uint32_t>(high) << 16;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// Element `i` of an array of any dtype.
inline float read_element(const void* base, int64_t i, int32_t dtype) {
  const unsigned char* p = static_cast<const unsigned char*>(base);
  if (dtype == MODES_F32) return read_f32(p + i * 4);
  return dtype == MODES_F16 ? read_f16(p + i * 2) : read_bf16(p + i * 2);
}

// Round to nearest even, as torch does; a NaN stays a (quiet) NaN.
inline uint16_t bf16_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  if (v != v) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t f16_bits(float v) {
  const modes::half h = static_cast<modes::half>(v);
  uint16_t bits;
  memcpy(&bits, &h, sizeof bits);
  return bits;
}

}  // namespace
