// modes::Route: routing, scores, or both, on the CPU. A session on a GPU runs it there too, with copies around it.
#include <new>

#include "onnxruntime/skip_experts.h"

namespace modes_ort {
namespace {

using ort::Api;
using ort::CustomOp;

// All are optional: logits, or the routing that they would give; what follows `score_scale` only with a score.
enum RouteInput : size_t {
  kLogits,
  kIds,
  kWeights,
  kRouteGroup,
  kScale,
  kX,
  kPredictorLogits,
  kPredictorBias,
  kCoefficients,
  kRange,
  kSaliency,
  kSaliencyRange,
  kRouteInputs
};
enum RouteOutput : size_t { kRouteIds, kRouteWeights, kRouteScore, kRouteOutputs };

const char* const kName[kRouteInputs] = {"logits",           "expert_ids",     "expert_weights", "group",
                                         "score_scale",      "x",              "predictor_logits", "predictor_bias",
                                         "coefficients",     "range",          "saliency",       "saliency_range"};

struct RouteKernel {
  const Api* api;
  int64_t top_k;
  bool softmax_first, normalise;
  float power;
};

OrtStatus* refuse(const Api* api, const std::string& text) {
  return ort::CreateStatus::call(api, ort::kInvalidArgument, ("modes.Route: " + text).c_str());
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (size_t i = 0; i < tensor.rank; ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

bool present(const Tensor& tensor) { return tensor.element != ort::kUndefined; }

OrtStatus* need(const Api* api, const Tensor* in, RouteInput index, std::initializer_list<int64_t> wanted) {
  const Tensor& tensor = in[index];
  if (!present(tensor)) return refuse(api, std::string(kName[index]) + " is missing");
  bool same = tensor.rank == wanted.size();
  for (size_t i = 0; same && i < tensor.rank; ++i) same = tensor.shape[i] == wanted.begin()[i];
  if (same) return nullptr;
  Tensor other;
  other.rank = wanted.size();
  for (size_t i = 0; i < other.rank; ++i) other.shape[i] = wanted.begin()[i];
  return refuse(api, std::string(kName[index]) + " has shape `" + shape_of(tensor) + "`, expected " + shape_of(other));
}

#define CHECK(expression) \
  if (OrtStatus* failed = (expression)) return failed

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.data); }

// Sizes and pointers of a score; tokens, experts and top_k are known.
OrtStatus* bind_score(const RouteKernel& kernel, const Tensor* in, modes_route_args* args) {
  const Api* api = kernel.api;
  const int64_t T = args->tokens, E = args->experts;
  CHECK(need(api, in, kRouteGroup, {T}));
  CHECK(need(api, in, kPredictorLogits, {T, E}));
  if (present(in[kPredictorBias])) CHECK(need(api, in, kPredictorBias, {E}));
  CHECK(need(api, in, kCoefficients, {E, E + 2}));
  CHECK(need(api, in, kRange, {2}));
  const int64_t G = in[kScale].shape[0];
  if (in[kScale].rank == 2) {
    CHECK(need(api, in, kScale, {G, E}));
  } else {
    CHECK(need(api, in, kScale, {G}));
  }
  if (present(in[kSaliency])) {
    const int64_t S = in[kSaliency].shape[0], H = in[kX].shape[1];
    CHECK(need(api, in, kX, {T, H}));
    CHECK(need(api, in, kSaliency, {S, H + 1}));
    CHECK(need(api, in, kSaliencyRange, {S, 2}));
    args->hidden = H;
    args->saliency_groups = S;
  }
  args->groups = G;
  args->score_scale_per_expert = in[kScale].rank == 2;
  args->power = kernel.power;
  args->group = static_cast<const int32_t*>(in[kRouteGroup].data);
  args->score_scale = floats(in[kScale]);
  args->x = floats(in[kX]);
  args->predictor_logits = floats(in[kPredictorLogits]);
  args->predictor_bias = floats(in[kPredictorBias]);
  args->coefficients = floats(in[kCoefficients]);
  args->range = floats(in[kRange]);
  args->saliency = floats(in[kSaliency]);
  args->saliency_range = floats(in[kSaliencyRange]);
  return nullptr;
}

OrtStatus* compute_route(void* self, OrtKernelContext* context) {
  const RouteKernel& kernel = *static_cast<const RouteKernel*>(self);
  const Api* api = kernel.api;
  size_t inputs = 0, outputs = 0;  // trailing ones that the node leaves out are not counted
  CHECK(ort::GetInputCount::call(api, context, &inputs));
  CHECK(ort::GetOutputCount::call(api, context, &outputs));
  Tensor in[kRouteInputs];
  for (size_t i = 0; i < inputs && i < kRouteInputs; ++i) CHECK(read_tensor(api, context, kName, i, &in[i]));

  const bool routes = present(in[kLogits]), scores = present(in[kScale]);
  modes_route_args args{};
  args.struct_size = sizeof args;
  args.softmax_first = kernel.softmax_first;
  args.normalise = kernel.normalise;
  args.top_k = kernel.top_k;
  const RouteInput sized = routes ? kLogits : kIds;
  if (in[sized].rank != 2) return refuse(api, std::string(kName[sized]) + " has shape `" + shape_of(in[sized]) + "`, expected " +
                                                  (routes ? "[T, E]" : "[T, k]"));
  args.tokens = in[sized].shape[0];
  if (routes) {
    if (present(in[kIds]) || present(in[kWeights])) return refuse(api, "logits, expert_ids and expert_weights exclude each other");
    args.experts = in[kLogits].shape[1];
    args.logits = floats(in[kLogits]);
  } else {
    if (!scores) return refuse(api, "neither logits nor score_scale: nothing to do");
    CHECK(need(api, in, kIds, {args.tokens, kernel.top_k}));
    CHECK(need(api, in, kWeights, {args.tokens, kernel.top_k}));
    if (in[kPredictorLogits].rank == 2) args.experts = in[kPredictorLogits].shape[1];
    args.expert_ids = static_cast<int64_t*>(in[kIds].data);  // both are read only, without logits
    args.expert_weights = static_cast<float*>(in[kWeights].data);
  }
  if (scores) CHECK(bind_score(kernel, in, &args));

  const int64_t shape[2] = {args.tokens, kernel.top_k};
  if (routes) {
    void *ids = nullptr, *weights = nullptr;
    CHECK(output(api, context, kRouteIds, shape, 2, &ids));
    CHECK(output(api, context, kRouteWeights, shape, 2, &weights));
    args.expert_ids = static_cast<int64_t*>(ids);
    args.expert_weights = static_cast<float*>(weights);
  }
  if (scores) {
    void* score = nullptr;
    if (outputs > kRouteScore) CHECK(output(api, context, kRouteScore, shape, 2, &score));
    args.score = static_cast<float*>(score);
  }
  Threads threads{api, context, nullptr};
  const modes_parallel_for parallel_for{&threads, Threads::run};
  modes_message message;
  const modes_status status = modes_cpu_route(&args, &parallel_for, &message);
  if (threads.failure) return threads.failure;
  if (status == MODES_OK) return nullptr;
  return status == MODES_NO_MEMORY ? ort::CreateStatus::call(api, ort::kFail, message.text) : refuse(api, message.text);
}

#undef CHECK

// An attribute that is not there is an error to ONNX Runtime; then `value` stays.
template <class Get, class Value>
void read(const Api* api, const OrtKernelInfo* info, const char* name, Value* value) {
  Value found{};
  if (OrtStatus* s = Get::call(api, info, name, &found)) {
    ort::ReleaseStatus::call(api, s);
  } else {
    *value = found;
  }
}

OrtStatus* create_route(const CustomOp*, const Api* api, const OrtKernelInfo* info, void** kernel) {
  int64_t top_k = 0, softmax_first = 1, normalise = 0;
  float power = 0.0f;
  read<ort::GetAttributeInt>(api, info, "top_k", &top_k);
  read<ort::GetAttributeInt>(api, info, "softmax_first", &softmax_first);
  read<ort::GetAttributeInt>(api, info, "normalise", &normalise);
  read<ort::GetAttributeFloat>(api, info, "power", &power);
  if (top_k < 1) return refuse(api, "attribute top_k is `" + std::to_string(top_k) + "`, expected 1 or more");
  *kernel = new (std::nothrow) RouteKernel{api, top_k, softmax_first != 0, normalise != 0, power};
  return *kernel ? nullptr : ort::CreateStatus::call(api, ort::kFail, "modes.Route: no memory");
}

int route_input_type(const CustomOp*, size_t index) {
  return index == kIds ? ort::kInt64 : index == kRouteGroup ? ort::kInt32 : ort::kFloat;
}

}  // namespace

OrtStatus* add_route(const Api* api, OrtCustomOpDomain* domain) {
  static CustomOp op{};  // outlives every session
  op.version = ort::kApiVersion;
  op.GetName = [](const CustomOp*) { return "Route"; };
  op.GetExecutionProviderType = [](const CustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputType = route_input_type;
  op.GetInputTypeCount = [](const CustomOp*) -> size_t { return kRouteInputs; };
  op.GetOutputType = [](const CustomOp*, size_t i) -> int { return i == kRouteIds ? int{ort::kInt64} : int{ort::kFloat}; };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return kRouteOutputs; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t) -> int { return ort::kOptional; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) -> int { return ort::kOptional; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  op.CreateKernelV2 = create_route;
  op.KernelComputeV2 = compute_route;
  op.KernelDestroy = [](void* kernel) { delete static_cast<RouteKernel*>(kernel); };
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return 1; };
  return ort::CustomOpDomainAdd::call(api, domain, &op);
}

}  // namespace modes_ort
