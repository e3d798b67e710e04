// wgmma: products of warpgroups whose operands are in shared memory.
//
// A warp's part of a product happens at any moment from when the warp began it until it waits for it, in the order it
// began them; other warps' parts at other moments. Accumulators come back when they are waited for, poison until then.
#include <algorithm>
#include <cstring>

#include "emulator/arena.h"
#include "emulator/block.h"
#include "emulator/hopper.h"
#include "emulator/matrices.h"

namespace modes {
namespace gpu {
namespace emulated {

void begin_loads();
void end_loads();

namespace {

constexpr int kRows = 16, kDepth = 16;  // of a warp; of a product, along k
constexpr uint32_t kPoison = 0x7fc0dead;  // a NaN

struct Operands {
  Product product;
  float* d;
};

Thread& thread_of(const Warp& warp, int lane) { return *block.thread[static_cast<size_t>(warp.first + lane)]; }

void check_whole(const char* name, uint32_t here) {
  if (here != kFullMask) fail("%s: only the threads 0x%08x of the warp are there", name, here);
}

// Where 16 bytes of an operand are: of row `row`, columns 8 * `part` on. The descriptor's fields count in 16 bytes.
uint32_t address_of(uint64_t descriptor, int row, int part) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t r = static_cast<uint32_t>(row), p = static_cast<uint32_t>(part);
  const uint32_t mode = static_cast<uint32_t>(descriptor >> 62);
  // No swizzle: matrices of 8 rows of 16 bytes, `leading` apart along k and `stride` along the rows.
  if (mode == 0) return start + r / 8 * stride + p * leading + r % 8 * 16;
  // 128, 64 or 32 bytes a row, 8 rows to a pattern, patterns `stride` apart; address bits 4.. are xor-ed with bits 7...
  const uint32_t width = 256u >> mode;
  const uint32_t address = start + r / 8 * stride + r % 8 * width + p * 16;
  return address ^ ((address >> 7 & (width / 16 - 1)) << 4);
}

void check_descriptor(uint64_t descriptor, const char* name) {
  constexpr uint64_t kUnused = uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{7} << 46 | uint64_t{0x3ff} << 52;
  if (descriptor & kUnused) {
    fail("product: unused bits are set in the descriptor 0x%016llx of %s", static_cast<unsigned long long>(descriptor),
         name);
  }
  if (descriptor >> 49 & 7) fail("product: a base offset in the descriptor of %s is not emulated", name);
  const uint32_t mode = static_cast<uint32_t>(descriptor >> 62);
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4, pattern = mode ? 8 * (256u >> mode) : 16;
  if (mode && start % pattern >= 256u >> mode) {
    fail("product: the tile of %s starts at byte %u of shared memory, not in the first row of a pattern of %u bytes",
         name, start, pattern);
  }
}

// Rows `first`... of an operand to `values` [depth, rows], seen as the asynchronous proxy does.
template <class T>
void read(uint64_t descriptor, int first, int rows, float* values, const char* what) {
  for (int row = 0; row < rows; ++row) {
    for (int part = 0; part < 2; ++part) {
      const uint32_t address = address_of(descriptor, first + row, part);
      const unsigned char* at = arena_at(address, 16, what);
      check_visible(address - kArenaAddress, 16, what);
      for (int i = 0; values && i < 8; ++i) {
        uint16_t bits;
        std::memcpy(&bits, at + 2 * i, sizeof bits);
        values[(8 * part + i) * rows + row] = widen<T>(bits);
      }
    }
  }
}

int rank_in_group(const Warp& warp) { return warp.first / kWarp % kWarpgroup; }

template <class T>
void compute(Warp& warp, const Product& product) {
  float a[kDepth * kRows], b[kDepth * 256];
  read<T>(product.a, rank_in_group(warp) * kRows, kRows, a, "a product's a");
  read<T>(product.b, 0, product.columns, b, "a product's b");
  float* values = warp.accumulators[static_cast<size_t>(product.accumulators)].values.data();
  for (int row = 0; row < kRows; ++row) {
    float* const sums = values + row * product.columns;
    if (!product.accumulate) std::fill(sums, sums + product.columns, 0.0f);
    for (int k = 0; k < kDepth; ++k) {
      const float factor = a[k * kRows + row];
      for (int n = 0; n < product.columns; ++n) sums[n] += factor * b[k * product.columns + n];
    }
  }
}

void happen(Warp& warp) {
  const Product& product = warp.products[warp.done++];
  product.half ? compute<f16>(warp, product) : compute<bf16>(warp, product);
}

// Calls each(lane, index of the register, its place in [16, columns]).
template <class Each>
void for_registers(int columns, Each each) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < columns / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      each(lane, i, row * columns + column);
    }
  }
}

