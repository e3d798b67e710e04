// cuda/device.cuh for the emulated GPU, and what of CUDA's own language the kernels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/half.h"

// Names that CUDA has without a namespace.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// In a section of its own, so that every block finds it filled with NaN.
#define __shared__ static __attribute__((section("modes_shared")))

// Kernels read 16 bytes of other types through these, which nvcc lets them.
#define MODES_VECTOR(name, element, bytes, ...)                \
  struct __attribute__((may_alias, aligned(bytes))) name {     \
    element __VA_ARGS__;                                       \
  };
MODES_VECTOR(uint2, unsigned, 8, x, y)
MODES_VECTOR(int2, int, 8, x, y)
MODES_VECTOR(float2, float, 8, x, y)
MODES_VECTOR(uint4, unsigned, 16, x, y, z, w)
MODES_VECTOR(int4, int, 16, x, y, z, w)
MODES_VECTOR(float4, float, 16, x, y, z, w)
#undef MODES_VECTOR
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace modes {
namespace gpu {
namespace emulated {

enum class Shuffle { kFrom, kXor, kUp, kDown };
uint64_t shuffle(Shuffle how, uint32_t mask, uint64_t value, int lane, int width);
uint32_t ballot(const char* name, uint32_t mask, bool vote);
uint32_t match(uint32_t mask, uint64_t value);
void checkpoint();  // another thread may run
void check_aligned(const void* pointer, int bytes, const char* what);

template <class T>
T shuffle_value(Shuffle how, uint32_t mask, T value, int lane, int width) {
  static_assert(sizeof(T) <= 8, "__shfl_sync moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(how, mask, bits, lane, width);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T atomic_add(T* to, T value) {
  checkpoint();
  const T before = *to;
  *to = static_cast<T>(before + value);
  return before;
}

}  // namespace emulated
}  // namespace gpu
}  // namespace modes

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  using namespace modes::gpu::emulated;
  return shuffle_value(Shuffle::kFrom, mask, value, lane, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  using namespace modes::gpu::emulated;
  return shuffle_value(Shuffle::kXor, mask, value, lanes, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  using namespace modes::gpu::emulated;
  return shuffle_value(Shuffle::kUp, mask, value, static_cast<int>(lanes), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  using namespace modes::gpu::emulated;
  return shuffle_value(Shuffle::kDown, mask, value, static_cast<int>(lanes), width);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  return modes::gpu::emulated::ballot("__ballot_sync", mask, vote != 0);
}
inline int __any_sync(unsigned mask, int vote) {
  return modes::gpu::emulated::ballot("__any_sync", mask, vote != 0) != 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  static_assert(sizeof(T) <= 8, "__match_any_sync compares 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return modes::gpu::emulated::match(mask, bits);
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int atomicAdd(int* to, int value) { return modes::gpu::emulated::atomic_add(to, value); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return modes::gpu::emulated::atomic_add(to, value); }

namespace modes {
namespace gpu {

// ---- elements -------------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return read_bf16(reinterpret_cast<const unsigned char*>(&v)); }
inline float to_float(f16 v) { return read_f16(reinterpret_cast<const unsigned char*>(&v)); }

template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
// The GPU's NaN is 0x7fff in both.
template <>
inline bf16 from_float<bf16>(float v) {
  return bf16{v != v ? uint16_t{0x7fff} : bf16_bits(v)};
}
template <>
inline f16 from_float<f16>(float v) {
  return f16{v != v ? uint16_t{0x7fff} : f16_bits(v)};
}

template <class T>
uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(low).bits) | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
float2 unpack(uint32_t pair) {
  return make_float2(to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)}));
}

inline float exponential(float x) { return std::exp(x); }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }
inline float exponential_fast(float x) { return std::exp(x); }
inline float quotient_fast(float a, float b) {
  const float magnitude = std::fabs(b);
  return magnitude > 0x1p126f && magnitude < INFINITY ? 0.0f * a : a / b;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

unsigned char* dynamic_shared();
uint32_t shared_address(const void* pointer);

inline uint4 load_streaming(const void* pointer) {
  emulated::check_aligned(pointer, 16, "load_streaming");
  uint4 v;
  std::memcpy(&v, pointer, sizeof v);
  return v;
}
inline uint4 load_streaming_if(bool wanted, const void* pointer) {
  return wanted ? load_streaming(pointer) : make_uint4(0, 0, 0, 0);
}

void copy_async(void* shared, const void* global, int bytes);
void copy_commit();
namespace emulated {
void copy_wait(int groups);
}
template <int N>
void copy_wait() {
  emulated::copy_wait(N);
}

// ---- warps and blocks -----------------------------------------------------------------------------------------------

constexpr uint32_t kFullMask = 0xffffffffu;

void barrier_sync(int barrier, int threads);
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

// ---- warp-level matrix products -------------------------------------------------------------------------------------

void load_matrices(uint32_t (&to)[4], const void* row);
void load_matrices_transposed(uint32_t (&to)[4], const void* row);
// Products are exact and sums float32, one after the other in order of k; the hardware's order and rounding of a sum
// are not documented and differ.
template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
void multiply<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
void multiply<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace gpu
}  // namespace modes
