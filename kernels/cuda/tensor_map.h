// make_tensor_map: what a tensor load needs to know of a tensor in global memory. Host side.
#pragma once

#if defined(MODES_EMULATED)
#include "emulator/tensor_map.h"
#else

#include <cuda.h>  // types only: the driver's function is asked for by name, nothing of it is linked

#include <cstdint>

#include "cuda/runtime.h"
#include "modes.h"

namespace modes {
namespace gpu {

using TensorMap = CUtensorMap;

// How a box lies in shared memory: row after row; or so with the 16-byte parts of 8 rows of 128 bytes exchanged.
enum class Swizzle { kNone, k128Bytes };

// The driver's cuTensorMapEncodeTiled.
inline Error find_tensor_map_encoder(decltype(&cuTensorMapEncodeTiled)* encode) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const Error failed =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const Error failed = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  if (failed != cudaSuccess) return failed;
  if (result != cudaDriverEntryPointSuccess || !found) return cudaErrorNotSupported;
  *encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  return cudaSuccess;
}

// Of a tensor of rank 2 or 3 (modes_dtype): sizes and box in elements, innermost first; strides in bytes, of the
// dimensions after the innermost. `base` and strides are multiples of 16; the box's rows too, 128 bytes where swizzled.
// Outside the tensor there are zeros.
inline Error make_tensor_map(TensorMap* map, const void* base, int32_t dtype, int rank, const uint64_t* sizes,
                             const uint64_t* strides, const uint32_t* box, Swizzle swizzle) {
  const uint32_t element_bytes = dtype == MODES_F32 ? 4 : 2;
  const uint32_t row_bytes = rank < 2 || rank > 3 ? 0 : box[0] * element_bytes;
  const bool swizzled = swizzle == Swizzle::k128Bytes;
  if (row_bytes == 0 || row_bytes % 16 || (swizzled && row_bytes != 128)) return cudaErrorInvalidValue;
  decltype(&cuTensorMapEncodeTiled) encode;
  if (const Error failed = find_tensor_map_encoder(&encode)) return failed;
  const CUtensorMapDataType type = dtype == MODES_F32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : dtype == MODES_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const uint32_t element_strides[3] = {1, 1, 1};
  const CUresult failed = encode(map, type, static_cast<uint32_t>(rank), const_cast<void*>(base), sizes, strides, box,
                                 element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return failed == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace gpu
}  // namespace modes

#endif  // MODES_EMULATED
