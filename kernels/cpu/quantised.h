// Quantised weights (modes.h), dequantised in registers as they are loaded. What is stored of an element times its scale is
// exact in float32, and sums run in the order that tiles.h and panels.h have: so a product has the bits that it has with the
// same weights stored as float32.
#pragma once

#include "cpu/words.h"

namespace {

constexpr int kGroup = kQuantisedGroup;
constexpr int kGroupVectors = kGroup / kLanes;
constexpr int64_t kScales = 16;  // of a column, widened at a time

template <int32_t D>
constexpr int64_t kGroupBytes = D == MODES_I4 ? kGroup / 2 : kGroup;

// A group of weights at p as float32, each times `scale`.
template <int32_t D>
MODES_INLINE void load_group(const unsigned char* p, float scale, vfloat (&weights)[kGroupVectors]) {
#if defined(__AVX512F__)
  if constexpr (D == MODES_I8) {
#pragma GCC unroll 2
    for (int v = 0; v < kGroupVectors; ++v) {
      const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + v * kLanes));
      const __m512i wide = _mm512_maskz_cvtepi8_epi32(0xffff, stored);  // masked: see load() in simd.h
      weights[v] = (vfloat)_mm512_maskz_cvtepi32_ps(0xffff, wide) * scale;
    }
  } else {  // the lower four bits of a lane look its weight up
    const vfloat table = vfloat{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1} * scale;
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m512i codes = _mm512_maskz_cvtepu8_epi32(0xffff, stored);
    weights[0] = (vfloat)_mm512_maskz_permutexvar_ps(0xffff, codes, (__m512)table);
    weights[1] = (vfloat)_mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_srli_epi32(0xffff, codes, 4), (__m512)table);
  }
#elif defined(__AVX2__)
  if constexpr (D == MODES_I8) {
#pragma GCC unroll 4
    for (int v = 0; v < kGroupVectors; ++v) {
      const __m128i stored = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + v * kLanes));
      weights[v] = (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(stored)) * scale;
    }
  } else {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + v * kLanes)));
      const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(codes, 28), 28);
      const __m256i high = _mm256_srai_epi32(_mm256_slli_epi32(codes, 24), 28);
      weights[v] = (vfloat)_mm256_cvtepi32_ps(low) * scale;
      weights[2 + v] = (vfloat)_mm256_cvtepi32_ps(high) * scale;
    }
  }
#else
  for (int v = 0; v < kGroupVectors; ++v) {
    for (int l = 0; l < kLanes; ++l) {
      const int d = v * kLanes + l;
      if constexpr (D == MODES_I8) {
        weights[v][l] = static_cast<float>(static_cast<int8_t>(p[d])) * scale;
      } else {
        const uint32_t code = d < kGroup / 2 ? p[d] : uint32_t{p[d - kGroup / 2]} >> 4;
        weights[v][l] = static_cast<float>(static_cast<int32_t>((code & 15u) ^ 8u) - 8) * scale;
      }
    }
  }
#endif
}

// The first `count` of kScales scales as float32; what comes after them is not used.
MODES_INLINE void widen_scales(const unsigned char* p, int64_t count, float* scale) {
#if defined(__AVX512F__)
  const __mmask16 there = static_cast<__mmask16>((1u << count) - 1u);
  _mm512_storeu_ps(scale, _mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(there, p)));
#else
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_words(scale + i, load<MODES_F16>(p + i * 2));
  for (; i < count; ++i) scale[i] = read_f16(p + i * 2);
#endif
}

// dot_tile (tiles.h) on columns of groups. `scales`: of each column's blocks.
template <int32_t D, int M, int N>
MODES_INLINE void dot_groups(const unsigned char* const* rows, const unsigned char* const* columns,
                             const unsigned char* const* scales, int64_t block, int64_t depth, int64_t ahead,
                             float (*out)[N]) {
  vfloat sum[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) sum[i][j] = vfloat{};
  }
  float scale[N][kScales];
  const auto add = [&](int64_t g, int64_t s, const unsigned char* const* from, int64_t at) __attribute__((always_inline)) {
    if (g % (64 / kGroupBytes<D>) == 0) {  // once for each line of the cache
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) __builtin_prefetch(columns[j] + g * kGroupBytes<D> + ahead, 0, 2);
    }
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      vfloat w[kGroupVectors];
      load_group<D>(columns[j] + g * kGroupBytes<D>, scale[j][s], w);
#pragma GCC unroll 8
      for (int v = 0; v < kGroupVectors; ++v) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) sum[i][j] = fused(load_words(from[i] + at + v * kLanes * 4), w[v], sum[i][j]);
      }
    }
  };
  const int64_t blocks = (depth + block - 1) / block, whole = depth / kGroup;
  int64_t g = 0;
  for (int64_t b = 0; b < blocks; b += kScales) {
    const int64_t count = least(kScales, blocks - b);
    for (int j = 0; j < N; ++j) widen_scales(scales[j] + b * 2, count, scale[j]);
    for (int64_t s = 0; s < count; ++s) {
      for (const int64_t end = least(whole, (b + s + 1) * (block / kGroup)); g < end; ++g) add(g, s, rows, g * kGroup * 4);
    }
    if (b + count == blocks && whole * kGroup < depth) {  // the rest of the rows, zeros after
      unsigned char rest[M][kGroup * 4] = {};
      const unsigned char* from[M];
      for (int i = 0; i < M; ++i) {
        memcpy(rest[i], rows[i] + whole * kGroup * 4, static_cast<size_t>(depth - whole * kGroup) * 4);
        from[i] = rest[i];
      }
      add(whole, count - 1, from, 0);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < N; j += 4) {
      const vfloat four[4] = {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]};
      sum_lanes(four, out[i] + j);
    }
  }
}

// pack_panel (panels.h) of 2 * kLanes columns of groups: depths [first, last), `first` a multiple of kGroup.
template <int32_t D>
MODES_INLINE void pack_groups(const unsigned char* const* columns, const unsigned char* const* scales, int64_t block,
                              int64_t first, int64_t last, float* panel) {
  for (int64_t d = first; d < last; d += kGroup) {
    const int64_t at = d / block * 2;
    for (int half = 0; half < 2; ++half) {
      unsigned char row[kLanes][kGroup * 4];
      const unsigned char* from[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int column = half * kLanes + i;
        vfloat w[kGroupVectors];
        load_group<D>(columns[column] + d / kGroup * kGroupBytes<D>, read_f16(scales[column] + at), w);
        memcpy(row[i], w, sizeof w);
        from[i] = row[i];
      }
      for (int v = 0; v < kGroupVectors; ++v) {
        vfloat r[kLanes];
        load_transposed(from, v * kLanes * 4, r);
        const int64_t to = d - first + v * kLanes;
        for (int64_t i = 0; i < least(kLanes, last - first - to); ++i) {
          store_words(panel + (to + i) * 2 * kLanes + half * kLanes, r[i]);
        }
      }
    }
  }
}

}  // namespace
