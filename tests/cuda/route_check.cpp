// The emulated route kernels against kernels/cpu/routing.cpp: kept pairs, rows, offsets and counts are the same, on
// random layers and on adversarial ones. Built beside libmodes_emulated.so (MODES_EMULATED); prints what it compared.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/routing.h"
#include "cuda/route.cuh"
#include "modes.h"

namespace {

using modes::gpu::kInvalid;
using modes::gpu::kSkipped;

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

#define CHECK(...)                                                                            \
  do {                                                                                        \
    if (!(__VA_ARGS__)) {                                                                     \
      std::printf("%s:%d: not so: %s (case %s)\n", __FILE__, __LINE__, #__VA_ARGS__, g_case); \
      std::exit(1);                                                                           \
    }                                                                                         \
  } while (0)
char g_case[200];

struct Shape {
  int64_t tokens, experts, top_k, groups;
  int32_t dtype;
  bool wide_ids, per_expert, scores;
};

struct Inputs {
  std::vector<int64_t> wide;
  std::vector<int32_t> narrow, group;
  std::vector<float> weights, tau, scale, score;
  std::vector<uint16_t> bits;  // of 16-bit weights
};

modes_args make_args(const Shape& shape, Inputs* in) {
  modes_args args{};
  args.struct_size = sizeof args;
  args.tokens = shape.tokens;
  args.hidden = args.intermediate = 1;
  args.experts = shape.experts;
  args.top_k = shape.top_k;
  args.groups = shape.groups;
  args.activation_dtype = shape.dtype;
  args.id_dtype = shape.wide_ids ? MODES_I64 : MODES_I32;
  args.score_scale_per_expert = shape.per_expert;
  in->narrow.assign(in->wide.begin(), in->wide.end());
  args.expert_ids = shape.wide_ids ? static_cast<const void*>(in->wide.data()) : in->narrow.data();
  in->bits.clear();
  for (const float weight : in->weights) {
    uint32_t word;
    std::memcpy(&word, &weight, sizeof word);
    const _Float16 half = static_cast<_Float16>(weight);
    uint16_t half_bits;
    std::memcpy(&half_bits, &half, sizeof half_bits);
    in->bits.push_back(shape.dtype == MODES_F16 ? half_bits : static_cast<uint16_t>(word >> 16));
  }
  args.expert_weights = shape.dtype == MODES_F32 ? static_cast<const void*>(in->weights.data()) : in->bits.data();
  args.group = in->group.data();
  args.tau = in->tau.data();
  args.score_scale = in->scale.data();
  args.score = shape.scores ? in->score.data() : nullptr;
  return args;
}

// The tokens from `first` on, in one go: as the library does a round.
void compare(modes_args args, int64_t first) {
  const int64_t tokens = args.tokens - first, pairs = tokens * args.top_k, experts = args.experts;
  std::vector<int64_t> offsets(experts + 1), cursor(experts), active(experts), row_token(pairs + 1), kept(args.groups);
  std::vector<float> row_weight(pairs + 1);
  std::vector<unsigned char> keep(pairs + 1);
  modes::Routing expected{};
  expected.offsets = offsets.data();
  expected.cursor = cursor.data();
  expected.active_expert = active.data();
  expected.row_token = row_token.data();
  expected.row_weight = row_weight.data();
  expected.keep = keep.data();
  args.kept = kept.data();
  modes::route_tokens(args, first, tokens, pairs + args.top_k, &expected);
  CHECK(expected.last_token == args.tokens);

  std::vector<int32_t> own_offsets(experts + 1, -7), own_active(experts, -7), own_count(1, -7), own_token(pairs, -7),
      own_row(pairs, -7);
  std::vector<int64_t> own_kept(args.groups, first == 0 ? -7 : 0);  // added to in later rounds
  std::vector<int32_t> scratch(modes::gpu::route_scratch_bytes(pairs, experts) / 4 + 1, -7);
  args.kept = own_kept.data();
  const modes::gpu::Routed routed{own_offsets.data(), own_active.data(), own_count.data(), own_token.data(),
                                  own_row.data()};
  CHECK(modes::gpu::launch_route(args, first, tokens, routed, scratch.data(), nullptr) == modes::gpu::kSuccess);

  CHECK(own_count[0] == expected.active);
  for (int64_t a = 0; a < expected.active; ++a) CHECK(own_active[a] == active[a]);
  for (int64_t e = 0; e <= experts; ++e) CHECK(own_offsets[e] == offsets[e]);
  for (int64_t r = 0; r < expected.rows; ++r) CHECK(own_token[r] == row_token[r] - first);
  for (int64_t g = 0; g < args.groups; ++g) CHECK(own_kept[g] == kept[g]);
  std::vector<int64_t> next(offsets.begin(), offsets.end());
  for (int64_t p = 0; p < pairs; ++p) {
    const int64_t at = first * args.top_k + p;
    const int64_t expert = args.id_dtype == MODES_I64 ? static_cast<const int64_t*>(args.expert_ids)[at]
                                                      : static_cast<const int32_t*>(args.expert_ids)[at];
    CHECK(own_row[p] == (keep[p] ? next[expert]++ : int64_t{kSkipped}));
  }
}

enum Weights { kRandom, kZeros, kBroken, kTies };

void check(const Shape& shape, Weights weights, bool one_expert, unsigned seed) {
  std::snprintf(g_case, sizeof g_case,
                "T %d E %d k %d G %d dtype %d ids %d per_expert %d scores %d weights %d one %d seed %u",
                static_cast<int>(shape.tokens), static_cast<int>(shape.experts), static_cast<int>(shape.top_k),
                static_cast<int>(shape.groups), shape.dtype, shape.wide_ids, shape.per_expert, shape.scores, weights,
                one_expert, seed);
  std::mt19937 random(seed);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  const auto unit = [&] { return static_cast<float>(random() % 4096) / 4096.0f; };
  const float broken[] = {kNan, kInf, -kInf, 0.0f, -0.0f, 1e38f, 1e-45f, -1.0f, 1.0f};
  const int64_t pairs = shape.tokens * shape.top_k, only = below(shape.experts);
  Inputs in;
  for (int64_t p = 0; p < pairs; ++p) {
    in.wide.push_back(one_expert ? only : below(shape.experts));
    const float drawn = weights == kBroken ? broken[below(9)] : unit();
    in.weights.push_back(weights == kZeros ? 0.0f : weights == kTies ? 0.25f : drawn);
    in.score.push_back(weights == kBroken ? broken[below(9)] : unit());
  }
  for (int64_t t = 0; t < shape.tokens; ++t) in.group.push_back(static_cast<int32_t>(below(shape.groups)));
  for (int64_t g = 0; g < shape.groups; ++g) {
    const float drawn = weights == kBroken ? broken[below(9)] : 0.3f * unit();
    in.tau.push_back(weights == kTies ? 1.0f / static_cast<float>(shape.top_k) : drawn);
  }
  for (int64_t i = 0; i < shape.groups * (shape.per_expert ? shape.experts : 1); ++i) {
    in.scale.push_back(weights == kTies ? 1.0f : weights == kBroken ? broken[below(9)] : unit() + 0.25f);
  }
  modes_args args = make_args(shape, &in);
  compare(args, 0);
  if (shape.tokens > 1) compare(args, shape.tokens / 3 + 1);
  if (weights != kRandom || shape.scores || shape.dtype != MODES_F32) return;
  // Thresholds that are the scores of pairs, and their neighbours.
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t t = below(shape.tokens), group = in.group[t];
    float sum = 0.0f;
    for (int64_t j = 0; j < shape.top_k; ++j) sum += in.weights[t * shape.top_k + j];
    const int64_t expert = in.wide[t * shape.top_k];
    const float scale = in.scale[shape.per_expert ? group * shape.experts + expert : group];
    const float score = scale * (in.weights[t * shape.top_k] / sum);
    in.tau[group] = g % 3 == 0 ? score : std::nextafter(score, g % 3 == 1 ? kInf : -kInf);
  }
  compare(args, 0);
}

void check_invalid() {
  const Shape shape{900, 5, 3, 2, MODES_F32, true, false, false};  // 2,700 pairs: several blocks
  for (const int64_t tokens : {int64_t{20}, shape.tokens}) {
    std::snprintf(g_case, sizeof g_case, "invalid ids and groups, T %d", static_cast<int>(tokens));
    Inputs in;
    for (int64_t p = 0; p < tokens * 3; ++p) in.wide.push_back(p % 5), in.weights.push_back(0.5f);
    for (int64_t t = 0; t < tokens; ++t) in.group.push_back(static_cast<int32_t>(t % 2));
    in.tau = {0.0f, 0.0f};
    in.scale = {1.0f, 1.0f};
    in.wide[7] = 5, in.wide[22] = -1, in.wide[59] = int64_t{1} << 32, in.group[12] = 2, in.group[15] = -1;
    Shape own = shape;
    own.tokens = tokens;
    modes_args args = make_args(own, &in);
    std::vector<int32_t> offsets(6), active(5), count(1), token(tokens * 3, -7), row(tokens * 3, -7);
    std::vector<int32_t> scratch(modes::gpu::route_scratch_bytes(tokens * 3, 5) / 4 + 1);
    std::vector<int64_t> kept(2, -7);
    args.kept = kept.data();
    const modes::gpu::Routed routed{offsets.data(), active.data(), count.data(), token.data(), row.data()};
    CHECK(modes::gpu::launch_route(args, 0, tokens, routed, scratch.data(), nullptr) == modes::gpu::kSuccess);
    int64_t invalid = 0;
    for (int64_t p = 0; p < tokens * 3; ++p) {
      const bool expected = p == 7 || p == 22 || p == 59 || p / 3 == 12 || p / 3 == 15;
      CHECK((row[p] == kInvalid) == expected);
      CHECK(expected || (row[p] >= 0 && row[p] < offsets[5] && token[row[p]] == p / 3));
      invalid += expected;
    }
    CHECK(offsets[5] == tokens * 3 - invalid);
    CHECK(kept[0] + kept[1] == offsets[5]);
  }
}

}  // namespace

