// What the kernels of modes::SkipExperts share: attributes at creation, inputs and outputs of a run, and its status.
#include <initializer_list>
#include <new>

#include "onnxruntime/skip_experts.h"

namespace modes_ort {

using ort::Api;

const char* const kInputName[kInputs] = {"hidden",       "expert_ids", "expert_weights", "group",          "tau",
                                         "score_scale",  "gate_up",    "down",           "gate_up_bias",   "down_bias",
                                         "score",        "gate_up_scales", "down_scales"};

namespace {

// ONNX Runtime reports an attribute that is not there as an error: then the default stays.
bool present(const Api* api, OrtStatus* status) {
  if (!status) return true;
  ort::ReleaseStatus::call(api, status);
  return false;
}

OrtStatus* read_flag(const Api* api, const OrtKernelInfo* info, const char* name, bool* flag) {
  int64_t value = 0;
  if (!present(api, ort::GetAttributeInt::call(api, info, name, &value))) return nullptr;
  if (value != 0 && value != 1) {
    return error(api, ort::kInvalidArgument,
                 std::string("attribute ") + name + " is `" + std::to_string(value) + "`, expected 0 or 1");
  }
  *flag = value == 1;
  return nullptr;
}

}  // namespace

OrtStatus* error(const Api* api, int code, const std::string& text) {
  return ort::CreateStatus::call(api, code, ("modes.SkipExperts: " + text).c_str());
}

OrtStatus* read_attributes(const Api* api, const OrtKernelInfo* info, Attributes* attributes) {
  size_t size = 0;
  if (present(api, ort::GetAttributeString::call(api, info, "activation", nullptr, &size))) {
    std::string name(size, '\0');
    if (OrtStatus* s = ort::GetAttributeString::call(api, info, "activation", &name[0], &size)) return s;
    name.resize(size ? size - 1 : 0);  // the size counts the terminating zero
    if (name == "silu") {
      attributes->activation = MODES_SILU;
    } else if (name == "gelu_tanh") {
      attributes->activation = MODES_GELU_TANH;
    } else if (name == "swiglu_oai") {
      attributes->activation = MODES_SWIGLU_OAI;
    } else {
      return error(api, ort::kInvalidArgument,
                   "attribute activation is `" + name + "`, expected silu, gelu_tanh or swiglu_oai");
    }
  }
  float value = 0.0f;
  if (present(api, ort::GetAttributeFloat::call(api, info, "alpha", &value))) attributes->alpha = value;
  if (present(api, ort::GetAttributeFloat::call(api, info, "limit", &value))) attributes->limit = value;
  int64_t block = 0;
  if (present(api, ort::GetAttributeInt::call(api, info, "block", &block))) attributes->block = block;
  if (OrtStatus* s = read_flag(api, info, "transposed", &attributes->transposed)) return s;
  return read_flag(api, info, "interleaved", &attributes->interleaved);
}

OrtStatus* create_kernel(const ort::CustomOp*, const Api* api, const OrtKernelInfo* info, void** kernel) {
  Attributes attributes;
  if (OrtStatus* s = read_attributes(api, info, &attributes)) return s;
  *kernel = new (std::nothrow) Kernel{api, attributes};
  return *kernel ? nullptr : error(api, ort::kFail, "no memory");
}

OrtStatus* output(const Api* api, OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank, void** data) {
  OrtValue* value = nullptr;
  if (OrtStatus* s = ort::GetOutput::call(api, context, index, shape, rank, &value)) return s;
  return value ? ort::GetTensorMutableData::call(api, value, data) : nullptr;  // null: nobody asked for it
}

void destroy_kernel(void* kernel) { delete static_cast<Kernel*>(kernel); }

OrtStatus* prepare(const Kernel& kernel, OrtKernelContext* context, modes_args* args) {
  const Api* api = kernel.api;
  size_t inputs = 0, outputs = 0;  // trailing optional ones that the node leaves out are not counted
  if (OrtStatus* s = ort::GetInputCount::call(api, context, &inputs)) return s;
  if (OrtStatus* s = ort::GetOutputCount::call(api, context, &outputs)) return s;
  Tensor tensors[kInputs];
  for (size_t i = 0; i < inputs && i < kInputs; ++i) {
    if (OrtStatus* s = read_tensor(api, context, kInputName, i, &tensors[i])) return s;
  }
  if (OrtStatus* s = bind(api, kernel.attributes, tensors, args)) return s;

  const Tensor& hidden = tensors[kHidden];
  if (OrtStatus* s = output(api, context, kOutput, hidden.shape, hidden.rank, &args->out)) return s;
  if (outputs <= kKept) return nullptr;
  void* kept = nullptr;
  if (OrtStatus* s = output(api, context, kKept, &args->groups, 1, &kept)) return s;
  args->kept = static_cast<int64_t*>(kept);
  return nullptr;
}

OrtStatus* answer(const Api* api, modes_status status, const modes_message& message) {
  switch (status) {
    case MODES_OK: return nullptr;
    // Never "execution provider failed": ONNX Runtime's Python interface then runs everything on the CPU instead.
    case MODES_NO_MEMORY:
    case MODES_NO_DEVICE:
    case MODES_CUDA: return error(api, ort::kFail, message.text);
    default: return error(api, ort::kInvalidArgument, message.text);
  }
}

}  // namespace modes_ort
