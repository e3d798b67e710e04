// The part of the CUDA runtime that the host side uses. Emulated, emulator/runtime.h has these names.
#pragma once

#if defined(MODES_EMULATED)
#include "emulator/runtime.h"
#else

#include <cuda_runtime_api.h>

#include <cstdint>

namespace modes {
namespace gpu {

using Error = cudaError_t;
using Stream = cudaStream_t;
constexpr Error kSuccess = cudaSuccess;

// What the runtime answers where there is no driver, or no device.
inline bool means_no_device(Error error) { return error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice; }
inline const char* error_name(Error error) { return cudaGetErrorName(error); }
inline const char* error_text(Error error) { return cudaGetErrorString(error); }

inline Error device_count(int* count) { return cudaGetDeviceCount(count); }
inline Error current_device(int* id) { return cudaGetDevice(id); }

// The runtime keeps these numbers itself: reading them at every call takes less than a launch by far.
inline Error read_device(int id, int* major, int* minor, int* processors, int* shared_bytes) {
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } wanted[] = {{major, cudaDevAttrComputeCapabilityMajor},
                {minor, cudaDevAttrComputeCapabilityMinor},
                {processors, cudaDevAttrMultiProcessorCount},
                {shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto& one : wanted) {
    if (const Error failed = cudaDeviceGetAttribute(one.value, one.attribute, id)) return failed;
  }
  return kSuccess;
}

}  // namespace gpu
}  // namespace modes

#if defined(__CUDACC__)
namespace modes {
namespace gpu {

struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;  // dynamic
  Stream stream;
  bool overlap = false;  // sm_90: may start before the kernel before it has ended (it calls wait_for_previous_kernel())
};

// kernel<<<...>>>(arguments...), with as much dynamic shared memory as asked for. Zero blocks: nothing is launched.
template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  if (how.blocks == 0) return kSuccess;
  if (how.shared_bytes > 48 * 1024) {
    const Error failed = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                              cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
    if (failed != kSuccess) return failed;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = how.stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = how.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace gpu
}  // namespace modes
#endif

#endif  // MODES_EMULATED
