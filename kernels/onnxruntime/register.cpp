// The operator's overloads, and the entry point that ONNX Runtime looks for in a custom operator library.
#include <mutex>

#include "onnxruntime/skip_experts.h"

namespace modes_ort {
namespace {

using ort::Api;
using ort::CustomOp;

// An execution provider of ONNX Runtime, and what computes there.
struct Provider {
  const char* name;
  OrtStatus* (*compute)(void* kernel, OrtKernelContext* context);
};

#if defined(MODES_EMULATED)
// The code for CUDA, on the CPU: so it is tested where there is no GPU.
constexpr Provider kProviders[] = {{"CPUExecutionProvider", compute_on_gpu}};
#elif defined(MODES_WITH_CUDA)
// CUDA has two: the built-in one and the plugin. Under a name that a session does not use, an overload does no harm;
// without the one it uses, ONNX Runtime would run the layer on the CPU and not say so.
constexpr Provider kProviders[] = {{"CPUExecutionProvider", compute_on_cpu},
                                   {"CUDAExecutionProvider", compute_on_gpu},
                                   {"CudaPluginExecutionProvider", compute_on_gpu}};
#else
constexpr Provider kProviders[] = {{"CPUExecutionProvider", compute_on_cpu}};
#endif

// One overload per provider and combination of dtypes; ONNX Runtime picks by the types of the node's inputs.
struct Overload : CustomOp {
  const char* provider;
  int activations, weights, ids;
};

bool quantised(int weights) { return weights == ort::kInt8 || weights == ort::kUint8; }

const Overload& self(const CustomOp* op) { return *static_cast<const Overload*>(op); }

int input_type(const CustomOp* op, size_t index) {
  switch (index) {
    case kHidden:
    case kExpertWeights: return self(op).activations;
    case kExpertIds: return self(op).ids;
    case kGroup: return ort::kInt32;
    case kTau:
    case kScoreScale:
    case kScore: return ort::kFloat;
    case kGateUpScales:
    case kDownScales: return ort::kFloat16;
    case kGateUpBias:
    case kDownBias: return quantised(self(op).weights) ? int{ort::kFloat} : self(op).weights;
    default: return self(op).weights;
  }
}

const Api* g_api = nullptr;  // set once, under the mutex of RegisterCustomOps; one table serves every session

// Output 0 has the shape of hidden, named dimensions included; kept that of tau.
OrtStatus* infer_shapes(const CustomOp*, OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo* hidden = nullptr;  // belongs to the context
  if (OrtStatus* s = ort::InferInput::call(g_api, context, kHidden, &hidden)) return s;
  if (OrtStatus* s = ort::InferOutput::call(g_api, context, kOutput, hidden)) return s;

  OrtTensorTypeAndShapeInfo* tau = nullptr;
  if (OrtStatus* s = ort::InferInput::call(g_api, context, kTau, &tau)) return s;
  size_t rank = 0;
  if (OrtStatus* s = ort::GetDimensionsCount::call(g_api, tau, &rank)) return s;
  int64_t groups = -1;
  if (rank != 1) return nullptr;  // the kernel reports it, with the shape
  if (OrtStatus* s = ort::GetDimensions::call(g_api, tau, &groups, 1)) return s;
  OrtTensorTypeAndShapeInfo* kept = nullptr;
  if (OrtStatus* s = ort::CreateTensorTypeAndShapeInfo::call(g_api, &kept)) return s;
  OrtStatus* status = ort::SetTensorElementType::call(g_api, kept, ort::kInt64);
  if (!status) status = ort::SetDimensions::call(g_api, kept, &groups, 1);
  // Fails where the node has no second output: that is not an error.
  if (!status) {
    if (OrtStatus* s = ort::InferOutput::call(g_api, context, kKept, kept)) ort::ReleaseStatus::call(g_api, s);
  }
  ort::ReleaseTensorTypeAndShapeInfo::call(g_api, kept);
  return status;
}

Overload overload(const Provider& provider, int activations, int weights, int ids) {
  Overload op{};
  op.provider = provider.name;
  op.activations = activations;
  op.weights = weights;
  op.ids = ids;
  op.version = ort::kApiVersion;
  op.GetName = [](const CustomOp*) { return "SkipExperts"; };
  op.GetExecutionProviderType = [](const CustomOp* o) { return self(o).provider; };
  op.GetInputType = input_type;
  op.GetInputTypeCount = [](const CustomOp*) -> size_t { return kInputs; };
  op.GetOutputType = [](const CustomOp* o, size_t i) -> int { return i == kKept ? int{ort::kInt64} : self(o).activations; };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return kOutputs; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t i) -> int {
    return i >= kGateUpBias ? ort::kOptional : ort::kRequired;
  };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t i) -> int { return i == kKept ? ort::kOptional : ort::kRequired; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = provider.compute;
  op.KernelDestroy = destroy_kernel;
  op.InferOutputShapeFn = infer_shapes;
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return 1; };
  return op;
}

constexpr int kFloats[] = {ort::kFloat, ort::kFloat16, ort::kBFloat16};
// On a GPU quantised weights are an error of the kernel: without an overload ONNX Runtime would use the CPU and not say so.
constexpr int kWeights[] = {ort::kFloat, ort::kFloat16, ort::kBFloat16, ort::kInt8, ort::kUint8};
constexpr int kIds[] = {ort::kInt64, ort::kInt32};
constexpr size_t kOverloads = 30 * sizeof(kProviders) / sizeof(kProviders[0]);
Overload g_overloads[kOverloads];  // outlive every session

OrtStatus* make_domain(const Api* api, OrtCustomOpDomain** domain) {
  if (OrtStatus* s = ort::CreateCustomOpDomain::call(api, "modes", domain)) return s;
  size_t count = 0;
  for (const Provider& provider : kProviders) {
    for (int activations : kFloats) {
      for (int weights : kWeights) {
        for (int ids : kIds) {
          g_overloads[count] = overload(provider, activations, weights, ids);
          if (OrtStatus* s = ort::CustomOpDomainAdd::call(api, *domain, &g_overloads[count++])) return s;
        }
      }
    }
  }
  return add_route(api, *domain);
}

}  // namespace
}  // namespace modes_ort

// Called once per SessionOptions. The domain is made once, and lives as long as the process.
extern "C" MODES_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const ort::ApiBase* base) {
  using namespace modes_ort;
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (!api) {
    const ort::Api* oldest = base->GetApi(1);
    return oldest ? error(oldest, ort::kNotImplemented,
                          std::string("needs ONNX Runtime 1.18 or newer, this is ") + base->GetVersionString())
                  : nullptr;
  }
  static std::mutex mutex;
  static OrtCustomOpDomain* domain = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  if (!domain) {
    g_api = api;
    OrtCustomOpDomain* made = nullptr;
    if (OrtStatus* s = make_domain(api, &made)) return s;
    domain = made;
  }
  return ort::AddCustomOpDomain::call(api, options, domain);
}
