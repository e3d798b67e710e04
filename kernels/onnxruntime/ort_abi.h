// The part of ONNX Runtime's C ABI that a custom operator needs, written from the ABI's description: its Python
// wheels carry no headers. OrtApi is an append-only table of function pointers, so each entry is reached by its index,
// and the indices hold for every ONNX Runtime from kApiVersion (release 1.18) on.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtStatus;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtShapeInferContext;
struct OrtMemoryInfo;
struct OrtAllocator;
}

namespace ort {

constexpr uint32_t kApiVersion = 18;
constexpr size_t kTableSize = 279;  // entries that version 18 has

enum Error : int { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6, kNotImplemented = 9 };
enum Element : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

struct Api {
  const void* entry[kTableSize];
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// One entry of the table: its index and its signature.
template <size_t Index, class Result, class... Arguments>
struct Entry {
  static_assert(Index < kTableSize, "not in the requested version of the API");
  static Result call(const Api* api, Arguments... arguments) {
    return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(api->entry[Index]))(arguments...);
  }
};

using CreateStatus = Entry<0, OrtStatus*, int, const char*>;
using ReleaseStatus = Entry<93, void, OrtStatus*>;

using CreateCustomOpDomain = Entry<26, OrtStatus*, const char*, OrtCustomOpDomain**>;
using CustomOpDomainAdd = Entry<27, OrtStatus*, OrtCustomOpDomain*, const struct CustomOp*>;
using AddCustomOpDomain = Entry<28, OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*>;

using GetAttributeFloat = Entry<85, OrtStatus*, const OrtKernelInfo*, const char*, float*>;
using GetAttributeInt = Entry<86, OrtStatus*, const OrtKernelInfo*, const char*, int64_t*>;
using GetAttributeString = Entry<87, OrtStatus*, const OrtKernelInfo*, const char*, char*, size_t*>;

using GetInputCount = Entry<88, OrtStatus*, const OrtKernelContext*, size_t*>;
using GetOutputCount = Entry<89, OrtStatus*, const OrtKernelContext*, size_t*>;
using GetInput = Entry<90, OrtStatus*, const OrtKernelContext*, size_t, const OrtValue**>;
using GetOutput = Entry<91, OrtStatus*, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**>;
using ParallelFor = Entry<274, OrtStatus*, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*>;

using GetGpuStream = Entry<193, OrtStatus*, const OrtKernelContext*, void**>;
using GetAllocator = Entry<253, OrtStatus*, const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator**>;
using GetScratchBuffer = Entry<277, OrtStatus*, const OrtKernelContext*, const OrtMemoryInfo*, size_t, void**>;
using AllocatorAlloc = Entry<75, OrtStatus*, OrtAllocator*, size_t, void**>;
using AllocatorFree = Entry<76, OrtStatus*, OrtAllocator*, void*>;
using ReleaseAllocator = Entry<132, void, OrtAllocator*>;

using GetTensorMemoryInfo = Entry<194, OrtStatus*, const OrtValue*, const OrtMemoryInfo**>;
using GetTensorMutableData = Entry<51, OrtStatus*, OrtValue*, void**>;
using GetTensorTypeAndShape = Entry<65, OrtStatus*, const OrtValue*, OrtTensorTypeAndShapeInfo**>;
using CreateTensorTypeAndShapeInfo = Entry<57, OrtStatus*, OrtTensorTypeAndShapeInfo**>;
using SetTensorElementType = Entry<58, OrtStatus*, OrtTensorTypeAndShapeInfo*, int>;
using SetDimensions = Entry<59, OrtStatus*, OrtTensorTypeAndShapeInfo*, const int64_t*, size_t>;
using GetTensorElementType = Entry<60, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int*>;
using GetDimensionsCount = Entry<61, OrtStatus*, const OrtTensorTypeAndShapeInfo*, size_t*>;
using GetDimensions = Entry<62, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t>;
using ReleaseTensorTypeAndShapeInfo = Entry<99, void, OrtTensorTypeAndShapeInfo*>;

using InferInput = Entry<268, OrtStatus*, const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**>;
using InferOutput = Entry<270, OrtStatus*, const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*>;

// What describes an operator to ONNX Runtime, in its field order. The operator's own data follows in a derived struct.
// Fields of unused features stay null.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const OrtKernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  OrtStatus* (*CreateKernelV2)(const CustomOp*, const Api*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const CustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

}  // namespace ort
