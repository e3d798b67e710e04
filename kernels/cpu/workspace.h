// How the workspace of a call is laid out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "modes.h"

namespace modes {

// Byte offsets into the workspace.
struct WorkspaceLayout {
  int64_t tokens, capacity;  // tokens and kept pairs that one round works on; capacity is at least k
  size_t offsets, cursor, active_expert, tasks, row_token, row_weight, keep, x, gathered, inner;
  size_t bytes;  // in all
};
WorkspaceLayout workspace_layout(const modes_args& args);

}  // namespace modes
