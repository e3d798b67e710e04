/* What this processor can do at most: multiply-adds a second out of registers, bytes a second out of memory.
 *
 * Built by limits.py for the machine it runs on (-march=native). Every function runs on `threads` threads at once and
 * returns the best of `tries` passes; a pass lasts from the first thread's start to the last thread's end. */
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kChains = 24; /* 32 registers: enough independent sums to hide the latency of each */
#elif defined(__AVX__)
constexpr int kBytes = 32, kChains = 12; /* 16 registers */
#else
constexpr int kBytes = 16, kChains = 12;
#endif
constexpr int kFloats = kBytes / 4;
typedef float Vector __attribute__((vector_size(kBytes)));

volatile float sink; /* keeps results alive */

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/* Seconds of the shortest of `tries` passes of work(thread). */
template <class Work>
double shortest(int threads, int tries, Work work) {
  double best = 1e30;
  for (int i = 0; i < tries; ++i) {
    std::vector<double> begin(threads), end(threads);
    std::atomic<int> waiting{threads};
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] {
        --waiting;
        while (waiting.load() > 0) std::this_thread::yield();
        begin[t] = now();
        work(t);
        end[t] = now();
      });
    }
    for (auto& thread : pool) thread.join();
    best = std::min(best, *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end()));
  }
  return best;
}

float sum_lanes(const Vector* v, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i)
    for (int lane = 0; lane < kFloats; ++lane) sum += v[i][lane];
  return sum;
}

constexpr long kSteps = 400000; /* of every chain: some milliseconds */

void multiply_add(Vector b, Vector c) {
  Vector a[kChains];
  for (auto& chain : a) chain = b;
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) a[i] = a[i] * b + c;
  }
  sink = sum_lanes(a, kChains);
}

#ifdef __AVX512BF16__
void multiply_add_bf16(__m512bh b, __m512bh c) {
  __m512 a[kChains];
  for (auto& chain : a) chain = _mm512_setzero_ps();
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) a[i] = _mm512_dpbf16_ps(a[i], b, c);
  }
  Vector sums[kChains];
  std::memcpy(sums, a, sizeof a);
  sink = sum_lanes(sums, kChains);
}
#endif

/* [data, data + bytes) in `Runs` streams side by side; which number is fastest depends on the prefetchers. */
template <int Runs>
void read_all(const char* data, size_t bytes) {
  constexpr int kUnroll = 8 / Runs;
  const size_t run = bytes / Runs / 4096 * 4096;
  Vector sums[8] = {};
  for (size_t i = 0; i < run; i += kUnroll * kBytes) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) sums[v] += *reinterpret_cast<const Vector*>(data + v / kUnroll * run + i + v % kUnroll * kBytes);
  }
  sink = sum_lanes(sums, 8);
}

}  // namespace

extern "C" {

/* float32 FLOP/s; a multiply-add counts as two. */
double peak_float32(int threads, int tries) {
  volatile float b = 0.999f, c = 1e-3f;
  const Vector vb = Vector{} + b, vc = Vector{} + c;
  const double seconds = shortest(threads, tries, [&](int) { multiply_add(vb, vc); });
  return 2.0 * kFloats * kChains * kSteps * threads / seconds;
}

/* FLOP/s of bfloat16 products summed in float32; 0 where the processor has no instruction for it. */
double peak_bfloat16(int threads, int tries) {
#ifdef __AVX512BF16__
  volatile int ones = 0x3f803f80, tiny = 0x30003000;
  const __m512bh b = (__m512bh)_mm512_set1_epi32(ones), c = (__m512bh)_mm512_set1_epi32(tiny);
  const double seconds = shortest(threads, tries, [&](int) { multiply_add_bf16(b, c); });
  return 4.0 * kFloats * kChains * kSteps * threads / seconds;
#else
  (void)threads, (void)tries;
  return 0;
#endif
}

/* Bytes a second read from [data, data + bytes): the caller's memory, of the same pages as the weights. It has to be
 * aligned to 64 bytes and larger than every cache. */
double read_bandwidth(int threads, int tries, const char* data, size_t bytes) {
  const size_t share = bytes / threads / (4 * 4096) * (4 * 4096);
  const double one = shortest(threads, tries, [&](int t) { read_all<1>(data + t * share, share); });
  const double four = shortest(threads, tries, [&](int t) { read_all<4>(data + t * share, share); });
  return static_cast<double>(share) * threads / std::min(one, four);
}

}  // extern "C"