// The registers of a product: those that are under way already, or new ones, that product_begin() must come before.
int take_registers(Warp& warp, int columns) {
  float* const first = static_cast<const Operands*>(thread_of(warp, 0).input)->d;
  int free = -1;
  for (size_t i = 0; i < warp.accumulators.size(); ++i) {
    const Accumulators& one = warp.accumulators[i];
    if (one.free) free = static_cast<int>(i);
    if (!one.free && one.registers[0] == first && one.columns == columns) return static_cast<int>(i);
  }
  if (!warp.fenced) fail("product: no product_begin() since its accumulators were last free to be changed");
  if (free < 0) {
    free = static_cast<int>(warp.accumulators.size());
    warp.accumulators.emplace_back();
  }
  Accumulators& taken = warp.accumulators[static_cast<size_t>(free)];
  taken.free = false;
  taken.columns = columns;
  taken.values.resize(static_cast<size_t>(kRows * columns));
  for (int lane = 0; lane < kWarp; ++lane) {
    taken.registers[lane] = static_cast<const Operands*>(thread_of(warp, lane).input)->d;
  }
  for_registers(columns, [&](int lane, int i, int place) {
    taken.values[static_cast<size_t>(place)] = taken.registers[lane][i];
    std::memcpy(&taken.registers[lane][i], &kPoison, sizeof kPoison);
  });
  return free;
}

void give_back(Accumulators& taken) {
  for_registers(taken.columns, [&](int lane, int i, int place) {
    uint32_t bits;
    std::memcpy(&bits, &taken.registers[lane][i], sizeof bits);
    if (bits != kPoison) fail("accumulator %d of lane %d was written while a product was under way", i, lane);
    taken.registers[lane][i] = taken.values[static_cast<size_t>(place)];
  });
  taken.free = true;
}

bool same(const Product& p, const Product& q) {
  return p.half == q.half && p.columns == q.columns && p.a == q.a && p.b == q.b && p.accumulate == q.accumulate;
}

// The four warps of a warpgroup begin the same products in the same order.
void check_group(const Warp& warp) {
  const size_t me = static_cast<size_t>(warp.first / kWarp), base = me / kWarpgroup * kWarpgroup;
  const size_t last = warp.begun.size() - 1;
  if (base + kWarpgroup > block.warp.size()) fail("product: the block has no whole warpgroup here");
  for (size_t i = base; i < base + kWarpgroup; ++i) {
    const std::vector<Product>& other = block.warp[i].begun;
    if (other.size() > last && !same(other[last], warp.begun[last])) {
      fail("product: warps %zu and %zu of a warpgroup begin different products (or with different descriptors)", me, i);
    }
  }
}

