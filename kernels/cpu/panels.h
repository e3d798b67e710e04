// Packing: weights as [depth][2 vectors of columns] and rows as [depth][rows], the two operands of panel_tile; and
// direct_tile, which reads weights that are stored by depth (transposed) without packing them.
#pragma once

#include "cpu/quantised.h"
#include "cpu/tiles.h"

namespace {

// The columns of one panel. Depth contiguous: one pointer a column. Otherwise: two runs of up to kLanes neighbouring
// columns at depth 0, or with `interleaved` one run of pairs, gate and up in turn, in run[0].
struct Columns {
  const unsigned char* column[kPanelColumns];
  const unsigned char* scales[kPanelColumns];  // of the columns, and elements of a block: quantised ones only
  int64_t block;
  const unsigned char* run[2];
  int64_t width[2];  // of the runs; both are the pairs' number when interleaved
  int64_t stride;    // bytes from one depth to the next
  bool interleaved;
  bool full() const { return width[0] == kLanes && width[1] == kLanes; }
};

// Word `d` of both vectors of columns, for weights stored by depth.
template <class W, int32_t D, bool Full, bool Interleaved>
MODES_INLINE void load_across(const Columns& c, int64_t d, int64_t depth, vfloat* b0, vfloat* b1) {
  const int64_t row = d * W::kElements * c.stride;
  const auto part = [](const unsigned char* p, int64_t count) __attribute__((always_inline)) {
    return Full ? load<D>(p) : load_part<D>(p, count < 0 ? 0 : least(count, kLanes));
  };
  if constexpr (!W::kPairs && !Interleaved) {
    *b0 = part(c.run[0] + row, c.width[0]);
    *b1 = part(c.run[1] + row, c.width[1]);
  } else if constexpr (!W::kPairs) {
    const vfloat low = part(c.run[0] + row, 2 * c.width[0]);
    const vfloat high = part(c.run[0] + row + (2 * c.width[0] > kLanes ? kLanes * kBytes<D> : 0), 2 * c.width[0] - kLanes);
    unzip(low, high, b0, b1);
  } else {
    const bool both = 2 * d + 1 < depth;  // an odd depth ends in half a word
    if constexpr (!Interleaved) {
      for (int v = 0; v < 2; ++v) {
        const unsigned char* p = c.run[v] + row;
        const vuint first = (vuint)(Full ? load<MODES_BF16>(p) : load_part<MODES_BF16>(p, c.width[v]));
        vuint second{};
        if (both) second = (vuint)(Full ? load<MODES_BF16>(p + c.stride) : load_part<MODES_BF16>(p + c.stride, c.width[v]));
        *(v ? b1 : b0) = (vfloat)(first >> 16 | second);
      }
    } else {
      const unsigned char* p = c.run[0] + row;
      const vuint first = (vuint)(Full ? load_words(p) : load_bytes(p, 4 * c.width[0]));
      vuint second{};
      if (both) second = (vuint)(Full ? load_words(p + c.stride) : load_bytes(p + c.stride, 4 * c.width[0]));
      *b0 = (vfloat)((first & 0xffffu) | second << 16);
      *b1 = (vfloat)(first >> 16 | (second & 0xffff0000u));
    }
  }
}

template <class W, int32_t D, bool Full, bool Interleaved>
MODES_INLINE void pack_across(const Columns& c, int64_t depth, int64_t first, int64_t last, float* panel) {
  constexpr int64_t kFar = 16;  // words of depth to fetch ahead: lines lie too far apart for the CPU to guess
  for (int64_t d = first; d < last; ++d, panel += kPanelColumns) {
    __builtin_prefetch(c.run[0] + (d + kFar) * W::kElements * c.stride, 0, 3);
    __builtin_prefetch(c.run[1] + (d + kFar) * W::kElements * c.stride, 0, 3);
    vfloat b0, b1;
    load_across<W, D, Full, Interleaved>(c, d, depth, &b0, &b1);
    store_words(panel, b0);
    store_words(panel + kLanes, b1);
  }
}

// Words [first, last) of depth into panel [last - first][2][kLanes]. `first` is a multiple of kBlock.
template <class W, int32_t D>
MODES_INLINE void pack_panel(const Columns& c, bool transposed, int64_t depth, int64_t first, int64_t last, float* panel) {
  if (transposed) {
    if (!c.full() && c.interleaved) return pack_across<W, D, false, true>(c, depth, first, last, panel);
    if (!c.full()) return pack_across<W, D, false, false>(c, depth, first, last, panel);
    if (c.interleaved) return pack_across<W, D, true, true>(c, depth, first, last, panel);
    return pack_across<W, D, true, false>(c, depth, first, last, panel);
  }
  constexpr int64_t kStep = kLanes * 4 / kBytes<D>;  // elements in a vector of what is stored
  const int64_t end = least(depth, last * W::kElements);
  int64_t d = first * W::kElements;
  for (; d + kStep <= end; d += kStep, panel += kStep / W::kElements * kPanelColumns) {
    for (int v = 0; v < 2; ++v) {
      vfloat r[kLanes];
      load_transposed(c.column + v * kLanes, d * kBytes<D>, r);
      float* to = panel + v * kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if constexpr (!W::kPairs && D != MODES_F32) {  // what is one word as it is stored becomes two
          vfloat one, two;
          split<D>(r[i], &one, &two);
          store_words(to + 2 * i * kPanelColumns, one);
          store_words(to + (2 * i + 1) * kPanelColumns, two);
        } else {
          store_words(to + i * kPanelColumns, r[i]);
        }
      }
    }
  }
  for (; d < end; d += W::kElements, panel += kPanelColumns) {
    for (int i = 0; i < kPanelColumns; ++i) panel[i] = read_word<W, D>(c.column[i] + d * kBytes<D>, depth - d);
  }
}

