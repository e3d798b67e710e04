// The library against loops in double precision, without Python: for other processors, and for the thread sanitizer.
//
//   g++ -std=c++17 -pthread -Ikernels/include tests/kernels/self_check.cpp libmodes_cpu.so -o self_check && ./self_check
//
// Prints the instruction set and the number of checks; exits with 1 after the first that fails.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "modes.h"

namespace {

std::atomic<int> checks{0};

#define CHECK(condition, ...)                                       \
  do {                                                              \
    ++checks;                                                       \
    if (!(condition)) {                                             \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                            \
      std::fprintf(stderr, "\n");                                   \
      std::exit(1);                                                 \
    }                                                               \
  } while (false)

// Elements are written and read here bit by bit: what the compiler makes of a half is part of what is checked.
// Every value below has 7 bits at most and so is exact in each of the three.
uint16_t half_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if ((bits & 0x7fffffffu) == 0) return static_cast<uint16_t>(bits >> 16);
  const uint32_t exponent = ((bits >> 23) & 0xffu) - 127 + 15;
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | exponent << 10 | (bits >> 13 & 0x3ffu));
}

double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  if (exponent == 31) return fraction ? NAN : bits & 0x8000 ? -INFINITY : INFINITY;
  return bits & 0x8000 ? -size : size;
}

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  // A multiple of `step` between -63 and 63 steps.
  double element(double step) { return (static_cast<int>(next() % 127) - 63) * step; }
};

// An array of modes_dtype elements whose first byte lies `shift` bytes past an aligned address, and its values.
struct Array {
  std::vector<double> value;
  std::vector<unsigned char> bytes;
  size_t shift = 0;

  Array(Random* random, size_t count, double step, int32_t dtype, size_t at) : value(count), shift(at) {
    const size_t size = dtype == MODES_F32 ? 4 : 2;
    bytes.resize(count * size + shift);
    for (size_t i = 0; i < count; ++i) {
      value[i] = random->element(step);
      const float v = static_cast<float>(value[i]);
      unsigned char* to = bytes.data() + shift + i * size;
      uint32_t wide;
      std::memcpy(&wide, &v, sizeof wide);
      const uint16_t narrow = dtype == MODES_F16 ? half_bits(v) : static_cast<uint16_t>(wide >> 16);
      if (dtype == MODES_F32) std::memcpy(to, &wide, 4);
      else std::memcpy(to, &narrow, 2);
    }
  }
  const void* data() const { return bytes.data() + shift; }
};

struct Shape {
  int64_t tokens, hidden, intermediate, experts, top_k;
};

struct Layout {
  int32_t dtype, weight_dtype, transposed, interleaved, activation;
  bool biases;
  size_t shift;  // of the weights
};

// A layer with its arrays, and what its outputs should be.
class Layer {
 public:
  Layer(const Shape& shape, const Layout& layout, uint64_t seed)
      : random_{seed},
        shape_(shape),
        layout_(layout),
        x_(&random_, count(shape.tokens, shape.hidden), 1 / 32.0, layout.dtype, 0),
        weights_(&random_, count(shape.tokens, shape.top_k), 1 / 64.0, layout.dtype, 0),
        gate_up_(&random_, count(shape.experts, 2 * shape.intermediate, shape.hidden), 1 / 128.0, layout.weight_dtype,
                 layout.shift),
        down_(&random_, count(shape.experts, shape.hidden, shape.intermediate), 1 / 128.0, layout.weight_dtype, layout.shift),
        gate_up_bias_(&random_, count(shape.experts, 2 * shape.intermediate), 1 / 64.0, layout.weight_dtype, layout.shift),
        down_bias_(&random_, count(shape.experts, shape.hidden), 1 / 64.0, layout.weight_dtype, layout.shift),
        ids_(count(shape.tokens, shape.top_k)),
        group_(count(shape.tokens)),
        score_(count(shape.tokens, shape.top_k)) {
    for (int64_t& id : ids_) id = random_.next() % shape.experts;
    for (int32_t& group : group_) group = static_cast<int32_t>(random_.next() % 2);
    for (float& score : score_) score = static_cast<float>(random_.next() % 8) / 8;
  }

