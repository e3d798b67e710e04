// The ways of computing the experts of a layer on a GPU, and what they are chosen by. One file each; path.cpp lists them.
#pragma once

#include "cuda/problem.h"
#include "cuda/runtime.h"

namespace modes {
namespace gpu {

// What is known of the device when a path is chosen and a grid is sized.
struct Device {
  int id;
  int major, minor;  // compute capability
  int processors;    // streaming multiprocessors
  int shared_bytes;  // most dynamic shared memory of a block
};

// A path launches, on `stream`, what fills `inner` and `outputs` of every kept row. It does not synchronise, allocate, or
// read anything of the device; its grids depend on sizes and device only, so that the launches can be captured in a graph.
struct Path {
  const char* name;  // as $MODES_CUDA_PATH names it
  // Whether it computes this problem on this device: dtypes, layout, sizes, alignment of the pointers.
  bool (*fits)(const Problem& problem, const Device& device);
  Error (*launch)(const Problem& problem, const Device& device, Stream stream);
};

extern const Path kDecodePath;  // "decode": few tokens, bound by reading weights
extern const Path kHopperPath;  // "hopper": sm_90a, many tokens
extern const Path kMmaPath;     // "mma": tensor cores of sm_80 and newer
extern const Path kFloatPath;   // "float": float32 throughout
extern const Path kPlainPath;   // "plain": anything, one multiply-add at a time

// The first of these that fits, or the one that $MODES_CUDA_PATH names: MODES_BAD_ARGUMENT when that one does not fit.
modes_status choose_path(const Problem& problem, const Device& device, const Path** path, modes_message* message);

}  // namespace gpu
}  // namespace modes
