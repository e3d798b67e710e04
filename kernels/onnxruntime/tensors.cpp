// From ONNX Runtime's tensors to modes_args: every shape and dtype checked against the others.
#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "onnxruntime/skip_experts.h"

namespace modes_ort {
namespace {

using ort::Api;

int32_t dtype_of(int element) {
  switch (element) {
    case ort::kFloat16: return MODES_F16;
    case ort::kBFloat16: return MODES_BF16;
    case ort::kInt8: return MODES_I8;
    case ort::kUint8: return MODES_I4;  // two in a byte
    default: return MODES_F32;
  }
}

const char* element_name(int element) {
  switch (element) {
    case ort::kFloat: return "float32";
    case ort::kInt32: return "int32";
    case ort::kInt64: return "int64";
    case ort::kFloat16: return "float16";
    case ort::kBFloat16: return "bfloat16";
    case ort::kInt8: return "int8";
    case ort::kUint8: return "uint8";
    default: return "another type";
  }
}

std::string shape_text(const int64_t* shape, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

OrtStatus* expect_shape(const Api* api, const Tensor* inputs, Input index, std::initializer_list<int64_t> wanted,
                        const char* names) {
  const Tensor& tensor = inputs[index];
  if (!tensor.data && tensor.rank == 0) return nullptr;  // absent
  if (tensor.rank == wanted.size() && std::memcmp(tensor.shape, wanted.begin(), sizeof(int64_t) * wanted.size()) == 0) {
    return nullptr;
  }
  return error(api, ort::kInvalidArgument,
               std::string(kInputName[index]) + " has shape `" + shape_text(tensor.shape, tensor.rank) + "`, expected " +
                   names + " = " + shape_text(wanted.begin(), wanted.size()));
}

OrtStatus* expect_rank(const Api* api, const Tensor* inputs, Input index, size_t low, size_t high, const char* names) {
  if (inputs[index].rank >= low && inputs[index].rank <= high) return nullptr;
  return error(api, ort::kInvalidArgument,
               std::string(kInputName[index]) + " has shape `" +
                   shape_text(inputs[index].shape, inputs[index].rank) + "`, expected " + names);
}

// ONNX Runtime has matched the types with an overload already; this guards what an overload leaves open.
OrtStatus* expect_element(const Api* api, const Tensor* inputs, Input index, int wanted) {
  const Tensor& tensor = inputs[index];
  if (tensor.element == ort::kUndefined || tensor.element == wanted) return nullptr;
  return error(api, ort::kInvalidArgument,
               std::string(kInputName[index]) + " is `" + element_name(tensor.element) + "`, expected " +
                   element_name(wanted));
}

// Weights and scales as modes.h has them; the sizes are those of the layer, not what a row is filled up to.
OrtStatus* expect_quantised(const Api* api, const Attributes& attributes, const Tensor* in, int64_t E, int64_t I, int64_t H) {
  if (attributes.transposed) return error(api, ort::kInvalidArgument, "quantised weights cannot be transposed");
  const int64_t block = attributes.block;
  if (block <= 0 || block % kQuantisedGroup != 0 || block > INT32_MAX) {
    return error(api, ort::kInvalidArgument,
                 "attribute block is `" + std::to_string(block) + "`, expected a multiple of 32 below 2^31");
  }
  for (Input index : {kGateUpScales, kDownScales}) {
    if (in[index].element == ort::kUndefined) {
      return error(api, ort::kInvalidArgument, std::string(kInputName[index]) + " is missing, and the weights are quantised");
    }
  }
  const int64_t each = in[kGateUp].element == ort::kInt8 ? 1 : 2;  // weights of a byte
  const auto stored = [&](int64_t depth) { return (depth + kQuantisedGroup - 1) / kQuantisedGroup * kQuantisedGroup / each; };
  const auto blocks = [&](int64_t depth) { return (depth + block - 1) / block; };
  if (OrtStatus* s = expect_shape(api, in, kGateUp, {E, 2 * I, stored(H)}, "[E, 2I, stored H]")) return s;
  if (OrtStatus* s = expect_shape(api, in, kDown, {E, H, stored(I)}, "[E, H, stored I]")) return s;
  if (OrtStatus* s = expect_shape(api, in, kGateUpScales, {E, 2 * I, blocks(H)}, "[E, 2I, blocks of H]")) return s;
  return expect_shape(api, in, kDownScales, {E, H, blocks(I)}, "[E, H, blocks of I]");
}

}  // namespace

OrtStatus* read_tensor(const Api* api, const OrtKernelContext* context, const char* const* names, size_t index,
                       Tensor* tensor) {
  const OrtValue* value = nullptr;
  if (OrtStatus* s = ort::GetInput::call(api, context, index, &value)) return s;
  if (!value) return nullptr;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* s = ort::GetTensorTypeAndShape::call(api, value, &info)) return s;
  OrtStatus* status = ort::GetTensorElementType::call(api, info, &tensor->element);
  if (!status) status = ort::GetDimensionsCount::call(api, info, &tensor->rank);
  if (!status && tensor->rank > Tensor::kMaxRank) {
    status = error(api, ort::kInvalidArgument,
                   std::string(names[index]) + " has `" + std::to_string(tensor->rank) + "` dimensions");
  }
  if (!status) status = ort::GetDimensions::call(api, info, tensor->shape, tensor->rank);
  // A tensor without elements may have any sizes: none whose product or double would overflow.
  for (size_t i = 0; !status && i < tensor->rank; ++i) {
    if (tensor->shape[i] < 0 || tensor->shape[i] > INT32_MAX) {
      status = error(api, ort::kInvalidArgument,
                     std::string(kInputName[index]) + " has shape `" + shape_text(tensor->shape, tensor->rank) +
                         "`, expected sizes below 2^31");
    }
  }
  ort::ReleaseTensorTypeAndShapeInfo::call(api, info);
  if (status) return status;
  return ort::GetTensorMutableData::call(api, const_cast<OrtValue*>(value), &tensor->data);
}

OrtStatus* bind(const Api* api, const Attributes& attributes, const Tensor* in, modes_args* args) {
#define CHECK(expression) \
  if (OrtStatus* failed = (expression)) return failed
  CHECK(expect_rank(api, in, kHidden, 2, 3, "[T, H] or [B, S, H]"));
  CHECK(expect_rank(api, in, kExpertIds, 2, 2, "[T, k]"));
  CHECK(expect_rank(api, in, kTau, 1, 1, "[G]"));
  CHECK(expect_rank(api, in, kScoreScale, 1, 2, "[G] or [G, E]"));
  CHECK(expect_rank(api, in, kDown, 3, 3, attributes.transposed ? "[E, I, H]" : "[E, H, I]"));

  const Tensor& hidden = in[kHidden];
  const int64_t H = hidden.shape[hidden.rank - 1];
  const int64_t T = hidden.rank == 2 ? hidden.shape[0] : hidden.shape[0] * hidden.shape[1];
  const int64_t k = in[kExpertIds].shape[1], G = in[kTau].shape[0];
  CHECK(expect_rank(api, in, kGateUp, 3, 3, attributes.transposed ? "[E, H, 2I]" : "[E, 2I, H]"));
  const int activations = hidden.element, weights = in[kGateUp].element;
  const bool quantised = is_quantised(dtype_of(weights));
  const int64_t E = in[kDown].shape[0];
  const int64_t I = quantised ? in[kGateUp].shape[1] / 2 : in[kDown].shape[attributes.transposed ? 1 : 2];

  CHECK(expect_shape(api, in, kExpertIds, {T, k}, "[T, k]"));
  CHECK(expect_shape(api, in, kExpertWeights, {T, k}, "[T, k]"));
  CHECK(expect_shape(api, in, kGroup, {T}, "[T]"));
  CHECK(expect_shape(api, in, kScore, {T, k}, "[T, k]"));
  const bool per_expert = in[kScoreScale].rank == 2;
  if (per_expert) {
    CHECK(expect_shape(api, in, kScoreScale, {G, E}, "[G, E]"));
  } else {
    CHECK(expect_shape(api, in, kScoreScale, {G}, "[G]"));
  }
  if (quantised) {
    CHECK(expect_quantised(api, attributes, in, E, I, H));
  } else if (attributes.transposed) {
    CHECK(expect_shape(api, in, kDown, {E, I, H}, "[E, I, H]"));
    CHECK(expect_shape(api, in, kGateUp, {E, H, 2 * I}, "[E, H, 2I]"));
  } else {
    CHECK(expect_shape(api, in, kDown, {E, H, I}, "[E, H, I]"));
    CHECK(expect_shape(api, in, kGateUp, {E, 2 * I, H}, "[E, 2I, H]"));
  }
  CHECK(expect_shape(api, in, kGateUpBias, {E, 2 * I}, "[E, 2I]"));
  CHECK(expect_shape(api, in, kDownBias, {E, H}, "[E, H]"));

  CHECK(expect_element(api, in, kExpertWeights, activations));
  if (in[kExpertIds].element != ort::kInt64) CHECK(expect_element(api, in, kExpertIds, ort::kInt32));
  CHECK(expect_element(api, in, kGroup, ort::kInt32));
  for (Input index : {kTau, kScoreScale, kScore}) CHECK(expect_element(api, in, index, ort::kFloat));
  for (Input index : {kGateUpScales, kDownScales}) CHECK(expect_element(api, in, index, ort::kFloat16));
  CHECK(expect_element(api, in, kDown, weights));
  for (Input index : {kGateUpBias, kDownBias}) CHECK(expect_element(api, in, index, quantised ? int{ort::kFloat} : weights));
#undef CHECK

  *args = modes_args{};
  args->struct_size = sizeof(modes_args);
  args->tokens = T;
  args->hidden = H;
  args->intermediate = I;
  args->experts = E;
  args->top_k = k;
  args->groups = G;
  args->activation_dtype = dtype_of(activations);
  args->weight_dtype = dtype_of(weights);
  args->id_dtype = in[kExpertIds].element == ort::kInt64 ? MODES_I64 : MODES_I32;
  args->activation = attributes.activation;
  args->alpha = attributes.alpha;
  args->limit = attributes.limit;
  args->transposed = attributes.transposed;
  args->interleaved = attributes.interleaved;
  args->score_scale_per_expert = per_expert;
  args->x = hidden.data;
  args->expert_ids = in[kExpertIds].data;
  args->expert_weights = in[kExpertWeights].data;
  args->group = static_cast<const int32_t*>(in[kGroup].data);
  args->tau = static_cast<const float*>(in[kTau].data);
  args->score_scale = static_cast<const float*>(in[kScoreScale].data);
  args->score = static_cast<const float*>(in[kScore].data);
  args->gate_up = in[kGateUp].data;
  args->down = in[kDown].data;
  args->gate_up_bias = in[kGateUpBias].data;
  args->down_bias = in[kDownBias].data;
  args->gate_up_scales = in[kGateUpScales].data;
  args->down_scales = in[kDownScales].data;
  args->block = quantised ? attributes.block : 0;
  return nullptr;
}

}  // namespace modes_ort
