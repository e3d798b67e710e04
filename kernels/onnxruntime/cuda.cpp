// modes::SkipExperts on a GPU: what the context says of stream and memory, and one call of the C interface. Nothing is
// allocated outside ONNX Runtime's arena, read back or waited for, so that a run can be captured in a CUDA graph.
#if defined(MODES_WITH_CUDA)

#include "onnxruntime/skip_experts.h"

namespace modes_ort {
namespace {

using ort::Api;

// Scratch memory of one run, on the device of a tensor. It goes back to ONNX Runtime when the kernels that use it are
// queued, not when they have run. That is as safe as it is for ONNX Runtime's own tensors: its arena notes the stream
// that a piece was taken for. It gives the piece to that stream again, whose later work waits for ours, but to another
// stream only after the two were synchronized. Memory from GetScratchBuffer has this note. Memory from the allocator
// itself has none: freed, it could go at once to the stream of another thread's run. So the allocator is asked only where
// there is no stream, and one order for everything.
class Scratch {
 public:
  explicit Scratch(const Api* api) : api_(api) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {  // an exception of ONNX Runtime's arena comes by here as well
    if (OrtStatus* s = release()) ort::ReleaseStatus::call(api_, s);
  }

  OrtStatus* take(OrtKernelContext* context, const OrtValue* beside, void* stream, size_t bytes) {
    const OrtMemoryInfo* where = nullptr;  // belongs to the tensor
    if (OrtStatus* s = ort::GetTensorMemoryInfo::call(api_, beside, &where)) return s;
    if (OrtStatus* s = ort::GetAllocator::call(api_, context, where, &allocator_)) return s;
    const size_t more = bytes + MODES_CUDA_ALIGNMENT - 1;  // an arena need not align as we do
    OrtStatus* s = stream ? ort::GetScratchBuffer::call(api_, context, where, more, &memory_)
                          : ort::AllocatorAlloc::call(api_, allocator_, more, &memory_);
    if (s) return s;
    if (memory_) return nullptr;
    return error(api_, ort::kFail, "no memory for `" + std::to_string(more) + "` bytes of scratch space");
  }

  void* data() const {
    if (!memory_) return nullptr;
    const uintptr_t past = reinterpret_cast<uintptr_t>(memory_) % MODES_CUDA_ALIGNMENT;
    return static_cast<char*>(memory_) + (past ? MODES_CUDA_ALIGNMENT - past : 0);
  }

  // ONNX Runtime frees neither scratch buffers nor the allocators that it lends.
  OrtStatus* release() {
    OrtStatus* status = memory_ ? ort::AllocatorFree::call(api_, allocator_, memory_) : nullptr;
    if (allocator_) ort::ReleaseAllocator::call(api_, allocator_);
    memory_ = nullptr;
    allocator_ = nullptr;
    return status;
  }

 private:
  const Api* api_;
  OrtAllocator* allocator_ = nullptr;
  void* memory_ = nullptr;
};

}  // namespace

OrtStatus* compute_on_gpu(void* self, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  const Api* api = kernel.api;
  modes_args args;
  if (OrtStatus* s = prepare(kernel, context, &args)) return s;
  void* stream = nullptr;
  if (OrtStatus* s = ort::GetGpuStream::call(api, context, &stream)) return s;

  size_t bytes = 0;
  modes_message message;
  modes_status status = modes_cuda_workspace_size(&args, &bytes, &message);
  if (status != MODES_OK) return answer(api, status, message);
  Scratch scratch(api);
  if (bytes) {
    const OrtValue* hidden = nullptr;
    if (OrtStatus* s = ort::GetInput::call(api, context, kHidden, &hidden)) return s;
    if (OrtStatus* s = scratch.take(context, hidden, stream, bytes)) return s;
  }
  status = modes_cuda_skip_experts(&args, stream, scratch.data(), bytes, &message);
  OrtStatus* freed = scratch.release();
  if (status == MODES_OK) return freed;
  if (freed) ort::ReleaseStatus::call(api, freed);
  return answer(api, status, message);
}

}  // namespace modes_ort

#endif  // MODES_WITH_CUDA
