// The tensor memory accelerator's loads: boxes of 2-D and 3-D tensors into shared memory.
#include <cstring>
#include <vector>

#include "emulator/arena.h"
#include "emulator/barriers.h"
#include "emulator/block.h"
#include "modes.h"

namespace modes {
namespace gpu {
namespace emulated {
namespace {

// Rows of a box that have not arrived.
struct Piece {
  TensorMap map;
  uint32_t offset;  // of the box
  int32_t at[3];
  uint32_t begin, end;  // rows: box[1] * box[2] of them, of box[0] elements
  Barrier* barrier;
};
std::vector<Piece> pieces;

uint32_t row_bytes(const TensorMap& map) { return map.box[0] * static_cast<uint32_t>(map.element_bytes); }

void arrive(const Piece& piece) {
  const TensorMap& map = piece.map;
  const uint32_t bytes = row_bytes(map);
  for (uint32_t row = piece.begin; row < piece.end; ++row) {
    const int64_t c1 = piece.at[1] + static_cast<int64_t>(row % map.box[1]);
    const int64_t c2 = piece.at[2] + static_cast<int64_t>(row / map.box[1]);
    const bool inside = c1 >= 0 && static_cast<uint64_t>(c1) < map.sizes[1] &&  //
                        c2 >= 0 && static_cast<uint64_t>(c2) < map.sizes[2];
    for (uint32_t column = 0; column < bytes; column += 16) {
      unsigned char data[16] = {};
      for (uint32_t i = 0; inside && i < 16; i += static_cast<uint32_t>(map.element_bytes)) {
        const int64_t c0 = piece.at[0] + static_cast<int64_t>((column + i) / static_cast<uint32_t>(map.element_bytes));
        if (c0 < 0 || static_cast<uint64_t>(c0) >= map.sizes[0]) continue;
        std::memcpy(data + i,
                    map.base + static_cast<uint64_t>(c2) * map.strides[2] + static_cast<uint64_t>(c1) * map.strides[1] +
                        static_cast<uint64_t>(c0) * map.strides[0],
                    static_cast<size_t>(map.element_bytes));
      }
      uint32_t to = piece.offset + row * bytes + column;
      if (map.swizzled) to ^= ((to + kArenaAddress) >> 7 & 7) << 4;
      land(to, data, 16, kNobody);
    }
  }
  barrier_bytes(piece.barrier, static_cast<int>((piece.end - piece.begin) * bytes));
}

void load(void* shared, const TensorMap& map, Barrier* barrier, int rank, int c0, int c1, int c2) {
  require(9, "tensor_load");
  watch_writes();
  note_writes(block.current->id);
  if (map.rank != rank) fail("tensor_load: %d coordinates for a tensor of rank %d", rank, map.rank);
  barrier_ready_for_load(barrier);
  check_aligned(shared, 128, "tensor_load");
  const uint32_t rows = map.box[1] * map.box[2];
  const uint32_t offset = arena_offset(shared, rows * row_bytes(map), "tensor_load");
  if (map.swizzled && offset % 1024) {
    fail("tensor_load: a swizzled box goes to byte %u of dynamic shared memory, expected a multiple of 1024", offset);
  }
  begin_flight(offset, rows * row_bytes(map), false, "tensor_load");
  for (uint32_t begin = 0; begin < rows;) {
    const uint32_t end = begin + 1 + block.random.below(rows - begin);
    pieces.push_back({map, offset, {c0, c1, c2}, begin, end, barrier});
    begin = end;
  }
  checkpoint();
}

}  // namespace

bool piece_arrives() {
  if (pieces.empty()) return false;
  const size_t i = block.random.below(static_cast<uint32_t>(pieces.size()));
  const Piece piece = pieces[i];
  pieces[i] = pieces.back();
  pieces.pop_back();
  arrive(piece);
  return true;
}

void begin_loads() { pieces.clear(); }
void end_loads() {
  if (pieces.empty()) return;
  fail("the block is over, a tensor load to byte %u of its shared memory is not", pieces[0].offset);
}

}  // namespace emulated

void tensor_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1) {
  emulated::load(shared, map, barrier, 2, c0, c1, 0);
}
void tensor_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1, int c2) {
  emulated::load(shared, map, barrier, 3, c0, c1, c2);
}

void fence_async_proxy() {
  emulated::fence(*emulated::block.current);
  emulated::checkpoint();
}

// What the driver's encoder asks for, and whole 128-byte rows where they are swizzled.
Error make_tensor_map(TensorMap* map, const void* base, int32_t dtype, int rank, const uint64_t* sizes,
                      const uint64_t* strides, const uint32_t* box, Swizzle swizzle) {
  const bool known = dtype == MODES_F32 || dtype == MODES_F16 || dtype == MODES_BF16;
  if (!known || rank < 2 || rank > 3 || reinterpret_cast<uintptr_t>(base) % 16) return kInvalidValue;
  const int element_bytes = dtype == MODES_F32 ? 4 : 2;
  const bool swizzled = swizzle == Swizzle::k128Bytes;
  *map = {static_cast<const unsigned char*>(base), rank, element_bytes, swizzled, {1, 1, 1}, {}, {1, 1, 1}};
  map->strides[0] = static_cast<uint64_t>(map->element_bytes);
  for (int i = 0; i < rank; ++i) {
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
    if (i) map->strides[i] = strides[i - 1];
    if (sizes[i] < 1 || sizes[i] > uint64_t{1} << 32 || box[i] < 1 || box[i] > 256) return kInvalidValue;
    if (i && (strides[i - 1] % 16 || strides[i - 1] >= uint64_t{1} << 40)) return kInvalidValue;
  }
  const uint32_t bytes = emulated::row_bytes(*map);
  return bytes % 16 || (map->swizzled && bytes != 128) ? kInvalidValue : kSuccess;
}

}  // namespace gpu
}  // namespace modes
