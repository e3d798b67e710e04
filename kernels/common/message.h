// A failed status together with its sentence.
#pragma once

#include "modes.h"

namespace modes {

// Writes the sentence (printf form) into `message` unless it is null, and returns `status`.
__attribute__((format(printf, 3, 4))) modes_status fail(modes_message* message, modes_status status, const char* format,
                                                        ...);

}  // namespace modes
