// What a call is checked for before anything is read, and how its workspace is laid out.
#pragma once

#include "modes.h"

namespace modes {

// Sizes and enumerators. Passing means that every product of sizes used here fits into int64.
modes_status check_sizes(const modes_args* args, modes_message* message);

// Pointers: present, and aligned to their elements. check_sizes() has passed.
modes_status check_pointers(const modes_args& args, modes_message* message);

// Byte offsets into the workspace.
struct WorkspaceLayout {
  int64_t tokens, capacity;  // tokens and kept pairs that one round works on; capacity is at least k
  size_t offsets, cursor, active_expert, tasks, row_token, row_weight, keep, x, gathered, inner;
  size_t bytes;  // in all
};
WorkspaceLayout workspace_layout(const modes_args& args);

}  // namespace modes
