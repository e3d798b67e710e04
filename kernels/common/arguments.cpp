#include "common/arguments.h"

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "common/half.h"
#include "common/message.h"

namespace modes {
namespace {

bool fits(std::initializer_list<int64_t> sizes) {
  int64_t product = 16;  // room for element sizes and sums of a few
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product)) return false;
  }
  return true;
}

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace

modes_status fail(modes_message* message, modes_status status, const char* format, ...) {
  if (message) {
    va_list values;
    va_start(values, format);
    std::vsnprintf(message->text, sizeof message->text, format, values);
    va_end(values);
  }
  return status;
}

modes_status check_sizes(const modes_args* args, modes_message* message) {
  if (!args) return fail(message, MODES_BAD_ARGUMENT, "args is null");
  if (args->struct_size != sizeof(modes_args)) {
    return fail(message, MODES_BAD_ARGUMENT, "modes_args has %llu bytes, this library (%s) expects %zu",
                static_cast<unsigned long long>(args->struct_size), modes_version(), sizeof(modes_args));
  }
  const struct {
    const char* name;
    int64_t value, least;
  } sizes[] = {{"tokens", args->tokens, 0},   {"hidden", args->hidden, 1}, {"intermediate", args->intermediate, 1},
               {"experts", args->experts, 1}, {"top_k", args->top_k, 1},   {"groups", args->groups, 1}};
  for (const auto& size : sizes) {
    if (size.value < size.least) {
      return fail(message, MODES_BAD_SHAPE, "%s is `%lld`, must be at least %lld", size.name,
                  static_cast<long long>(size.value), static_cast<long long>(size.least));
    }
  }
  // Rows of a round are counted in int32, and a round holds at least one token's.
  if (args->top_k > INT32_MAX || args->groups > INT32_MAX || !fits({args->tokens, args->hidden}) ||
      !fits({args->tokens, args->top_k}) || !fits({args->groups, args->experts}) ||
      !fits({args->experts, args->intermediate, args->hidden}) ||
      !fits({std::max(args->top_k, kFewestRows), args->intermediate}) ||
      !fits({std::max(args->top_k, kFewestRows), args->hidden})) {
    return fail(message, MODES_BAD_SHAPE, "the sizes are too large");
  }
  const struct {
    const char* name;
    int32_t value, count;
  } choices[] = {{"activation_dtype", args->activation_dtype, 3},
                 {"weight_dtype", args->weight_dtype, 5},
                 {"id_dtype", args->id_dtype, 2},
                 {"activation", args->activation, 3},
                 {"transposed", args->transposed, 2},
                 {"interleaved", args->interleaved, 2},
                 {"score_scale_per_expert", args->score_scale_per_expert, 2}};
  for (const auto& choice : choices) {
    if (choice.value < 0 || choice.value >= choice.count) {
      return fail(message, MODES_BAD_ARGUMENT, "%s is `%d`, must be 0..%d", choice.name, choice.value, choice.count - 1);
    }
  }
  if (args->activation == MODES_SWIGLU_OAI && !(args->limit >= 0.0f)) {
    return fail(message, MODES_BAD_ARGUMENT, "limit is `%g`, must not be negative", static_cast<double>(args->limit));
  }
  if (is_quantised(args->weight_dtype)) {
    if (args->transposed) return fail(message, MODES_BAD_ARGUMENT, "quantised weights cannot be transposed");
    // Blocks of a row are counted with sums that must not overflow.
    if (args->block <= 0 || args->block % kQuantisedGroup != 0 || args->block > INT32_MAX) {
      return fail(message, MODES_BAD_ARGUMENT, "block is `%lld`, must be a multiple of %d below 2^31",
                  static_cast<long long>(args->block), kQuantisedGroup);
    }
    const int64_t most = kQuantisedGroup - 1;  // that a row is filled up by
    if (!fits({args->experts, args->intermediate + most, args->hidden + most})) {
      return fail(message, MODES_BAD_SHAPE, "the sizes are too large");
    }
  }
  return MODES_OK;
}

modes_status check_pointers(const modes_args& args, modes_message* message) {
  const bool some = args.tokens > 0, scaled = is_quantised(args.weight_dtype);
  const int64_t element = dtype_size(args.activation_dtype), id = args.id_dtype == MODES_I64 ? 8 : 4;
  const struct {
    const char* name;
    const void* pointer;
    bool required;
    int64_t alignment;
  } pointers[] = {{"x", args.x, some, element},
                  {"expert_ids", args.expert_ids, some, id},
                  {"expert_weights", args.expert_weights, some, element},
                  {"group", args.group, some, 4},
                  {"tau", args.tau, true, 4},
                  {"score_scale", args.score_scale, true, 4},
                  {"score", args.score, false, 4},
                  {"gate_up", args.gate_up, true, 1},
                  {"down", args.down, true, 1},
                  {"gate_up_scales", args.gate_up_scales, scaled, 1},
                  {"down_scales", args.down_scales, scaled, 1},
                  {"out", args.out, some, element},
                  {"kept", args.kept, false, 8}};
  for (const auto& p : pointers) {
    if (p.required && !p.pointer) return fail(message, MODES_BAD_ARGUMENT, "%s is null", p.name);
    if (!aligned(p.pointer, p.alignment)) {
      return fail(message, MODES_BAD_ARGUMENT, "%s is not aligned to %d bytes", p.name, static_cast<int>(p.alignment));
    }
  }
  return MODES_OK;
}

}  // namespace modes
