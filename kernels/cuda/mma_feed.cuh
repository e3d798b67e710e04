// Stages of a tile's rows and weights in shared memory, copied ahead of the products, over the ends of tiles.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/mma_work.cuh"

namespace modes {
namespace gpu {

// A stage is 64 bytes of depth: [kRows] rows of 64 bytes, then the weights as they lie in memory: [kColumns] columns of
// 64 bytes, or, transposed, [64 / sizeof(T)] depths of kColumns elements. Pieces of 16 bytes are swizzled, so that the
// reads of the products meet no bank conflict.
template <class Element, int kRowsOfTile, int kColumnsOfTile, int kThreadsOfBlock, int kStagesInAll, bool kIsTransposed>
struct Stages {
  using T = Element;
  static constexpr int kRows = kRowsOfTile, kColumns = kColumnsOfTile;
  static constexpr int kThreads = kThreadsOfBlock, kCount = kStagesInAll;
  static constexpr bool kTransposed = kIsTransposed;
  static constexpr int kHalf = kColumns / 2;
  static constexpr int kPiece = 16 / sizeof(T);  // elements
  static constexpr int kDepth = 4 * kPiece;
  static constexpr int kColumnBytes = kColumns * static_cast<int>(sizeof(T));  // of one depth, transposed
  static constexpr int kRowsBytes = kRows * 64;
  static constexpr int kBytes = kRowsBytes + kColumns * 64;
  static constexpr int kTileSlots = 8;  // more than stages, and a power of two
  static constexpr int kSharedBytes = kCount * kBytes + kTileSlots * static_cast<int>(sizeof(Tile));

  // Byte offset of a piece, of a row (or of a column that is not transposed).
  __device__ static __forceinline__ int row_piece(int row, int piece) {
    return row * 64 + ((piece ^ (row >> 1)) & 3) * 16;
  }
  // Byte offset of a piece of the columns, of one depth, transposed.
  __device__ static __forceinline__ int depth_piece(int depth, int piece) {
    return depth * kColumnBytes + (piece ^ (depth & 7)) * 16;
  }
};

// What fills the stages. All threads of the block call it alike.
template <class S>
class Feed {
  using T = typename S::T;
  static constexpr int kRowCopies = S::kRows * 4 / S::kThreads;
  static constexpr int kColumnCopies = S::kColumns * 4 / S::kThreads;
  static constexpr int kRowStride = S::kThreads / 4;               // rows, or columns, from piece to piece
  static constexpr int kDepthPieces = S::kColumnBytes / 16;        // of one depth, transposed
  static constexpr int kDepthStride = S::kThreads / kDepthPieces;  // depths from a thread's piece to its next
  static_assert(kColumnCopies % 2 == 0 && kRowStride % 8 == 0, "halves and swizzles repeat from copy to copy");
  static_assert(kDepthStride * kColumnCopies == S::kDepth, "the copies cover a stage");

 public:
  __device__ __forceinline__ Feed(const Work<T>& work, unsigned char* shared)
      : work_(work), shared_(shared), depth_(work.depth), slot_(0), tiles_(0), live_(true) {}

  // The i-th tile of this block, known since its first stage was begun.
  __device__ __forceinline__ static const Tile& tile(const unsigned char* shared, int i) {
    return reinterpret_cast<const Tile*>(shared + S::kCount * S::kBytes)[i % S::kTileSlots];
  }

  // Begins to fill the next stage; after the last tile there is nothing in it. One group of copies in either case.
  __device__ __forceinline__ void fill() {
    if (live_ && depth_ >= work_.depth) begin_tile();
    if (live_) copy(shared_ + slot_ * S::kBytes);
    copy_commit();
    depth_ += S::kDepth;
    slot_ = slot_ + 1 == S::kCount ? 0 : slot_ + 1;
  }

