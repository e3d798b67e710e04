// Checks of the emulated GPU, from the PTX ISA's text and not from the emulator's code. One argument: the check's name.
//
// Exit 0: as expected; 1: not, with a line that says what. The checks of mistakes are to be ended by the emulator.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/hopper_device.cuh"
#include "cuda/runtime.h"
#include "cuda/tensor_map.h"
#include "modes.h"

namespace {

using namespace modes::gpu;

int wrong = 0;
void expect(bool ok, const char* what, int i = 0, int j = 0) {
  if (ok) return;
  if (++wrong < 10) std::printf("wrong: %s at %d, %d\n", what, i, j);
}

void run(Error error) { expect(error == kSuccess, error_text(error)); }

// Small whole numbers, whose products and sums are exact in all types.
int number(int i, int j) { return (i * 7 + j * 13 + i * j) % 9 - 4; }

template <class T>
uint32_t pair_of(int low, int high) {
  return pack<T>(static_cast<float>(low), static_cast<float>(high));
}

// ---- warps ----------------------------------------------------------------------------------------------------------

// PTX ISA, "Matrix Fragments for mma.m16n8k16": groupID = laneid >> 2, threadID_in_group = laneid % 4.
template <class T>
void multiply_kernel(float* d) {
  const int group = static_cast<int>(threadIdx.x) >> 2, thread = static_cast<int>(threadIdx.x) % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 8; i += 2) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, column = thread * 2 + (i < 4 ? 0 : 8);
    a[i / 2] = pair_of<T>(number(row, column), number(row, column + 1));
  }
  for (int i = 0; i < 4; i += 2) {
    const int row = thread * 2 + (i < 2 ? 0 : 8);
    b[i / 2] = pair_of<T>(number(row + 100, group), number(row + 101, group));
  }
  float sums[4] = {1, 1, 1, 1};
  multiply<T>(sums, a, b);
  for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + thread * 2 + (i & 1)] = sums[i];
}

template <class T>
void check_multiply() {
  std::vector<float> d(16 * 8);
  run(launch(multiply_kernel<T>, Launch{1, 32, 0, nullptr}, d.data()));
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      int sum = 1;
      for (int k = 0; k < 16; ++k) sum += number(i, k) * number(k + 100, j);
      expect(d[static_cast<size_t>(i * 8 + j)] == static_cast<float>(sum), "mma.m16n8k16", i, j);
    }
  }
}

// "ldmatrix": thread laneid gets row laneid / 4, elements 2 * (laneid % 4) and the next, of each matrix; the rows'
// addresses are from threads 0-7, 8-15, 16-23, 24-31.
void matrices_kernel(uint32_t* plain, uint32_t* transposed) {
  auto* tile = reinterpret_cast<uint16_t*>(dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) tile[lane * 24 + i] = static_cast<uint16_t>(lane * 8 + i);  // rows of 48 bytes
  __syncwarp();
  uint32_t to[4];
  load_matrices(to, tile + lane * 24);
  for (int m = 0; m < 4; ++m) plain[lane * 4 + m] = to[m];
  load_matrices_transposed(to, tile + lane * 24);
  for (int m = 0; m < 4; ++m) transposed[lane * 4 + m] = to[m];
}

void check_matrices() {
  std::vector<uint32_t> plain(128), transposed(128);
  run(launch(matrices_kernel, Launch{1, 32, 32 * 48, nullptr}, plain.data(), transposed.data()));
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const auto at = [&](int row, int column) { return static_cast<uint32_t>(64 * m + 8 * row + column); };
      const int r = lane / 4, c = lane % 4 * 2;
      const size_t i = static_cast<size_t>(lane * 4 + m);
      expect(plain[i] == (at(r, c) | at(r, c + 1) << 16), "ldmatrix", lane, m);
      expect(transposed[i] == (at(c, r) | at(c + 1, r) << 16), "ldmatrix.trans", lane, m);
    }
  }
}

void shuffles_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int* mine = out + lane * 8;
  mine[0] = __shfl_sync(kFullMask, lane, 5);
  mine[1] = __shfl_xor_sync(kFullMask, lane, 3);
  mine[2] = __shfl_up_sync(kFullMask, lane, 2);
  mine[3] = __shfl_down_sync(kFullMask, lane, 2);
  mine[4] = static_cast<int>(__ballot_sync(kFullMask, lane % 3 == 0));
  mine[5] = static_cast<int>(__match_any_sync(kFullMask, lane % 5));
  mine[6] = lane < 16 ? __shfl_sync(0xffffu, lane, 15, 8) : __any_sync(0xffff0000u, lane == 3);
  mine[7] = __shfl_down_sync(kFullMask, lane, 1, 8);
}

