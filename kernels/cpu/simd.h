// One vector of float32 lanes, as wide as the instruction set this file is compiled for. GCC and Clang vector
// extensions, so that the same code serves AVX-512, AVX2, NEON and plain SSE2.
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

MODES_INLINE vfloat splat(float v) { return v - vfloat{}; }

// kLanes elements of dtype D, at any address.
template <int32_t D>
MODES_INLINE vfloat load(const void* p) {
  if constexpr (D == MODES_F32) {
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
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

// The first `count` of them, zeros after.
template <int32_t D>
MODES_INLINE vfloat load_part(const void* p, int64_t count) {
  unsigned char padded[kLanes * 4] = {};
  memcpy(padded, p, static_cast<size_t>(count) * (D == MODES_F32 ? 4 : 2));
  return load<D>(padded);
}

// Sum of the lanes, by halves.
MODES_INLINE float sum_lanes(vfloat v) {
  float lane[kLanes];
  memcpy(lane, &v, sizeof v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
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
