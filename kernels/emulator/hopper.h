// cuda/hopper_device.cuh for the emulated GPU.
#pragma once

#include <type_traits>

#include "emulator/device.h"
#include "emulator/tensor_map.h"

namespace modes {
namespace gpu {

// ---- barriers in shared memory --------------------------------------------------------------------------------------

using Barrier = uint64_t;

void barrier_init(Barrier* barrier, int arrivals);
void barrier_init_done();
void barrier_arrive(Barrier* barrier);
void barrier_arrive_expect(Barrier* barrier, int bytes);
void barrier_wait(Barrier* barrier, int parity);

// ---- tensor loads ---------------------------------------------------------------------------------------------------

void tensor_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1);
void tensor_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1, int c2);
inline void prefetch_map(const TensorMap&) {}
void fence_async_proxy();

// ---- products of warpgroups -----------------------------------------------------------------------------------------

namespace emulated {
void set_registers(const char* name, int registers);
void product_wait(int groups);
void product(bool half, int columns, float* d, uint64_t a, uint64_t b, bool accumulate);
}  // namespace emulated

template <int Registers>
void registers_more() {
  emulated::set_registers("registers_more", Registers);
}
template <int Registers>
void registers_fewer() {
  emulated::set_registers("registers_fewer", Registers);
}

inline uint64_t tile_descriptor(const void* tile) {
  const uint64_t address = shared_address(tile);
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

void product_begin();
void product_commit();
template <int N>
void product_wait() {
  emulated::product_wait(N);
}

template <int N>
void product_results(float (&)[N]) {}

template <class T, int N>
void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 128 || N == 256, "hopper_device.cuh has these");
  emulated::product(std::is_same_v<T, f16>, N, d, a, b, accumulate);
}

}  // namespace gpu
}  // namespace modes
