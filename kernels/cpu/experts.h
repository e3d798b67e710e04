// The expert kernels: what exists once per instruction set, and is chosen once per process.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/routing.h"
#include "modes.h"

namespace modes {

// What tasks work on; all arrays but args' are workspace. A "word" is 32 bits of depth: one float32, or two bfloat16
// (`Hw`, `Iw`: words that hold H and I elements).
//
// The rows of an expert form tiles of nearly equal height, tile t of n being rows [rows * t / n, rows * (t + 1) / n).
// An expert that is "panelled" has its rows packed tile by tile as [words][height]; the others have them as they come.
struct Layer {
  const modes_args* args;
  Routing routing;
  const unsigned char* x;  // [T, H] float32, or bfloat16 where words are pairs
  float* gathered;         // [rows, Hw] words: x of the rows of panelled experts
  float* inner;            // [rows, Iw] words: act(gate, up) of every row
};

// Always inlined: no copy compiled for one instruction set may serve another (common/half.h).
__attribute__((always_inline)) inline bool is_panelled(const modes_args& args, int64_t rows, int64_t few_rows) {
  return args.transposed || rows > few_rows;
}
__attribute__((always_inline)) inline int64_t tile_count(int64_t rows, int64_t tile_rows) {
  return (rows + tile_rows - 1) / tile_rows;
}

struct ExpertKernels {
  const char* isa;
  int64_t word_elements;  // 1 or 2
  int64_t tile_rows;      // most rows of a tile
  int64_t few_rows;       // up to this many rows an expert is not panelled, unless its weights are transposed
  int64_t panel_columns;
  int64_t block;          // words of depth that are packed at a time
  // Row `token` of args.x as float32 into x; not for pairs.
  void (*widen)(const modes_args& args, int64_t token, float* x);
  // Packs tiles [first, last) of a panelled expert.
  void (*gather)(const Layer& layer, int64_t expert, int64_t first, int64_t last);
  // inner of tiles [first_tile, last_tile) and columns [first, last) of 0..I; `first` is a multiple of the vector's lanes.
  // `panel`: scratch of panel_words() of the tiles' rows.
  void (*gate_up)(const Layer& layer, int64_t expert, int64_t first_tile, int64_t last_tile, int64_t first, int64_t last,
                  float* panel);
  // out[t][first..last) of every token of the round. `strip`: scratch [tokens][last - first up to panel_columns],
  // `panel`: of panel_words() of the most rows that an expert has.
  void (*down)(const Layer& layer, int64_t first, int64_t last, float* strip, float* panel);

  bool panelled(const modes_args& args, int64_t rows) const { return is_panelled(args, rows, few_rows); }
  int64_t tiles(int64_t rows) const { return tile_count(rows, tile_rows); }
  int64_t words(int64_t elements) const { return (elements + word_elements - 1) / word_elements; }
  int64_t panel_words(int64_t rows, int64_t depth) const {  // a block of packed weights, and the sums of the rows
    return (std::min(words(depth), block) + rows) * panel_columns;
  }
};

extern const ExpertKernels kPlainKernels;
#if defined(__x86_64__)
extern const ExpertKernels kAvx2Kernels;
extern const ExpertKernels kAvx512Kernels;
extern const ExpertKernels kAvx512Bf16Kernels;  // words are pairs: bfloat16 activations with bfloat16 weights only
#endif

// The widest kernels that this CPU runs for these dtypes, or narrower ones that $MODES_ISA names.
const ExpertKernels& expert_kernels(const modes_args& args);

// MODES_BAD_ARGUMENT when $MODES_ISA names no instruction set, or one that this CPU lacks.
modes_status check_isa(modes_message* message);

}  // namespace modes