  modes_args args(void* out, int32_t threads) const {
    modes_args args{};
    args.struct_size = sizeof args;
    args.tokens = shape_.tokens;
    args.hidden = shape_.hidden;
    args.intermediate = shape_.intermediate;
    args.experts = shape_.experts;
    args.top_k = shape_.top_k;
    args.groups = 2;
    args.activation_dtype = layout_.dtype;
    args.weight_dtype = layout_.weight_dtype;
    args.id_dtype = MODES_I64;
    args.activation = layout_.activation;
    args.alpha = kAlpha;
    args.limit = kLimit;
    args.transposed = layout_.transposed;
    args.interleaved = layout_.interleaved;
    args.threads = threads;
    args.x = x_.data();
    args.expert_ids = ids_.data();
    args.expert_weights = weights_.data();
    args.group = group_.data();
    args.tau = kTau;
    args.score_scale = kScale;
    args.score = score_.data();
    args.gate_up = gate_up_.data();
    args.down = down_.data();
    args.gate_up_bias = layout_.biases ? gate_up_bias_.data() : nullptr;
    args.down_bias = layout_.biases ? down_bias_.data() : nullptr;
    args.out = out;
    return args;
  }

  size_t out_bytes() const { return x_.bytes.size(); }

  std::vector<unsigned char> run(int32_t threads) const {
    std::vector<unsigned char> out(out_bytes(), 0xff);
    const modes_args call = args(out.data(), threads);
    modes_message message;
    const modes_status status = modes_cpu_skip_experts(&call, nullptr, nullptr, 0, &message);
    CHECK(status == MODES_OK, "%s", message.text);
    return out;
  }

  void compare(const std::vector<unsigned char>& out) const {
    const double tolerance = layout_.dtype == MODES_F32 ? 1e-5 : layout_.dtype == MODES_F16 ? 2e-3 : 1e-2;
    const int64_t H = shape_.hidden;
    for (int64_t t = 0; t < shape_.tokens; ++t) {
      const std::vector<double> expected = token(t);
      double largest = 1;
      for (double v : expected) largest = std::max(largest, std::fabs(v));
      for (int64_t c = 0; c < H; ++c) {
        const double v = element(out, t * H + c);
        CHECK(std::fabs(v - expected[c]) <= tolerance * largest,
              "out[%d, %d] is %g instead of %g; T %d H %d I %d dtype %d weights %d transposed %d interleaved %d activation %d",
              int(t), int(c), v, expected[c], int(shape_.tokens), int(H), int(shape_.intermediate), layout_.dtype,
              layout_.weight_dtype, layout_.transposed, layout_.interleaved, layout_.activation);
      }
    }
  }

 private:
  static constexpr float kAlpha = 1.702f, kLimit = 1.5f;
  static constexpr float kTau[2] = {0.25f, 0.5f}, kScale[2] = {1.0f, 1.0f};

  static size_t count(int64_t a, int64_t b = 1, int64_t c = 1) { return static_cast<size_t>(a * b * c); }

  double element(const std::vector<unsigned char>& out, int64_t i) const {
    uint16_t narrow;
    float v;
    if (layout_.dtype == MODES_F32) {
      std::memcpy(&v, out.data() + i * 4, 4);
      return v;
    }
    std::memcpy(&narrow, out.data() + i * 2, 2);
    if (layout_.dtype == MODES_F16) return half_value(narrow);
    const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
    std::memcpy(&v, &bits, 4);
    return v;
  }

