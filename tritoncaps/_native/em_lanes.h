// Rows of the batch side by side: lane k of a vector belongs to row k of a group of LANES rows.
//
// So no sum of a row runs across lanes, and a NaN stays in the lane of its row. A group that has
// fewer rows repeats the last one.
#pragma once

#include "lanes.h"

namespace {

template <int S, int... k> inline void exchange(vf& a, vf& b, std::integer_sequence<int, k...>) {
  const vf lower = __builtin_shufflevector(a, b, (k & S ? L + k - S : k)...);
  b = __builtin_shufflevector(a, b, (k & S ? L + k : k + S)...);
  a = lower;
}
// Transposes a[0 .. LANES), by exchanging blocks of S×S.
template <int S = L / 2> inline void transpose(vf* a) {
  for (int k = 0; k < L; k++)
    if (!(k & S)) exchange<S>(a[k], a[k + S], std::make_integer_sequence<int, L>());
  if constexpr (S > 1) transpose<S / 2>(a);
}

// n values of each of `rows` rows, which are `stride` apart, to n vectors.
template <class T> inline void to_lanes(const T* x, int64_t stride, int64_t rows, int64_t n, vf* out) {
  const T* row[L];
  for (int k = 0; k < L; k++) row[k] = x + std::min<int64_t>(k, rows - 1) * stride;
  const int64_t whole = n - n % L;
  for (int64_t e = 0; e < whole; e += L) {
    vf a[L];
    for (int k = 0; k < L; k++) a[k] = load(row[k] + e);
    transpose(a);
    for (int k = 0; k < L; k++) out[e + k] = a[k];
  }
  for (int64_t e = whole; e < n; e++)
    for (int k = 0; k < L; k++) out[e][k] = raise(row[k][e]);
}
// And back.
template <class T> inline void from_lanes(const vf* x, int64_t stride, int64_t rows, int64_t n, T* out) {
  const int64_t whole = n - n % L;
  for (int64_t e = 0; e < whole; e += L) {
    vf a[L];
    for (int k = 0; k < L; k++) a[k] = x[e + k];
    transpose(a);
    for (int64_t k = 0; k < rows; k++)
      if constexpr (sizeof(T) == sizeof(float))
        store(out + k * stride + e, a[k]);
      else
        for (int64_t c = 0; c < L; c++) put(out[k * stride + e + c], floats(a + k)[c]);
  }
  for (int64_t e = whole; e < n; e++)
    for (int64_t k = 0; k < rows; k++) put(out[k * stride + e], floats(x + e)[k]);
}

// log x within two units in the last place; −∞ at 0, NaN below.
//
// x = 2ⁿ (1 + f) with 1 + f in [√½, √2).
inline vf log(vf x) {
  const auto tiny = x < 1.17549435e-38f;
  const vf scaled = tiny ? x * 8388608.f : x;  // subnormal numbers
  const vi shifted = (vi)scaled - 0x3f3504f3;  // the bits of √½
  const vf n = __builtin_convertvector(shifted >> 23, vf) - (tiny ? splat(23.f) : vf{});
  const vf f = (vf)((shifted & 0x7fffff) + 0x3f3504f3) - 1.f;
  vf p = splat(7.0376836292e-2f);  // Cephes' polynomial
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf square = f * f;
  const vf small = p * f * square - 2.12194440e-4f * n - 0.5f * square;
  const vf result = f + small + 0.693359375f * n;
  const float infinity = __builtin_inff(), nan = __builtin_nanf("");
  return x > 0 && x < infinity ? result : x == 0 ? splat(-infinity) : x > 0 ? x : splat(nan);
}

// log 1/(1 + e^−z), and the gradient of that, 1/(1 + e^z).
inline vf absolute(vf x) { return x < 0 ? -x : x; }
inline vf log_sigmoid(vf z) { return (z > 0 ? vf{} : z) - log(1.f + exp_of_negative(-absolute(z))); }
inline vf sigmoid_of_negative(vf z) {
  const vf e = exp_of_negative(-absolute(z));
  return (z > 0 ? e : splat(1.f)) / (1.f + e);
}

}  // namespace
