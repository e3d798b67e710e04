// One vector of 32-bit lanes, as wide as the instruction set this file is compiled for. GCC and Clang vector extensions
// where they say enough, so that the same code serves AVX-512, AVX2, NEON and plain SSE2; intrinsics where they do not.
//
// Only for the files compiled per instruction set: everything here has internal linkage (see common/half.h).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/half.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vshort __attribute__((vector_size(kLanes * 2)));

#define MODES_INLINE inline __attribute__((always_inline))

MODES_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

MODES_INLINE vfloat splat(float v) { return v - vfloat{}; }

// The word at p in every lane, whatever its bits mean.
MODES_INLINE vfloat splat_word(const float* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_set1_ps(*p);
#elif defined(__AVX2__)
  return (vfloat)_mm256_broadcast_ss(p);
#else
  vfloat v;
  for (int l = 0; l < kLanes; ++l) v[l] = *p;
  return v;
#endif
}

MODES_INLINE vfloat fused(vfloat a, vfloat b, vfloat c) {  // a * b + c, in one rounding where the CPU can
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

MODES_INLINE vfloat load_words(const void* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}

MODES_INLINE void store_words(void* p, vfloat v) { memcpy(p, &v, sizeof v); }

// kLanes elements of dtype D as float32, at any address.
template <int32_t D>
MODES_INLINE vfloat load(const void* p) {
  if constexpr (D == MODES_F32) {
    return load_words(p);
  } else if constexpr (D == MODES_BF16) {
    vshort high;
    memcpy(&high, p, sizeof high);
    return (vfloat)(__builtin_convertvector(high, vuint) << 16);
  } else {
#if defined(__AVX512F__)
    // The masked form: GCC 12 warns of an undefined register in the plain one.
    return (vfloat)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
    vfloat v;
    for (int l = 0; l < kLanes; ++l) v[l] = read_f16(static_cast<const unsigned char*>(p) + l * 2);
    return v;
#endif
  }
}

// The first `count` of them, zeros after; nothing past them is read.
template <int32_t D>
MODES_INLINE vfloat load_part(const void* p, int64_t count) {
  unsigned char padded[kLanes * 4] = {};
  memcpy(padded, p, static_cast<size_t>(count) * (D == MODES_F32 ? 4 : 2));
  return load<D>(padded);
}

// The first `bytes` bytes, zeros after.
MODES_INLINE vfloat load_bytes(const void* p, int64_t bytes) {
  vfloat v{};
  memcpy(&v, p, static_cast<size_t>(bytes));
  return v;
}

// Lanes of a and b in turn: the first half of (a0 b0 a1 b1 ...), and the second.
MODES_INLINE vfloat zip_low(vfloat a, vfloat b) {
  vfloat v;
  for (int l = 0; l < kLanes / 2; ++l) v[2 * l] = a[l], v[2 * l + 1] = b[l];
  return v;
}
MODES_INLINE vfloat zip_high(vfloat a, vfloat b) {
  vfloat v;
  for (int l = 0; l < kLanes / 2; ++l) v[2 * l] = a[kLanes / 2 + l], v[2 * l + 1] = b[kLanes / 2 + l];
  return v;
}

// Even and odd lanes of the 2 * kLanes lanes (a, b).
MODES_INLINE void unzip(vfloat a, vfloat b, vfloat* even, vfloat* odd) {
#if defined(__AVX512F__)
  const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *even = (vfloat)_mm512_permutex2var_ps((__m512)a, at, (__m512)b);
  *odd = (vfloat)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(at, _mm512_set1_epi32(1)), (__m512)b);
#else
  for (int l = 0; l < kLanes / 2; ++l) {
    (*even)[l] = a[2 * l], (*even)[kLanes / 2 + l] = b[2 * l];
    (*odd)[l] = a[2 * l + 1], (*odd)[kLanes / 2 + l] = b[2 * l + 1];
  }
#endif
}

#if defined(__AVX2__)
MODES_INLINE __m128 load_quad(const unsigned char* p) { return _mm_loadu_ps(reinterpret_cast<const float*>(p)); }
#endif

