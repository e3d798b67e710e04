// modes::SkipExperts on the CPU, on ONNX Runtime's own threads.
#include "onnxruntime/skip_experts.h"

namespace modes_ort {

OrtStatus* compute_on_cpu(void* self, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  modes_args args;
  if (OrtStatus* s = prepare(kernel, context, &args)) return s;
  Threads threads{kernel.api, context, nullptr};
  const modes_parallel_for parallel_for{&threads, Threads::run};
  modes_message message;
  const modes_status status = modes_cpu_skip_experts(&args, &parallel_for, nullptr, 0, &message);
  return threads.failure ? threads.failure : answer(kernel.api, status, message);
}

}  // namespace modes_ort
