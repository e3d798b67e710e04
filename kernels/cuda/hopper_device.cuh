// What Hopper adds (sm_90a): barriers in shared memory, the tensor memory accelerator, products of whole warpgroups.
// emulator/hopper.h has these names again for the CPU.
#pragma once

#include "cuda/device.cuh"

#if defined(MODES_EMULATED)
#include "emulator/hopper.h"
#else

namespace modes {
namespace gpu {

using TensorMap = CUtensorMap;  // kernels take it by value as `const __grid_constant__ TensorMap`

// ---- barriers in shared memory ---------------------------------------------------------------------------------------

using Barrier = uint64_t;  // in shared memory, 8-byte aligned

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the last barrier_init, by the thread that made them; then a __syncthreads.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// One arrival, and `bytes` more that tensor loads will bring in this phase.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase with this parity is over: a fresh barrier's first phase has parity 0, waiting for 1 returns at once.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra over;\n\t"
      "bra again;\n\t"
      "over:\n\t"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- tensor loads ------------------------------------------------------------------------------------------------------

// A box from the tensor at coordinates (innermost first) into shared memory; the barrier is told of its bytes. Elements
// outside the tensor arrive as zeros, and count. One thread of the block calls it.
__device__ __forceinline__ void tensor_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void tensor_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1,
                                            int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// What this thread wrote to shared memory so far (copy_async included, once waited for) before whatever tensor loads and
// warpgroup products read after it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- products of warpgroups ------------------------------------------------------------------------------------------

template <int Registers>
__device__ __forceinline__ void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void registers_fewer() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Rows of 64 16-bit elements (128 bytes), as a tensor load with 128-byte swizzle leaves them: byte address bits 4..6 are
// xor-ed with bits 7..9, so the tile starts at a multiple of 1024. Along k, 16 elements further is 32 bytes further.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile) {
  const uint64_t address = shared_address(tile);
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Order: product_begin, product..., product_commit, product_wait. Accumulators may not be touched in between.
__device__ __forceinline__ void product_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// After product_wait<0>() and before the accumulators are read: the compiler does not know that the wait is for them.
template <int N>
__device__ __forceinline__ void product_results(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d = a . b + (accumulate ? d : 0) for a [64, 16] and b [N, 16], both tiles in shared memory with k innermost. Thread t of
// the warpgroup (warp w = t / 32, g = t % 32 / 4, c = t % 4) holds, for each 8 columns n: d[n / 2 + 0..1] = (16w + g,
// n + 2c..), d[n / 2 + 2..3] = (16w + g + 8, n + 2c..). Here N is 256; the emulator has any.
template <class T, int N>
__device__ void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);
// Four accumulators, 16, and all 128 as operands; their names in the instruction.
#define MODES_SUMS_4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define MODES_SUMS_16(i) MODES_SUMS_4(i), MODES_SUMS_4((i) + 4), MODES_SUMS_4((i) + 8), MODES_SUMS_4((i) + 12)
#define MODES_SUMS_64(i) MODES_SUMS_16(i), MODES_SUMS_16((i) + 16), MODES_SUMS_16((i) + 32), MODES_SUMS_16((i) + 48)
#define MODES_SUM_NAMES \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define MODES_PRODUCT(T, TYPE)                                                                                           \
  template <>                                                                                                            \
  __device__ __forceinline__ void product<T, 256>(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {            \
    asm volatile(                                                                                                        \
        "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %130, 0;\n\t"                                                           \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" MODES_SUM_NAMES "}, %128, %129, add, 1, 1, 0, 0;" \
        "\n\t}"                                                                                                          \
        : MODES_SUMS_64(0), MODES_SUMS_64(64)                                                                            \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                            \
  }
MODES_PRODUCT(bf16, "bf16")
MODES_PRODUCT(f16, "f16")
#undef MODES_PRODUCT
#undef MODES_SUM_NAMES
#undef MODES_SUMS_64
#undef MODES_SUMS_16
#undef MODES_SUMS_4

}  // namespace gpu
}  // namespace modes

#endif  // MODES_EMULATED
