// Kernels with one mistake each. Included by emulator_check.cpp.

void mistake(void (*kernel)(const uint32_t*)) {
  alignas(16) static const uint32_t numbers[256] = {};
  run(launch(kernel, Launch{1, 64, 1024, nullptr}, static_cast<const uint32_t*>(numbers)));
}

void diverged_kernel(const uint32_t*) {
  if (threadIdx.x % 32 < 16) {
    __syncwarp();
  } else {
    __ballot_sync(kFullMask, 1);
  }
}
void diverged_barrier_kernel(const uint32_t*) {
  if (threadIdx.x == 3) {
    barrier_sync(1, 64);
  } else {
    __syncthreads();
  }
}
void deadlock_kernel(const uint32_t*) {
  __shared__ Barrier barrier;
  if (threadIdx.x == 0) barrier_init(&barrier, 2);
  __syncthreads();
  if (threadIdx.x == 0) barrier_arrive(&barrier);
  barrier_wait(&barrier, 0);
}
void counts_kernel(const uint32_t*) { barrier_sync(2, threadIdx.x < 32 ? 64 : 96); }
void arrivals_kernel(const uint32_t*) {
  __shared__ Barrier barrier;
  if (threadIdx.x == 0) {
    barrier_init(&barrier, 1);
    barrier_arrive_expect(&barrier, 16);
    barrier_arrive(&barrier);
  }
}
void misaligned_copy_kernel(const uint32_t* from) { copy_async(dynamic_shared() + threadIdx.x * 8, from, 16); }
void past_the_end_kernel(const uint32_t*) {
  uint32_t to[4];
  load_matrices(to, dynamic_shared() + threadIdx.x * 16 + 16);
}
void overwritten_copy_kernel(const uint32_t* from) {
  if (threadIdx.x) return;
  copy_async(dynamic_shared(), from, 16);
  copy_async(dynamic_shared(), from, 16);
}
void barrier_overwritten_kernel(const uint32_t*) {
  auto* barrier = reinterpret_cast<Barrier*>(dynamic_shared());
  if (threadIdx.x) return;
  barrier_init(barrier, 1);
  dynamic_shared()[3] = 0;
  barrier_arrive(barrier);
}
// Only the address sanitizer sees these two.
void plain_past_the_end_kernel(const uint32_t*) { dynamic_shared()[960 + threadIdx.x * 2] = 1; }
void read_global_kernel(const uint32_t* from, uint32_t* to) {
  to[threadIdx.x] = load_streaming(from + threadIdx.x * 4).x;
}
void mistake_past_global() {
  std::vector<uint32_t> from(4 * 63), to(64);
  run(launch(read_global_kernel, Launch{1, 64, 0, nullptr}, static_cast<const uint32_t*>(from.data()), to.data()));
}
