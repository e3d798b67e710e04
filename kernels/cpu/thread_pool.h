// Threads for callers that bring none.
#pragma once

#include "modes.h"

namespace modes {

// Runs the tasks on up to `threads` threads, the calling one among them; each thread takes the next task when it is
// done with one. When the pool serves another call, the calling thread does all of it: two calls never wait for each
// other.
void pool_run(int32_t threads, size_t tasks, modes_task task, void* state);

}  // namespace modes