// r[i] becomes word i of each of kLanes arrays.
MODES_INLINE void load_transposed(const unsigned char* const* array, int64_t byte, vfloat (&r)[kLanes]) {
#if defined(__AVX512F__)
  // Quads of words go where they belong as they are loaded, and 4 x 4 transposes within 128 bits remain: half the shuffles of
  // a transpose of whole vectors. An array's quads one after the other: arrays a page apart share one set of the L1 cache.
  __m512 z[4][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) z[q][i] = _mm512_castps128_ps512(load_quad(array[i] + byte + q * 16));
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) z[q][i] = _mm512_insertf32x4(z[q][i], load_quad(array[i + 4] + byte + q * 16), 1);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) z[q][i] = _mm512_insertf32x4(z[q][i], load_quad(array[i + 8] + byte + q * 16), 2);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) z[q][i] = _mm512_insertf32x4(z[q][i], load_quad(array[i + 12] + byte + q * 16), 3);
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z[q][0], z[q][1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(z[q][0], z[q][1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(z[q][2], z[q][3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(z[q][2], z[q][3]));
    r[4 * q] = (vfloat)_mm512_unpacklo_pd(a, c), r[4 * q + 1] = (vfloat)_mm512_unpackhi_pd(a, c);
    r[4 * q + 2] = (vfloat)_mm512_unpacklo_pd(b, d), r[4 * q + 3] = (vfloat)_mm512_unpackhi_pd(b, d);
  }
#elif defined(__AVX2__)
  __m256 z[2][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    for (int q = 0; q < 2; ++q) {
      z[q][i] = _mm256_castps128_ps256(load_quad(array[i] + byte + q * 16));
      z[q][i] = _mm256_insertf128_ps(z[q][i], load_quad(array[i + 4] + byte + q * 16), 1);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < 2; ++q) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z[q][0], z[q][1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(z[q][0], z[q][1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(z[q][2], z[q][3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(z[q][2], z[q][3]));
    r[4 * q] = (vfloat)_mm256_unpacklo_pd(a, c), r[4 * q + 1] = (vfloat)_mm256_unpackhi_pd(a, c);
    r[4 * q + 2] = (vfloat)_mm256_unpacklo_pd(b, d), r[4 * q + 3] = (vfloat)_mm256_unpackhi_pd(b, d);
  }
#else
  vfloat z[kLanes], t[kLanes];
  for (int i = 0; i < kLanes; ++i) z[i] = load_words(array[i] + byte);
  for (int round = 1; round < kLanes; round *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      t[2 * i] = zip_low(z[i], z[i + kLanes / 2]);
      t[2 * i + 1] = zip_high(z[i], z[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) z[i] = t[i];
  }
  for (int i = 0; i < kLanes; ++i) r[i] = z[i];
#endif
}

// The two 16-bit elements of each word as float32.
template <int32_t D>
MODES_INLINE void split(vfloat word, vfloat* first, vfloat* second) {
  const vuint bits = (vuint)word;
  if constexpr (D == MODES_BF16) {
    *first = (vfloat)(bits << 16);
    *second = (vfloat)(bits & 0xffff0000u);
  } else {
    const vshort low = __builtin_convertvector(bits, vshort), high = __builtin_convertvector(bits >> 16, vshort);
    *first = load<D>(&low);
    *second = load<D>(&high);
  }
}

// sums[i] = the sum of v[i]'s lanes.
MODES_INLINE void sum_lanes(const vfloat (&v)[4], float* sums) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512 all =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const __m256 half = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]), _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int i = 0; i < 4; ++i) {
    float lane[kLanes];
    memcpy(lane, &v[i], sizeof lane);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    sums[i] = lane[0];
  }
#endif
}

// e^v within 2 ulp; 0 below -87.3, +inf above 88.4, NaN stays NaN. Cephes' polynomial after removing n ln 2.
MODES_INLINE vfloat exp_lanes(vfloat v) {
  v = v > 89.0f ? splat(89.0f) : v;  // a NaN compares false and passes through
  v = v < -87.3f ? splat(-87.3f) : v;
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vfloat shifted = v * 1.44269504f + magic;
  const vfloat n = shifted - magic;
  const vfloat r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const vuint power = ((vuint)shifted + 127u) << 23;  // the magic number's own bits leave at the top
  return p * (vfloat)power;
}

}  // namespace