void check_shuffles() {
  std::vector<int> out(256);
  run(launch(shuffles_kernel, Launch{1, 32, 0, nullptr}, out.data()));
  uint32_t thirds = 0;
  for (int lane = 0; lane < 32; lane += 3) thirds |= 1u << lane;
  for (int lane = 0; lane < 32; ++lane) {
    const int* mine = &out[static_cast<size_t>(lane * 8)];
    uint32_t same = 0;
    for (int other = lane % 5; other < 32; other += 5) same |= 1u << other;
    expect(mine[0] == 5, "shfl", lane);
    expect(mine[1] == (lane ^ 3), "shfl.xor", lane);
    expect(mine[2] == (lane < 2 ? lane : lane - 2), "shfl.up", lane);
    expect(mine[3] == (lane > 29 ? lane : lane + 2), "shfl.down", lane);
    expect(static_cast<uint32_t>(mine[4]) == thirds, "ballot", lane);
    expect(static_cast<uint32_t>(mine[5]) == same, "match", lane);
    expect(mine[6] == (lane < 8 ? 7 : lane < 16 ? 15 : 0), "shfl of half a warp", lane);
    expect(mine[7] == (lane % 8 == 7 ? lane : lane + 1), "shfl.down of 8", lane);
  }
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

// Every thread reads what one of another warp wrote; `sync` or not.
void exchange_kernel(int* wrongs, int sync) {
  __shared__ int slots[128];
  const int me = static_cast<int>(threadIdx.x);
  slots[me] = me;
  if (sync) __syncthreads();
  if (slots[(me + 37) % 128] != (me + 37) % 128) atomicAdd(wrongs, 1);
}
void check_exchange(int sync) {
  int wrongs = 0;
  run(launch(exchange_kernel, Launch{4, 128, 0, nullptr}, &wrongs, sync));
  std::printf("wrong reads: %d\n", wrongs);
}

// A thread that returns early does not keep __syncthreads closed; a named barrier is for those who call it.
void barriers_kernel(int* out) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (threadIdx.x >= 96) return;
  if (threadIdx.x < 64) {
    atomicAdd(&count, 1);
    barrier_sync(1, 64);
    if (count < 64) atomicAdd(out, 1000);
  }
  __syncthreads();
  atomicAdd(out, 1);
}
void check_barriers() {
  int out = 0;
  run(launch(barriers_kernel, Launch{3, 128, 0, nullptr}, &out));
  expect(out == 3 * 96, "barriers", out);
}

// Shared memory is NaN at the start of every block, and the launch refuses what the device has not.
void fresh_kernel(int* numbers) {
  __shared__ float fixed[4];
  const auto* dynamic = reinterpret_cast<const float*>(dynamic_shared());
  for (int i = 0; i < 4; ++i) {
    if (fixed[i] == fixed[i] || dynamic[i] == dynamic[i]) atomicAdd(numbers, 1);
  }
  __syncthreads();
  fixed[threadIdx.x % 4] = 1;
}
void check_launch() {
  int numbers = 0;
  run(launch(fresh_kernel, Launch{5, 64, 16, nullptr}, &numbers));
  expect(numbers == 0, "fresh shared memory", numbers);
  int major, minor, processors, most;
  run(read_device(0, &major, &minor, &processors, &most));
  expect(processors >= 2 && processors <= 4, "processors", processors);
  run(launch(fresh_kernel, Launch{1, 64, most, nullptr}, &numbers));
  expect(launch(fresh_kernel, Launch{1, 64, most + 1, nullptr}, &numbers) != kSuccess, "too much shared memory", most);
  expect(launch(fresh_kernel, Launch{1, 1025, 16, nullptr}, &numbers) != kSuccess, "too many threads");
  run(launch(fresh_kernel, Launch{0, 64, 16, nullptr}, &numbers));
}

