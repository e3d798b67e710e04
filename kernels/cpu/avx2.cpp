#include "cpu/blocks.h"

const modes::ExpertKernels modes::kAvx2Kernels = {
    "avx2", Floats::kElements, kPanelRows, kFewRows, kPanelColumns, kBlock, widen, gather<Floats>, gate_up_floats, down_floats};
