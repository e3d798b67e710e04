#include "cpu/blocks.h"

const modes::ExpertKernels modes::kPlainKernels = {
    "baseline", Floats::kElements, kPanelRows, kFewRows, kPanelColumns, kBlock, widen, gather<Floats>, gate_up_floats, down_floats};
