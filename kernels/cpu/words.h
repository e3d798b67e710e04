// What a 32-bit "word" of a matrix's depth is. Either one float32, whatever the stored dtype (Floats), or two neighbouring
// bfloat16 as they are stored (Pairs), multiplied two at a time by vdpbf16ps. Everything above (tiles, panels, blocks) is
// written once, over words.
#pragma once

#include "cpu/simd.h"

namespace {

struct Floats {
  static constexpr int kElements = 1;  // of a word
  static constexpr bool kPairs = false;
  static MODES_INLINE vfloat mac(vfloat sum, vfloat a, vfloat b) { return fused(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kElements = 2;
  static constexpr bool kPairs = true;
  static MODES_INLINE vfloat mac(vfloat sum, vfloat a, vfloat b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class W>
MODES_INLINE int64_t words(int64_t elements) {
  return (elements + W::kElements - 1) / W::kElements;
}

// kLanes words of a row that is contiguous in depth, of stored dtype D, from element pointer p.
template <class W, int32_t D>
MODES_INLINE vfloat load_depth(const unsigned char* p) {
  if constexpr (W::kPairs) return load_words(p);
  return load<D>(p);
}

// The last of them: `count` elements, zeros after.
template <class W, int32_t D>
MODES_INLINE vfloat load_depth_part(const unsigned char* p, int64_t count) {
  if constexpr (W::kPairs) return load_bytes(p, count * 2);
  return load_part<D>(p, count);
}

template <int32_t D>
constexpr int64_t kBytes = D == MODES_F32 ? 4 : 2;  // of an element; quantised ones are stored in groups (quantised.h)

template <int32_t D>
constexpr bool kQuantised = D == MODES_I8 || D == MODES_I4;

// One word from element pointer p, of which `count` elements (at least one) are there; zeros after them.
template <class W, int32_t D>
MODES_INLINE float read_word(const unsigned char* p, int64_t count) {
  if constexpr (!W::kPairs) return read_element(p, 0, D);
  float word = 0.0f;
  memcpy(&word, p, count > 1 ? 4 : 2);
  return word;
}

// The first `units` lanes as words: as they are, or rounded to bfloat16 in pairs. What is left of a word is zero.
template <class W>
MODES_INLINE void round_words(vfloat v, int64_t units, float* word) {
  if constexpr (!W::kPairs) return store_words(word, v);
  uint16_t element[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) element[l] = l < units ? bf16_bits(v[l]) : uint16_t{0};
  memcpy(word, element, sizeof element);
}

template <class T, T Value>
struct Constant {
  static constexpr T value = Value;
};

// Calls f(Constant<int, n>) for the n in 1..Most.
template <int Most, class F>
MODES_INLINE void with_constant(int n, F f) {
  if constexpr (Most > 1) {
    if (n < Most) return with_constant<Most - 1>(n, f);
  }
  f(Constant<int, Most>{});
}

}  // namespace
