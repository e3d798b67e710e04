// Compiled with -ffp-contract=off, see common/route.h.
#include "cpu/routing.h"

#include <algorithm>

#include "common/half.h"
#include "common/message.h"
#include "common/route.h"

namespace modes {
namespace {

int64_t expert_id(const modes_args& args, int64_t pair) {
  return args.id_dtype == MODES_I64 ? static_cast<const int64_t*>(args.expert_ids)[pair]
                                    : static_cast<const int32_t*>(args.expert_ids)[pair];
}

}  // namespace

modes_status check_routes(const modes_args& args, modes_message* message) {
  for (int64_t t = 0; t < args.tokens; ++t) {
    if (args.group[t] < 0 || args.group[t] >= args.groups) {
      return fail(message, MODES_BAD_GROUP, "group `%d` of token %lld is not in 0..%lld", args.group[t],
                  static_cast<long long>(t), static_cast<long long>(args.groups - 1));
    }
    for (int64_t j = 0; j < args.top_k; ++j) {
      const int64_t id = expert_id(args, t * args.top_k + j);
      if (id < 0 || id >= args.experts) {
        return fail(message, MODES_BAD_EXPERT_ID, "expert id `%lld` of token %lld, slot %lld is not in 0..%lld",
                    static_cast<long long>(id), static_cast<long long>(t), static_cast<long long>(j),
                    static_cast<long long>(args.experts - 1));
      }
    }
  }
  return MODES_OK;
}

void route_tokens(const modes_args& args, int64_t first_token, int64_t tokens, int64_t capacity, Routing* routing) {
  const int64_t k = args.top_k, end = std::min(args.tokens, first_token + tokens);
  std::fill(routing->offsets, routing->offsets + args.experts + 1, 0);

  // Decide every pair; count the rows of each expert one place up, so that the running sum below gives the offsets.
  int64_t rows = 0, t = first_token;
  for (; t < end && rows + k <= capacity; ++t) {
    const int32_t group = args.group[t];
    const float tau = args.tau[group];
    const auto weight = [&](int64_t j) { return read_element(args.expert_weights, t * k + j, args.activation_dtype); };
    const float sum = args.score ? 0.0f : route_sum(k, weight);
    int64_t kept = 0;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t expert = expert_id(args, t * k + j);
      const int64_t scale = args.score_scale_per_expert ? group * args.experts + expert : group;
      const float score = args.score ? args.score[t * k + j] : route_score(args.score_scale[scale], weight(j), sum);
      const bool keep = route_keep(score, tau);
      routing->keep[(t - first_token) * k + j] = keep;
      routing->offsets[expert + 1] += keep;
      kept += keep;
    }
    rows += kept;
    if (args.kept) args.kept[group] += kept;
  }

  routing->active = 0;
  for (int64_t e = 0; e < args.experts; ++e) {
    if (routing->offsets[e + 1] > 0) routing->active_expert[routing->active++] = e;
    routing->offsets[e + 1] += routing->offsets[e];
    routing->cursor[e] = routing->offsets[e];
  }
  for (int64_t pair = 0; pair < (t - first_token) * k; ++pair) {
    if (!routing->keep[pair]) continue;
    const int64_t at = first_token * k + pair, row = routing->cursor[expert_id(args, at)]++;
    routing->row_token[row] = first_token + pair / k;
    routing->row_weight[row] = read_element(args.expert_weights, at, args.activation_dtype);
  }
  routing->first_token = first_token;
  routing->last_token = t;
  routing->rows = rows;
}

}  // namespace modes