 private:
  __device__ __forceinline__ void begin_tile() {
    const Tile tile = walk_.template next<S::kRows>(work_);
    if (threadIdx.x == 0) reinterpret_cast<Tile*>(shared_ + S::kCount * S::kBytes)[tiles_ % S::kTileSlots] = tile;
    ++tiles_;
    live_ = tile.expert >= 0;
    if (!live_) return;
    depth_ = 0;
    valid_ = 0;
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kRowCopies; ++i) {
      const int local = thread / 4 + i * kRowStride;
      int64_t row = tile.row;
      if (local < tile.rows) {
        row += local;
        valid_ |= 1u << i;
      }
      if (work_.row_token) row = work_.row_token[row];
      row_[i] = work_.rows + row * work_.depth + thread % 4 * S::kPiece;
    }
    const T* weights = work_.weights + static_cast<int64_t>(tile.expert) * work_.width * work_.depth;
    const int32_t first = tile.column_tile * work_.tile_step;
    if (S::kTransposed) {
      const int local = thread % kDepthPieces * S::kPiece;
      const bool is_second = local >= S::kHalf;
      const int64_t column = static_cast<int64_t>(first) + (is_second ? local - S::kHalf + work_.second : local);
      if (column < (is_second ? work_.width : work_.first_limit)) valid_ |= 1u << kRowCopies;
      column_ = weights + static_cast<int64_t>(thread / kDepthPieces) * work_.width + column;
    } else {
#pragma unroll
      for (int i = 0; i < kColumnCopies; ++i) {
        const bool is_second = i >= kColumnCopies / 2;
        const int local = thread / 4 + i % (kColumnCopies / 2) * kRowStride;
        const int64_t column = static_cast<int64_t>(first) + (is_second ? work_.second : 0) + local * work_.spread;
        if (column < (is_second ? work_.width : work_.first_limit)) valid_ |= 1u << (kRowCopies + i);
      }
      const int64_t column = static_cast<int64_t>(first) + thread / 4 * work_.spread;
      column_ = weights + column * work_.depth + thread % 4 * S::kPiece;
    }
  }

  // What lies beyond the expert's rows, the columns or the depth becomes zero.
  __device__ __forceinline__ void copy(unsigned char* stage) {
    const int thread = static_cast<int>(threadIdx.x);
    const bool inside = depth_ + thread % 4 * S::kPiece < work_.depth;
    const uint32_t valid = inside ? valid_ : 0;
    unsigned char* to = stage + S::row_piece(thread / 4, thread % 4);
#pragma unroll
    for (int i = 0; i < kRowCopies; ++i) {
      copy_async(to + i * kRowStride * 64, row_[i], valid >> i & 1 ? 16 : 0);
      row_[i] += S::kDepth;
    }
    if (S::kTransposed) {
      const int depth = thread / kDepthPieces;
#pragma unroll
      for (int i = 0; i < kColumnCopies; ++i) {
        const int local = depth + i * kDepthStride;
        const bool is_valid = (valid_ >> kRowCopies & 1) && depth_ + local < work_.depth;
        copy_async(stage + S::kRowsBytes + S::depth_piece(local, thread % kDepthPieces),
                   column_ + static_cast<int64_t>(i * kDepthStride) * work_.width, is_valid ? 16 : 0);
      }
      column_ += static_cast<int64_t>(S::kDepth) * work_.width;
    } else {
      to += S::kRowsBytes;
#pragma unroll
      for (int i = 0; i < kColumnCopies; ++i) {
        const int64_t columns = static_cast<int64_t>(i % (kColumnCopies / 2)) * kRowStride * work_.spread +
                                (i >= kColumnCopies / 2 ? work_.second : 0);
        copy_async(to + i * kRowStride * 64, column_ + columns * work_.depth, valid >> (kRowCopies + i) & 1 ? 16 : 0);
      }
      column_ += S::kDepth;
    }
  }

  const Work<T>& work_;
  unsigned char* shared_;
  Walk walk_;
  const T* row_[kRowCopies];
  const T* column_;
  uint32_t valid_;
  int32_t depth_;  // of the tile, up to which its stages are begun
  int32_t slot_, tiles_;
  bool live_;
};

}  // namespace gpu
}  // namespace modes