int main() {
  int cases = 0;
  unsigned seed = 1;
  const int64_t tokens[] = {1, 2, 31, 32, 33, 255, 256, 257, 700, 1500}, experts[] = {1, 3, 128, 256, 257, 1024};
  for (const int64_t T : tokens) {
    for (const int64_t E : experts) {
      for (const Weights weights : {kRandom, kZeros, kBroken, kTies}) {
        if (T * E > 40000 && weights != static_cast<Weights>((T + E) % 4)) continue;  // the others take long
        Shape shape{T, E, 1, 1, static_cast<int32_t>(seed % 3), seed % 2 == 0, seed % 5 == 0, seed % 7 == 0};
        shape.top_k = int64_t{1} << seed % 4;
        shape.groups = seed % 11 == 0 ? 70 : 1 + seed % 3;
        check(shape, weights, seed % 4 == 0, seed);
        ++seed, ++cases;
      }
    }
  }
  const Shape edges[] = {
      // one block, then several; more blocks than a warp has lanes
      {2047, 16, 1, 2, MODES_BF16, false, false, false}, {2048, 16, 1, 2, MODES_BF16, false, false, false},
      {2049, 16, 1, 2, MODES_BF16, false, false, false}, {8400, 5, 8, 2, MODES_F32, true, false, true},
      // 64 slots; as many groups as are counted in shared memory, and one more
      {33, 60, 64, 2, MODES_F32, true, true, false},     {100, 60, 64, 2, MODES_F32, true, true, false},
      {300, 4, 2, 64, MODES_F16, true, false, false},    {300, 4, 2, 65, MODES_F16, true, false, false}};
  for (const Shape& shape : edges) check(shape, kRandom, false, seed++), ++cases;
  check_invalid();
  std::printf("%d cases agree\n", cases);
}
