// The expert kernels: what is compiled once per instruction set, and chosen once per process.
#pragma once

#include <cstdint>

#include "cpu/routing.h"
#include "modes.h"

namespace modes {

// What one task works on. All arrays but args' are workspace.
struct Layer {
  const modes_args* args;
  Routing routing;
  const float* x;  // [T, H] float32: args->x itself, or its conversion
  float* inner;    // [rows, I] act(gate, up) of each kept pair
  float* outer;    // [rows, H] the expert's output of each kept pair, not yet weighted
};

struct ExpertKernels {
  const char* isa;
  // Row t of args.x as float32 into x[t].
  void (*widen)(const modes_args& args, int64_t token, float* x);
  // inner[rows of expert][first..last) of 0..I
  void (*gate_up)(const Layer& layer, int64_t expert, int64_t first, int64_t last);
  // outer[rows of expert][first..last) of 0..H
  void (*down)(const Layer& layer, int64_t expert, int64_t first, int64_t last);
  // out[t] = sum over kept slots, in slot order, of weight * outer
  void (*combine)(const Layer& layer, int64_t token);
};

extern const ExpertKernels kBaselineKernels;
#if defined(__x86_64__)
extern const ExpertKernels kAvx2Kernels;
extern const ExpertKernels kAvx512Kernels;
#endif

// The widest of them that this CPU runs.
const ExpertKernels& expert_kernels();

}  // namespace modes