  double activate(double gate, double up) const {
    if (layout_.activation == MODES_SILU) return gate / (1 + std::exp(-gate)) * up;
    if (layout_.activation == MODES_GELU_TANH) {
      return 0.5 * gate * (1 + std::tanh(std::sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate))) * up;
    }
    gate = std::min<double>(gate, kLimit);
    up = std::clamp<double>(up, -kLimit, kLimit);
    return gate / (1 + std::exp(-kAlpha * gate)) * (up + 1);
  }

  std::vector<double> token(int64_t t) const {
    const int64_t H = shape_.hidden, I = shape_.intermediate, k = shape_.top_k;
    std::vector<double> out(H), inner(I);
    for (int64_t j = 0; j < k; ++j) {
      if (score_[t * k + j] < kTau[group_[t]]) continue;
      const int64_t e = ids_[t * k + j];
      const double weight = weights_.value[t * k + j];
      const double *gate_up = &gate_up_.value[e * 2 * I * H], *down = &down_.value[e * H * I];
      for (int64_t i = 0; i < I; ++i) {
        double sum[2] = {0, 0};  // gate, up
        for (int half = 0; half < 2; ++half) {
          const int64_t column = layout_.interleaved ? 2 * i + half : half * I + i;
          for (int64_t h = 0; h < H; ++h) {
            sum[half] += x_.value[t * H + h] * gate_up[layout_.transposed ? h * 2 * I + column : column * H + h];
          }
          if (layout_.biases) sum[half] += gate_up_bias_.value[e * 2 * I + column];
        }
        inner[i] = activate(sum[0], sum[1]);
      }
      for (int64_t h = 0; h < H; ++h) {
        double sum = layout_.biases ? down_bias_.value[e * H + h] : 0;
        for (int64_t i = 0; i < I; ++i) sum += inner[i] * down[layout_.transposed ? i * H + h : h * I + i];
        out[h] += weight * sum;
      }
    }
    return out;
  }

  Random random_;
  Shape shape_;
  Layout layout_;
  Array x_, weights_, gate_up_, down_, gate_up_bias_, down_bias_;
  std::vector<int64_t> ids_;
  std::vector<int32_t> group_;
  std::vector<float> score_;
};

