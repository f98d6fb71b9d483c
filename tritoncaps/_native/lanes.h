// Vectors of LANES floats, with the compiler's vector extensions (GCC 12, Clang 12 or later).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#ifndef LANES
#define LANES 4
#endif

namespace {

constexpr int L = LANES;
static_assert(L == 4 || L == 8 || L == 16, "LANES is 4, 8 or 16");

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float vf_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float* p) { return *reinterpret_cast<const vf_anywhere*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_anywhere*>(p) = x; }
inline float* floats(vf* x) { return reinterpret_cast<float*>(x); }
inline const float* floats(const vf* x) { return reinterpret_cast<const float*>(x); }
inline void clear(vf* x, int64_t n) {
  for (int64_t k = 0; k < n; k++) x[k] = vf{};
}

// bfloat16 is the upper half of a float.
struct bf16 {
  uint16_t bits;
};
inline float raise(float x) { return x; }
inline float raise(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline vf load(const bf16* p) {
  typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
  return (vf)(__builtin_convertvector(*reinterpret_cast<const halves*>(p), vi) << 16);
}
inline void put(float& out, float x) { out = x; }
inline void put(bf16& out, float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  out.bits = std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Sums of LANES vectors at once: lane k of the result is the sum of the lanes of a[k].
//
// A step takes two vectors that hold blocks of 2S partial sums, and adds the upper half of each
// block to its lower half: blocks of S, those of `a` and of `b` in turn.
template <int S, int... k> inline vf halve(vf a, vf b, std::integer_sequence<int, k...>) {
  constexpr auto from = [](int lane) {
    return (lane / S % 2 ? L : 0) + lane / (2 * S) * 2 * S + lane % S;
  };
  return __builtin_shufflevector(a, b, from(k)...) + __builtin_shufflevector(a, b, (from(k) + S)...);
}
template <int S> inline vf sums_of_lanes(vf* a) {
  for (int k = 0; k < S; k++) a[k] = halve<S>(a[k], a[k + S], std::make_integer_sequence<int, L>());
  if constexpr (S == 1)
    return a[0];
  else
    return sums_of_lanes<S / 2>(a);
}
// Overwrites a[0 .. LANES).
inline vf reduce(vf* a) { return sums_of_lanes<L / 2>(a); }

inline vf larger(vf a, vf b) { return a > b ? a : b; }

// eˣ for x ≤ 0, within two units in the last place; below −104 it is 0, and NaN stays NaN.
//
// eˣ = 2ⁿ e^f with n = round(x / ln 2) and |f| ≤ ln 2 / 2. Adding 1.5·2²³ rounds to an integer, and
// leaves it in the low bits. ln 2 is subtracted in two parts. 2ⁿ is applied in two steps, so that
// results below 2⁻¹²⁶ come out too.
inline vf exp_of_negative(vf x) {
  x = x < -104.f ? splat(-104.f) : x;
  const vf magic = splat(12582912.f);
  const vf shifted = x * 1.44269504f + magic;
  const vi n = (vi)shifted - (vi)magic;
  const vf whole = shifted - magic;
  const vf f = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);  // Cephes' polynomial
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  const vi half = n >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
}

// Memory for n values, aligned for vectors. `values` is null if there is none left.
template <class X> struct Buffer {
  X* values;
  explicit Buffer(int64_t n)
      : values(static_cast<X*>(aligned_alloc(64, (n * int64_t(sizeof(X)) / 64 + 1) * 64))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(values); }
};

}  // namespace
