// Which pairs are kept, sorted by expert, on the device.
#pragma once

#include "cuda/path.h"
#include "cuda/problem.h"
#include "modes.h"

namespace modes {
namespace gpu {

constexpr int64_t kMostExperts = 1024;

// Bytes of scratch memory for the counts of the blocks, for this many pairs.
int64_t route_scratch_bytes(int64_t pairs, int64_t experts);

// Launches what sets kept[0..G) to zero. Not for null.
Error launch_clear(int64_t* kept, int64_t groups, Stream stream);

// Launches what fills `routed` for the `tokens` tokens from `first_token` on, and adds to args.kept. Rows name tokens
// relative to `first_token`. `scratch` has route_scratch_bytes() bytes, aligned to 4.
Error launch_route(const modes_args& args, int64_t first_token, int64_t tokens, const Routed& routed, void* scratch,
                   Stream stream);

}  // namespace gpu
}  // namespace modes
