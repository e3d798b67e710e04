// modes::SkipExperts as ONNX Runtime sees it: its inputs, outputs, and the callbacks of its kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "modes.h"
#include "onnxruntime/ort_abi.h"

namespace modes_ort {

enum Input : size_t {
  kHidden,  // [T, H] or [B, S, H]
  kExpertIds,
  kExpertWeights,
  kGroup,
  kTau,
  kScoreScale,
  kGateUp,
  kDown,
  kGateUpBias,  // optional, as are those after it
  kDownBias,
  kScore,
  kGateUpScales,  // of quantised weights: both or none
  kDownScales,
  kInputs
};
enum Output : size_t {
  kOutput,  // shape of hidden
  kKept,    // optional [G] int64: pairs of each group that were computed in this call
  kOutputs
};

extern const char* const kInputName[kInputs];

// "modes.SkipExperts: <text>" as a status that ONNX Runtime owns.
OrtStatus* error(const ort::Api* api, int code, const std::string& text);

struct Attributes {
  int32_t activation = MODES_SILU;
  float alpha = 1.702f, limit = 7.0f;
  bool transposed = false, interleaved = false;
  int64_t block = 0;  // of quantised weights
};

OrtStatus* read_attributes(const ort::Api* api, const OrtKernelInfo* info, Attributes* attributes);

// One input as the context holds it; data is null where an optional input is absent.
struct Tensor {
  static constexpr size_t kMaxRank = 4;
  void* data = nullptr;
  int element = ort::kUndefined;
  size_t rank = 0;
  int64_t shape[kMaxRank] = {};
};

// `names`: of the operator's inputs, for messages.
OrtStatus* read_tensor(const ort::Api* api, const OrtKernelContext* context, const char* const* names, size_t index,
                       Tensor* tensor);

// Fills sizes, dtypes and input pointers of `args` from the tensors, each shape checked against the others.
OrtStatus* bind(const ort::Api* api, const Attributes& attributes, const Tensor* inputs, modes_args* args);

// No state changes after creation: sessions run one kernel from many threads. Scratch memory belongs to each call.
struct Kernel {
  const ort::Api* api;
  Attributes attributes;
};

// What one run is about: `args` from the inputs of the context, with its outputs, which are allocated here.
OrtStatus* prepare(const Kernel& kernel, OrtKernelContext* context, modes_args* args);

// What the C interface answered, as ONNX Runtime takes it: null for MODES_OK.
OrtStatus* answer(const ort::Api* api, modes_status status, const modes_message& message);

// Kernel callbacks. A library has a `compute` for each kind of processor it has kernels for (cpu.cpp, cuda.cpp).
OrtStatus* create_kernel(const ort::CustomOp*, const ort::Api* api, const OrtKernelInfo* info, void** kernel);
OrtStatus* compute_on_cpu(void* kernel, OrtKernelContext* context);
OrtStatus* compute_on_gpu(void* kernel, OrtKernelContext* context);
void destroy_kernel(void* kernel);

// Allocates an output of a run; `data` stays null where nobody asked for it.
OrtStatus* output(const ort::Api* api, OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank,
                  void** data);

// ONNX Runtime's own threads, with the status they may end in.
struct Threads {
  const ort::Api* api;
  OrtKernelContext* context;
  OrtStatus* failure;

  static int run(void* self, size_t tasks, modes_task task, void* state) {
    Threads* threads = static_cast<Threads*>(self);
    threads->failure = ort::ParallelFor::call(threads->api, threads->context, task, tasks, 0, state);
    return threads->failure != nullptr;
  }
};

// modes::Route, on the CPU only (route.cpp).
OrtStatus* add_route(const ort::Api* api, OrtCustomOpDomain* domain);

}  // namespace modes_ort