// As an inference engine would: threads of the caller, in no order.
int run_on_threads(void* context, size_t tasks, modes_task task, void* state) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < *static_cast<int*>(context); ++i) {
    threads.emplace_back([&] {
      for (size_t at; (at = next.fetch_add(1)) < tasks;) task(state, tasks - 1 - at);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

int fail_all(void*, size_t, modes_task, void*) { return 7; }

void check_definition() {
  const Shape shapes[] = {{1, 1, 1, 1, 1}, {3, 45, 39, 3, 2}, {40, 45, 39, 3, 2}, {70, 17, 33, 1, 1}, {26, 64, 96, 2, 1}};
  const int32_t dtypes[] = {MODES_F32, MODES_F16, MODES_BF16};
  uint64_t seed = 0;
  for (const Shape& shape : shapes) {
    for (int32_t dtype : dtypes) {
      for (int32_t weight_dtype : dtypes) {
        for (int32_t layout = 0; layout < 4; ++layout, ++seed) {
          const Layer layer(shape, {dtype, weight_dtype, layout & 1, layout >> 1, static_cast<int32_t>(seed % 3),
                                    seed % 2 == 0, seed % 4}, seed);  // weights at any address
          layer.compare(layer.run(1));
        }
      }
    }
  }
}

Layer split_layer(uint64_t seed) {
  const int32_t dtype = static_cast<int32_t>(seed % 3);
  return Layer({40, 100, 90, 3, 2}, {dtype, dtype, static_cast<int32_t>(seed >> 1 & 1), 0, MODES_SILU, true, 0}, seed);
}

void check_threads() {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    const Layer layer = split_layer(seed);
    const std::vector<unsigned char> alone = layer.run(1);
    layer.compare(alone);
    for (int32_t threads : {0, 2, 3, 4, 7, 16}) CHECK(layer.run(threads) == alone, "%d threads", threads);
    for (int threads : {1, 4}) {
      std::vector<unsigned char> out(layer.out_bytes(), 0xff);
      const modes_args call = layer.args(out.data(), 1);
      const modes_parallel_for parallel_for{&threads, run_on_threads};
      modes_message message;
      CHECK(modes_cpu_skip_experts(&call, &parallel_for, nullptr, 0, &message) == MODES_OK, "%s", message.text);
      CHECK(out == alone, "parallel_for with %d threads", threads);
    }
  }
}

void check_calls_at_once() {
  std::vector<std::thread> callers;
  for (uint64_t seed = 0; seed < 6; ++seed) {
    callers.emplace_back([seed] {
      const Layer layer = split_layer(seed);
      const std::vector<unsigned char> alone = layer.run(1);
      for (int i = 0; i < 8; ++i) {
        modes_cpu_set_threads(static_cast<int32_t>(i % 4));
        CHECK(modes_cpu_threads() >= 1, "no threads");
        CHECK(layer.run(i % 2 ? 3 : 0) == alone, "call %d of caller %d", i, int(seed));
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  modes_cpu_set_threads(0);
}

// Workspace of the exact size, from the heap: the address sanitizer sees what is written past it.
void check_workspace() {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    const Layer layer = split_layer(seed);
    std::vector<unsigned char> out(layer.out_bytes(), 0xff);
    const modes_args call = layer.args(out.data(), 3);
    size_t bytes = 0;
    modes_message message;
    CHECK(modes_cpu_workspace_size(&call, &bytes, &message) == MODES_OK, "%s", message.text);
    unsigned char* memory = static_cast<unsigned char*>(std::aligned_alloc(MODES_ALIGNMENT, bytes));
    CHECK(bytes % MODES_ALIGNMENT == 0 && memory, "%zu bytes", bytes);
    std::memset(memory, 0xff, bytes);  // NaN, were it read
    CHECK(modes_cpu_skip_experts(&call, nullptr, memory, bytes, &message) == MODES_OK, "%s", message.text);
    CHECK(out == layer.run(1), "with a workspace");
    CHECK(modes_cpu_skip_experts(&call, nullptr, memory, bytes - 1, &message) == MODES_BAD_WORKSPACE, "too small");
    CHECK(modes_cpu_skip_experts(&call, nullptr, memory + 1, bytes, &message) == MODES_BAD_WORKSPACE, "misaligned");
    std::free(memory);
  }
}

void check_mistakes() {
  const Layer layer = split_layer(0);
  std::vector<unsigned char> out(layer.out_bytes());
  modes_message message;
  const auto status = [&](const modes_args& call) { return modes_cpu_skip_experts(&call, nullptr, nullptr, 0, &message); };
  CHECK(modes_cpu_skip_experts(nullptr, nullptr, nullptr, 0, nullptr) == MODES_BAD_ARGUMENT, "no arguments");
  modes_args call = layer.args(out.data(), 1);
  call.struct_size -= 8;
  CHECK(status(call) == MODES_BAD_ARGUMENT && std::strstr(message.text, "modes_args"), "%s", message.text);
  call = layer.args(out.data(), 1);
  call.hidden = 0;
  CHECK(status(call) == MODES_BAD_SHAPE && std::strstr(message.text, "hidden"), "%s", message.text);
  call = layer.args(out.data(), 1);
  call.experts = int64_t{1} << 62;
  CHECK(status(call) == MODES_BAD_SHAPE, "%s", message.text);
  call = layer.args(out.data(), 1);
  call.down = nullptr;
  CHECK(status(call) == MODES_BAD_ARGUMENT && std::strstr(message.text, "down is null"), "%s", message.text);
  call = layer.args(out.data(), 1);
  call.weight_dtype = 5;
  CHECK(status(call) == MODES_BAD_ARGUMENT && std::strstr(message.text, "weight_dtype"), "%s", message.text);
  call.weight_dtype = MODES_I4, call.transposed = 0, call.block = 48;
  CHECK(status(call) == MODES_BAD_ARGUMENT && std::strstr(message.text, "block is `48`"), "%s", message.text);
  call.block = 64;
  CHECK(status(call) == MODES_BAD_ARGUMENT && std::strstr(message.text, "gate_up_scales is null"), "%s", message.text);
  call.transposed = 1;
  CHECK(status(call) == MODES_BAD_ARGUMENT && std::strstr(message.text, "cannot be transposed"), "%s", message.text);
  call = layer.args(out.data(), 1);
  call.experts = 1;
  CHECK(status(call) == MODES_BAD_EXPERT_ID && std::strstr(message.text, "token"), "%s", message.text);
  call = layer.args(out.data(), 1);
  call.groups = 1;
  CHECK(status(call) == MODES_BAD_GROUP && std::strstr(message.text, "token"), "%s", message.text);
  call = layer.args(out.data(), 1);
  const modes_parallel_for broken{nullptr, fail_all};
  CHECK(modes_cpu_skip_experts(&call, &broken, nullptr, 0, &message) == MODES_PARALLEL_FOR, "%s", message.text);
  call.tokens = 0;
  call.x = nullptr;
  CHECK(status(call) == MODES_OK && !message.text[0], "%s", message.text);
}

}  // namespace

int main() {
  check_mistakes();
  check_definition();
  check_workspace();
  check_threads();
  check_calls_at_once();
  std::printf("%s: %d checks passed\n", modes_cpu_isa(), checks.load());
}
