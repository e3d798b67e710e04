#include "cpu/blocks.h"

const modes::ExpertKernels modes::kAvx512Bf16Kernels = {
    "avx512_bf16",  Pairs::kElements, kPanelRows,
    kFewRows,       kPanelColumns,    kBlock,
    widen,          gather<Pairs>,    gate_up<Pairs, MODES_BF16>,
    down<Pairs, MODES_BF16>};
