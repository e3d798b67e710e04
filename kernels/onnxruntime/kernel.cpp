// The CPU kernel of modes::SkipExperts: attributes at creation, one call of the C interface per run.
#include <initializer_list>
#include <new>

#include "onnxruntime/skip_experts.h"

namespace modes_ort {

using ort::Api;

const char* const kInputName[kInputs] = {"hidden",  "expert_ids", "expert_weights", "group",     "tau",  "score_scale",
                                         "gate_up", "down",       "gate_up_bias",   "down_bias", "score"};

namespace {

// No state changes after creation: sessions run one kernel from many threads. Scratch memory belongs to each call.
struct Kernel {
  const Api* api;
  Attributes attributes;
};

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

// ONNX Runtime's own threads, with the status they may end in.
struct Threads {
  const Api* api;
  OrtKernelContext* context;
  OrtStatus* failure;

  static int run(void* self, size_t tasks, modes_task task, void* state) {
    Threads* threads = static_cast<Threads*>(self);
    threads->failure = ort::ParallelFor::call(threads->api, threads->context, task, tasks, 0, state);
    return threads->failure != nullptr;
  }
};

OrtStatus* output(const Api* api, OrtKernelContext* context, Output index, const int64_t* shape, size_t rank,
                  void** data) {
  OrtValue* value = nullptr;
  if (OrtStatus* s = ort::GetOutput::call(api, context, index, shape, rank, &value)) return s;
  return value ? ort::GetTensorMutableData::call(api, value, data) : nullptr;  // null: nobody asked for it
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
  if (OrtStatus* s = read_flag(api, info, "transposed", &attributes->transposed)) return s;
  return read_flag(api, info, "interleaved", &attributes->interleaved);
}

OrtStatus* create_kernel(const ort::CustomOp*, const Api* api, const OrtKernelInfo* info, void** kernel) {
  Attributes attributes;
  if (OrtStatus* s = read_attributes(api, info, &attributes)) return s;
  *kernel = new (std::nothrow) Kernel{api, attributes};
  return *kernel ? nullptr : error(api, ort::kFail, "no memory");
}

void destroy_kernel(void* kernel) { delete static_cast<Kernel*>(kernel); }

OrtStatus* compute(void* self, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  const Api* api = kernel.api;
  size_t inputs = 0, outputs = 0;  // trailing optional ones that the node leaves out are not counted
  if (OrtStatus* s = ort::GetInputCount::call(api, context, &inputs)) return s;
  if (OrtStatus* s = ort::GetOutputCount::call(api, context, &outputs)) return s;
  Tensor tensors[kInputs];
  for (size_t i = 0; i < inputs && i < kInputs; ++i) {
    if (OrtStatus* s = read_tensor(api, context, i, &tensors[i])) return s;
  }
  modes_args args;
  if (OrtStatus* s = bind(api, kernel.attributes, tensors, &args)) return s;

  const Tensor& hidden = tensors[kHidden];
  if (OrtStatus* s = output(api, context, kOutput, hidden.shape, hidden.rank, &args.out)) return s;
  if (outputs > kKept) {
    void* kept = nullptr;
    if (OrtStatus* s = output(api, context, kKept, &args.groups, 1, &kept)) return s;
    args.kept = static_cast<int64_t*>(kept);
  }
  Threads threads{api, context, nullptr};
  const modes_parallel_for parallel_for{&threads, Threads::run};
  modes_message message;
  const modes_status status = modes_cpu_skip_experts(&args, &parallel_for, nullptr, 0, &message);
  if (threads.failure) return threads.failure;
  if (status == MODES_OK) return nullptr;
  return error(api, status == MODES_NO_MEMORY ? ort::kFail : ort::kInvalidArgument, message.text);
}

}  // namespace modes_ort
