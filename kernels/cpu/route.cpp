// Softmax, top-k and the predicted damage of every pair, token by token: many small steps that cost more as nodes of a graph
// than they compute. Compiled with -ffp-contract=off, so that pi is that of common/route.h; vectorised by the compiler, with
// sums in a fixed number of lanes, so that the bits are the same wherever tokens are computed.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "common/message.h"
#include "common/route.h"
#include "modes.h"

namespace modes {
namespace {

constexpr int64_t kTokens = 16;      // of a task
constexpr int64_t kFewTokens = 64;   // fewer are done before another thread is awake
constexpr int64_t kLanes = 8;        // of a sum
constexpr float kLeast = 1.0f / 16777216.0f;

// exp(x), within two units of the last place; NaN stays. Without branches, for loops that become vectors.
inline float exponential(float x) {
  const float number = x != x ? 0.0f : x, high = number > 88.0f ? 88.0f : number, in = high < -87.0f ? -87.0f : high;
  const float scaled = in * 1.44269504f;
  const int32_t n = static_cast<int32_t>(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
  const float whole = static_cast<float>(n);
  const float r = (in - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t bits = (n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x != x ? x : (x < -87.0f ? 0.0f : p * power);
}

// The sum of f(0..n-1), lane by lane.
template <class Term>
inline float lane_sum(int64_t n, const Term& term) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += term(i + l);
  }
  for (int64_t l = 0; i < n; ++i, ++l) lane[l] += term(i);
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

// The largest that is no NaN, or the first: what is NaN shows in the sums below.
inline float largest(int64_t n, const float* v) {
  float lane[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lane[l] = v[0];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lane[l] = v[i + l] > lane[l] ? v[i + l] : lane[l];
  }
  for (; i < n; ++i) lane[0] = v[i] > lane[0] ? v[i] : lane[0];
  for (int64_t l = 1; l < kLanes; ++l) lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
  return lane[0];
}

inline float clamped(float v, const float* range) {
  const float low = v < range[0] ? range[0] : v;  // NaN passes
  return low > range[1] ? range[1] : low;
}

// `out` may be `v`. Returns the sum that everything is to be divided by.
inline float exponentials(int64_t n, const float* v, float* out) {
  const float most = largest(n, v);
  for (int64_t i = 0; i < n; ++i) out[i] = exponential(v[i] - most);
  return lane_sum(n, [&](int64_t i) { return out[i]; });
}

inline float logsumexp(int64_t n, const float* v, float* scratch) {
  const float sum = exponentials(n, v, scratch);
  return std::log(sum) + largest(n, v);
}

// The k largest of n in falling order, of equal ones the first. Always k different places, whatever is NaN.
inline void choose(int64_t n, int64_t k, const float* v, int64_t* ids, float* weights) {
  int64_t held = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (held == k && !(v[i] > weights[k - 1])) continue;
    int64_t at = held < k ? held++ : k - 1;
    for (; at > 0 && v[i] > weights[at - 1]; --at) weights[at] = weights[at - 1], ids[at] = ids[at - 1];
    weights[at] = v[i], ids[at] = i;
  }
}

// scratch: [E].
void route(const modes_route_args& a, int64_t token, float* scratch) {
  const float* logits = a.logits + token * a.experts;
  int64_t* ids = a.expert_ids + token * a.top_k;
  float* weights = a.expert_weights + token * a.top_k;
  if (a.softmax_first) {
    const float sum = exponentials(a.experts, logits, scratch);
    for (int64_t e = 0; e < a.experts; ++e) scratch[e] /= sum;
    choose(a.experts, a.top_k, scratch, ids, weights);
    if (!a.normalise) return;
    const float total = route_sum(a.top_k, [&](int64_t j) { return weights[j]; });
    for (int64_t j = 0; j < a.top_k; ++j) weights[j] /= total;
  } else {
    choose(a.experts, a.top_k, logits, ids, weights);
    const float sum = exponentials(a.top_k, weights, weights);
    for (int64_t j = 0; j < a.top_k; ++j) weights[j] /= sum;
  }
}

// scratch: [2E].
void score(const modes_route_args& a, int64_t token, float* scratch) {
  const int64_t E = a.experts, k = a.top_k, group = a.group[token];
  const int64_t* ids = a.expert_ids + token * k;
  const float* weights = a.expert_weights + token * k;
  const float* logits = a.predictor_logits + token * E;
  float* const own = scratch;
  float* const spare = scratch + E;
  for (int64_t e = 0; e < E; ++e) own[e] = a.predictor_bias ? logits[e] + a.predictor_bias[e] : logits[e];
  float* const out = a.score + token * k;
  for (int64_t j = 0; j < k; ++j) out[j] = own[ids[j]];
  const float mass = logsumexp(k, out, spare) - logsumexp(E, own, spare);
  const float sum = route_sum(k, [&](int64_t j) { return weights[j]; });
  float salient = 0.0f;
  if (a.saliency) {
    const int64_t row = group % a.saliency_groups;
    const float* x = a.x + token * a.hidden;
    const float* direction = a.saliency + row * (a.hidden + 1);
    const float found = lane_sum(a.hidden, [&](int64_t i) { return x[i] * direction[i]; }) + direction[a.hidden];
    const float* range = a.saliency_range + 2 * row;
    salient = exponential(a.power * (clamped(found, range) - range[1]));
  }
  for (int64_t j = 0; j < k; ++j) {
    const float* of = a.coefficients + ids[j] * (E + 2);
    const float predicted = lane_sum(E, [&](int64_t e) { return own[e] * of[e]; }) + mass * of[E] + of[E + 1];
    const float pi = weights[j] / sum;
    float value = pi * exponential(clamped(predicted, a.range) - a.range[1]);
    if (a.saliency) {
      value = value * std::sqrt(pi) * salient;
      value = value < kLeast ? kLeast : value;
    }
    out[j] = a.score_scale[a.score_scale_per_expert ? group * E + ids[j] : group] * value;
  }
}

modes_status check(const modes_route_args* args, modes_message* message) {
  if (!args) return fail(message, MODES_BAD_ARGUMENT, "args is null");
  const modes_route_args& a = *args;
  if (a.struct_size != sizeof(modes_route_args)) {
    return fail(message, MODES_BAD_ARGUMENT, "struct_size is %llu, expected %zu",
                static_cast<unsigned long long>(a.struct_size), sizeof(modes_route_args));
  }
  // So that no product of sizes overflows.
  constexpr int64_t kMost = int64_t{1} << 31;
  if (a.tokens < 0 || a.tokens > kMost || a.experts < 1 || a.experts > (1 << 20) || a.top_k < 1 || a.top_k > a.experts) {
    return fail(message, MODES_BAD_SHAPE, "tokens `%lld`, experts `%lld`, top_k `%lld`: expected 0 or more, 1 or more, and "
                "1 to experts", static_cast<long long>(a.tokens), static_cast<long long>(a.experts),
                static_cast<long long>(a.top_k));
  }
  if (a.tokens == 0) return MODES_OK;
  if (!a.expert_ids || !a.expert_weights) return fail(message, MODES_BAD_ARGUMENT, "expert_ids or expert_weights is null");
  if (!a.score) return a.logits ? MODES_OK : fail(message, MODES_BAD_ARGUMENT, "neither logits nor score: nothing to do");
  if (a.groups < 1 || (a.saliency && (a.hidden < 1 || a.hidden > kMost || a.saliency_groups < 1))) {
    return fail(message, MODES_BAD_SHAPE, "groups `%lld`, hidden `%lld`, saliency_groups `%lld`: expected 1 or more",
                static_cast<long long>(a.groups), static_cast<long long>(a.hidden),
                static_cast<long long>(a.saliency_groups));
  }
  if (!a.group || !a.score_scale || !a.predictor_logits || !a.coefficients || !a.range ||
      (a.saliency && (!a.x || !a.saliency_range))) {
    return fail(message, MODES_BAD_ARGUMENT, "a score needs group, score_scale, predictor_logits, coefficients and range, "
                "and with saliency also x and saliency_range; one is null");
  }
  for (int64_t t = 0; t < a.tokens; ++t) {
    if (a.group[t] < 0 || a.group[t] >= a.groups) {
      return fail(message, MODES_BAD_GROUP, "group `%d` of token %lld is not in 0..%lld", a.group[t],
                  static_cast<long long>(t), static_cast<long long>(a.groups - 1));
    }
    for (int64_t j = 0; !a.logits && j < a.top_k; ++j) {
      const int64_t id = a.expert_ids[t * a.top_k + j];
      if (id < 0 || id >= a.experts) {
        return fail(message, MODES_BAD_EXPERT_ID, "expert id `%lld` of token %lld, slot %lld is not in 0..%lld",
                    static_cast<long long>(id), static_cast<long long>(t), static_cast<long long>(j),
                    static_cast<long long>(a.experts - 1));
      }
    }
  }
  return MODES_OK;
}

}  // namespace
}  // namespace modes

modes_status modes_cpu_route(const modes_route_args* args, const modes_parallel_for* parallel_for, modes_message* message) {
  if (message) message->text[0] = '\0';
  const modes_status status = modes::check(args, message);
  if (status != MODES_OK || args->tokens == 0) return status;
  struct State {
    const modes_route_args* args;
    std::atomic<bool> no_memory{false};
  } state{args};
  const modes_task task = [](void* opaque, size_t index) {
    State& own = *static_cast<State*>(opaque);
    const modes_route_args& a = *own.args;
    constexpr int64_t kOnStack = 512;
    float local[2 * kOnStack];
    std::unique_ptr<float[]> heap;
    if (a.experts > kOnStack) heap.reset(new (std::nothrow) float[static_cast<size_t>(2 * a.experts)]);
    float* const scratch = a.experts > kOnStack ? heap.get() : local;
    if (!scratch) {
      own.no_memory = true;
      return;
    }
    const int64_t first = static_cast<int64_t>(index) * modes::kTokens;
    for (int64_t t = first; t < std::min(a.tokens, first + modes::kTokens); ++t) {
      if (a.logits) modes::route(a, t, scratch);
      if (a.score) modes::score(a, t, scratch);
    }
  };
  const size_t tasks = static_cast<size_t>((args->tokens + modes::kTokens - 1) / modes::kTokens);
  if (!parallel_for || args->tokens < modes::kFewTokens) {
    for (size_t i = 0; i < tasks; ++i) task(&state, i);
  } else if (parallel_for->run(parallel_for->context, tasks, task, &state)) {
    return modes::fail(message, MODES_PARALLEL_FOR, "the caller's parallel_for failed");
  }
  return state.no_memory ? modes::fail(message, MODES_NO_MEMORY, "no memory for the scratch space of a task") : MODES_OK;
}
