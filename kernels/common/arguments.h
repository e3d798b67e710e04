// What a call is checked for before anything is read.
#pragma once

#include <cstdint>

#include "modes.h"

namespace modes {

// The fewest rows worth a round: the sizes are checked to leave room for that many.
constexpr int64_t kFewestRows = 1024;

// Sizes and enumerators. Passing means that every product of sizes used here fits into int64.
modes_status check_sizes(const modes_args* args, modes_message* message);

// Pointers: present, and aligned to their elements. check_sizes() has passed.
modes_status check_pointers(const modes_args& args, modes_message* message);

}  // namespace modes
