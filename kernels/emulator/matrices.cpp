// ldmatrix and mma.sync, as the PTX ISA draws their fragments.
#include <cstring>
#include <vector>

#include "emulator/arena.h"
#include "emulator/block.h"
#include "emulator/matrices.h"

namespace modes {
namespace gpu {
namespace emulated {
namespace {

Thread& thread_of(const Warp& warp, int lane) { return *block.thread[static_cast<size_t>(warp.first + lane)]; }

uint16_t element(const unsigned char* row, int i) {
  uint16_t v;
  std::memcpy(&v, row + 2 * i, sizeof v);
  return v;
}

void check_whole(const char* name, uint32_t here) {
  if (here != kFullMask) fail("%s: only the threads 0x%08x of the warp are there", name, here);
}

void load(const char* name, uint32_t (&to)[4], const void* row, void (*act)(Warp&, uint32_t)) {
  check_aligned(row, 16, name);
  if (in_dynamic_shared(row)) {
    arena_offset(row, 16, name);
  } else if (!in_static_shared(row)) {
    fail("%s: %p is not shared memory", name, row);
  }
  meet(name, kFullMask, row, to, act);
}

struct Fragments {
  const uint32_t *a, *b;
  float* d;
};

template <class T>
void multiply_warp(Warp& warp, uint32_t here) {
  check_whole("multiply", here);
  float a[16][16], b[16][8];  // [rows, k], [k, columns]
  const auto put = [](float* to, int step, uint32_t pair) {
    to[0] = widen<T>(static_cast<uint16_t>(pair));
    to[step] = widen<T>(static_cast<uint16_t>(pair >> 16));
  };
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments& f = *static_cast<const Fragments*>(thread_of(warp, lane).input);
    const int g = lane / 4, c = lane % 4;
    put(&a[g][2 * c], 1, f.a[0]);
    put(&a[g + 8][2 * c], 1, f.a[1]);
    put(&a[g][2 * c + 8], 1, f.a[2]);
    put(&a[g + 8][2 * c + 8], 1, f.a[3]);
    put(&b[2 * c][g], 8, f.b[0]);
    put(&b[2 * c + 8][g], 8, f.b[1]);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = static_cast<const Fragments*>(thread_of(warp, lane).input)->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      float sum = d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      d[i] = sum;
    }
  }
}

}  // namespace

const float* half_values() {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (size_t i = 0; i < all.size(); ++i) all[i] = to_float(f16{static_cast<uint16_t>(i)});
    return all;
  }();
  return values.data();
}

}  // namespace emulated

using emulated::kWarp;

void load_matrices(uint32_t (&to)[4], const void* row) {
  emulated::load("load_matrices", to, row, [](emulated::Warp& warp, uint32_t here) {
    emulated::check_whole("load_matrices", here);
    for (int lane = 0; lane < kWarp; ++lane) {
      uint32_t* to = static_cast<uint32_t*>(emulated::thread_of(warp, lane).output);
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto* row = static_cast<const unsigned char*>(emulated::thread_of(warp, matrix * 8 + lane / 4).input);
        const int column = 2 * (lane % 4);
        to[matrix] = static_cast<uint32_t>(emulated::element(row, column)) |
                     static_cast<uint32_t>(emulated::element(row, column + 1)) << 16;
      }
    }
  });
}

void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  emulated::load("load_matrices_transposed", to, row, [](emulated::Warp& warp, uint32_t here) {
    emulated::check_whole("load_matrices_transposed", here);
    for (int lane = 0; lane < kWarp; ++lane) {
      uint32_t* to = static_cast<uint32_t*>(emulated::thread_of(warp, lane).output);
      for (int matrix = 0; matrix < 4; ++matrix) {
        const int first = matrix * 8 + 2 * (lane % 4);
        const auto* low = static_cast<const unsigned char*>(emulated::thread_of(warp, first).input);
        const auto* high = static_cast<const unsigned char*>(emulated::thread_of(warp, first + 1).input);
        to[matrix] = static_cast<uint32_t>(emulated::element(low, lane / 4)) |
                     static_cast<uint32_t>(emulated::element(high, lane / 4)) << 16;
      }
    }
  });
}

template <>
void multiply<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulated::Fragments fragments{a, b, d};
  emulated::meet("multiply<bf16>", kFullMask, &fragments, nullptr, emulated::multiply_warp<bf16>);
}
template <>
void multiply<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulated::Fragments fragments{a, b, d};
  emulated::meet("multiply<f16>", kFullMask, &fragments, nullptr, emulated::multiply_warp<f16>);
}

}  // namespace gpu
}  // namespace modes