// Three groups of copies; group g may be read once at most 2 - g are under way. `early` reads one group too soon.
void copies_kernel(const uint32_t* from, uint32_t* to, int early) {
  auto* stage = reinterpret_cast<uint4*>(dynamic_shared()) + threadIdx.x * 4;
  const uint32_t* mine = from + threadIdx.x * 16;
  for (int i = 0; i < 3; ++i) {
    copy_async(stage + i, mine + i * 4, 16);
    copy_commit();
  }
  copy_async(stage + 3, mine + 12, 0);
  copy_commit();
  if (!early) copy_wait<2>();
  auto* out = reinterpret_cast<uint4*>(to) + threadIdx.x * 4;
  out[0] = stage[0];
  out[1] = stage[1];
  copy_wait<0>();
  out[2] = stage[2];
  out[3] = stage[3];
}
void check_copies(int early) {
  std::vector<uint32_t> storage(64 * 16 + 4), to_storage(64 * 16 + 4);
  const auto aligned = [](std::vector<uint32_t>& v) {
    return v.data() + (16 - reinterpret_cast<uintptr_t>(v.data()) % 16) % 16 / 4;
  };
  uint32_t *from = aligned(storage), *to = aligned(to_storage);
  for (int i = 0; i < 64 * 16; ++i) from[i] = static_cast<uint32_t>(i + 1);
  run(launch(copies_kernel, Launch{1, 64, 64 * 64, nullptr}, static_cast<const uint32_t*>(from), to, early));
  int wrongs = 0;
  for (int i = 0; i < 64 * 16; ++i) wrongs += to[i] != (i % 16 < 12 ? from[i] : 0);
  std::printf("wrong reads: %d\n", wrongs);
}

#include "emulator_check_hopper.h"
#include "emulator_check_mistakes.h"

}  // namespace

int main(int count, char** arguments) {
  const std::map<std::string, std::function<void()>> checks = {
      {"multiply", [] { check_multiply<bf16>(), check_multiply<f16>(); }},
      {"matrices", check_matrices},
      {"shuffles", check_shuffles},
      {"barriers", check_barriers},
      {"launch", check_launch},
      {"exchange", [] { check_exchange(1); }},
      {"exchange-unsynchronised", [] { check_exchange(0); }},
      {"copies", [] { check_copies(0); }},
      {"copies-early", [] { check_copies(1); }},
      {"phases", check_phases},
      {"tensor-load", check_tensor_load},
      {"product", check_products},
      {"product-unawaited", [] { check_gathered(kReadEarly); }},
      {"gathered", [] { check_gathered(kRight); }},
      {"mistake-unfenced", [] { check_gathered(kUnfenced); }},
      {"mistake-one-thread-fences", [] { check_gathered(kOneFences); }},
      {"mistake-fence-before-wait", [] { check_gathered(kFencedBeforeWait); }},
      {"mistake-no-begin", [] { check_gathered(kNoBegin); }},
      {"mistake-touched", [] { check_gathered(kTouched); }},
      {"mistake-tile-misplaced", [] { check_gathered(kMisplaced); }},
      {"mistake-diverged", [] { mistake(diverged_kernel); }},
      {"mistake-diverged-barrier", [] { mistake(diverged_barrier_kernel); }},
      {"mistake-deadlock", [] { mistake(deadlock_kernel); }},
      {"mistake-barrier-counts", [] { mistake(counts_kernel); }},
      {"mistake-arrivals", [] { mistake(arrivals_kernel); }},
      {"mistake-misaligned-copy", [] { mistake(misaligned_copy_kernel); }},
      {"mistake-past-the-end", [] { mistake(past_the_end_kernel); }},
      {"mistake-overwritten-copy", [] { mistake(overwritten_copy_kernel); }},
      {"mistake-barrier-overwritten", [] { mistake(barrier_overwritten_kernel); }},
      {"mistake-barrier-not-visible", [] { check_tensor_load_with(false, false); }},
      {"mistake-load-unfenced", [] { check_tensor_load_with(true, true); }},
      {"mistake-plain-past-the-end", [] { mistake(plain_past_the_end_kernel); }},
      {"mistake-plain-past-global", mistake_past_global},
  };
  const auto found = checks.find(count == 2 ? arguments[1] : "");
  if (found == checks.end()) {
    std::printf("the check is `%s`, expected one of:\n", count == 2 ? arguments[1] : "");
    for (const auto& check : checks) std::printf("%s\n", check.first.c_str());
    return 2;
  }
  found->second();
  return wrong ? 1 : 0;
}
