#pragma once

#include "emulator/hopper.h"

namespace modes {
namespace gpu {
namespace emulated {

void barrier_bytes(Barrier* barrier, int bytes);   // of a tensor load, arrived
void barrier_ready_for_load(Barrier* barrier);     // or an abort

}  // namespace emulated
}  // namespace gpu
}  // namespace modes