void begin(Warp& warp, uint32_t here) {
  check_whole("product", here);
  Product product = static_cast<const Operands*>(thread_of(warp, 0).input)->product;
  for (int lane = 1; lane < kWarp; ++lane) {
    if (!same(product, static_cast<const Operands*>(thread_of(warp, lane).input)->product)) {
      fail("product: lanes 0 and %d give different operands", lane);
    }
  }
  warp.begun.push_back(product);
  check_group(warp);
  check_descriptor(product.a, "a");
  check_descriptor(product.b, "b");
  read<bf16>(product.a, rank_in_group(warp) * kRows, kRows, nullptr, "a product's a");
  read<bf16>(product.b, 0, product.columns, nullptr, "a product's b");
  product.accumulators = take_registers(warp, product.columns);
  warp.accumulators[static_cast<size_t>(product.accumulators)].group = warp.group;
  warp.products.push_back(product);
  warp.product_groups.push_back(warp.group);
}

void finish_groups(Warp& warp, int end) {
  size_t count = 0;
  while (count < warp.products.size() && warp.product_groups[count] < end) ++count;
  while (warp.done < count) happen(warp);
  warp.products.erase(warp.products.begin(), warp.products.begin() + static_cast<int64_t>(count));
  auto& groups = warp.product_groups;
  groups.erase(groups.begin(), groups.begin() + static_cast<int64_t>(count));
  warp.done -= count;
  for (Accumulators& taken : warp.accumulators) {
    if (taken.free || taken.group >= end) continue;
    give_back(taken);
    warp.fenced = false;
  }
}

}  // namespace

bool product_happens() {
  const size_t count = block.warp.size(), first = block.random.below(static_cast<uint32_t>(count));
  for (size_t i = 0; i < count; ++i) {
    Warp& warp = block.warp[(first + i) % count];
    if (warp.done == warp.products.size()) continue;
    happen(warp);
    return true;
  }
  return false;
}

void begin_work() {
  block.flying = 0;
  begin_loads();
}

void end_work() {
  end_loads();
  for (size_t w = 0; w < block.warp.size(); ++w) {
    const Warp& warp = block.warp[w];
    if (!warp.products.empty()) fail("the block is over, warp %zu has products it did not wait for", w);
    const Warp& other = block.warp[w / kWarpgroup * kWarpgroup];
    if (warp.begun.size() != other.begun.size()) {
      fail("warps %zu and %zu of a warpgroup began %zu and %zu products", w / kWarpgroup * kWarpgroup, w,
           other.begun.size(), warp.begun.size());
    }
  }
}

void product(bool half, int columns, float* d, uint64_t a, uint64_t b, bool accumulate) {
  watch_writes();
  note_writes(block.current->id);
  const Operands operands{{half, columns, a, b, accumulate, -1}, d};
  meet("product", kFullMask, &operands, nullptr, begin);
}

void product_wait(int groups) {
  // In the threads' `input`: how many groups may stay.
  meet("product_wait", kFullMask, &groups, nullptr, [](Warp& warp, uint32_t here) {
    check_whole("product_wait", here);
    finish_groups(warp, warp.group - *static_cast<const int*>(thread_of(warp, 0).input));
  });
}

void set_registers(const char* name, int registers) {
  if (registers < 24 || registers > 256 || registers % 8) {
    fail("%s: `%d`, expected a multiple of 8 in 24..256", name, registers);
  }
  meet(name, kFullMask, nullptr, nullptr, nullptr);
}

}  // namespace emulated

void product_begin() {
  int major = 0, minor = 0, processors, shared_bytes;
  if (read_device(0, &major, &minor, &processors, &shared_bytes) || major != 9) {
    emulated::fail("products of warpgroups are of compute capability 9.0, this is %d.%d", major, minor);
  }
  emulated::meet("product_begin", kFullMask, nullptr, nullptr, [](emulated::Warp& warp, uint32_t here) {
    emulated::check_whole("product_begin", here);
    warp.fenced = true;
  });
}

void product_commit() {
  emulated::meet("product_commit", kFullMask, nullptr, nullptr, [](emulated::Warp& warp, uint32_t here) {
    emulated::check_whole("product_commit", here);
    ++warp.group;
  });
}

}  // namespace gpu
}  // namespace modes
