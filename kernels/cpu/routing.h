// Kept pairs of a range of tokens, sorted by expert.
#pragma once

#include <cstdint>

#include "modes.h"

namespace modes {

// A kept pair is a "row": row r belongs to expert e when offsets[e] <= r < offsets[e + 1]; rows of one expert are in
// token order. All memory belongs to the workspace.
struct Routing {
  int64_t first_token, last_token;  // tokens first <= t < last
  int64_t rows;
  int64_t active;          // experts with at least one row
  int64_t* offsets;        // [E + 1]
  int64_t* cursor;         // [E]
  int64_t* active_expert;  // [E], the first `active` are used
  int64_t* row_token;      // [rows]
  float* row_weight;       // [rows]: what the expert's output is multiplied with
  unsigned char* keep;     // [(last - first) * k]
};

// The first expert id or group that is out of range, as a status with a message; MODES_OK when there is none.
modes_status check_routes(const modes_args& args, modes_message* message);

// Routes up to `tokens` tokens from `first_token` on, as many as keep no more than `capacity` pairs (at least one token;
// capacity is at least k). Adds to args.kept. check_routes() has passed.
void route_tokens(const modes_args& args, int64_t first_token, int64_t tokens, int64_t capacity, Routing* routing);

}  // namespace modes