// to: [words(depth)][M]; rows hold float32 (Floats) or bfloat16 (Pairs).
template <class W, int M>
MODES_INLINE void pack_rows(const unsigned char* const* rows, int64_t depth, float* to) {
  constexpr int kStep = kLanes * W::kElements;
  constexpr int64_t kRowBytes = W::kPairs ? 2 : 4;
  constexpr int kLast = M % kLanes ? M % kLanes : kLanes;  // rows of the last group
  int64_t d = 0;
  for (; d + kStep <= depth; d += kStep, to += kLanes * M) {
    for (int m = 0; m < M; m += kLanes) {
      const unsigned char* row[kLanes];
      for (int i = 0; i < kLanes; ++i) row[i] = rows[least(m + i, M - 1)];
      vfloat r[kLanes];
      load_transposed(row, d * kRowBytes, r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) memcpy(to + i * M + m, &r[i], (m + kLanes <= M ? kLanes : kLast) * sizeof(float));
    }
  }
  for (; d < depth; d += W::kElements, to += M) {
    for (int i = 0; i < M; ++i) to[i] = read_word<W, W::kPairs ? MODES_BF16 : MODES_F32>(rows[i] + d * kRowBytes, depth - d);
  }
}

// panel_tile on weights stored by depth, in place: `P` whole panels of columns next to one another. sum: [P][M][2][kLanes].
template <class W, int32_t D, int M, int P, bool Interleaved>
MODES_INLINE void direct_tile(const float* rows, const Columns& c, int64_t depth, float* sum) {
  constexpr int64_t kNext = (Interleaved ? 2 : 1) * kLanes * kBytes<D>;  // bytes from one panel's run to the next one's
  constexpr int64_t kFar = 8;                                           // words of depth to fetch ahead
  vfloat s[P][M][2];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) s[p][i][0] = s[p][i][1] = vfloat{};
  }
  for (int64_t d = 0; d < words<W>(depth); ++d, rows += M) {
    Columns at = c;
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      __builtin_prefetch(at.run[0] + (d + kFar) * W::kElements * c.stride, 0, 3);
      __builtin_prefetch(at.run[1] + (d + kFar) * W::kElements * c.stride, 0, 3);
      vfloat b0, b1;
      load_across<W, D, true, Interleaved>(at, d, depth, &b0, &b1);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const vfloat a = splat_word(rows + i);
        s[p][i][0] = W::mac(s[p][i][0], a, b0);
        s[p][i][1] = W::mac(s[p][i][1], a, b1);
      }
      at.run[0] += kNext, at.run[1] += kNext;
    }
  }
  memcpy(sum, s, sizeof s);
}

}  // namespace
