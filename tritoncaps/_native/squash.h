// Squash of a row s of length n, and its gradient: v = f·s, whose length is g = f·n.
//
//     quadratic:    f = n / (1 + n²),    g' = 2f / (1 + n²)
//     exponential:  f = (1 − e⁻ⁿ) / n,   g' = e⁻ⁿ
//
// Lengths are float64: no square of a float overflows or vanishes there. A row with an infinite
// component has the length NaN, which spoils that row alone.
#pragma once

#include "sizes.h"

namespace {

inline double dot(const float* x, const float* y, int64_t D) {
  double a[4] = {}, rest = 0;
  int64_t k = 0;
  for (; k + 4 <= D; k += 4)
    for (int e = 0; e < 4; e++) a[e] += double(x[k + e]) * y[k + e];
  for (; k < D; k++) rest += double(x[k]) * y[k];
  return (a[0] + a[2]) + (a[1] + a[3]) + rest;
}

inline double length(const float* x, int64_t D) {
  const double n = std::sqrt(dot(x, x, D));
  return (n - n) + n;  // ∞ − ∞ is NaN
}

// Rounding makes no row longer than 1.
inline void squash_row(const float* s, float* __restrict v, int64_t D, bool exponential) {
  constexpr double longest = 1 - 4 * 1.1920929e-7;
  const double n = length(s, D);
  double f = 1 / (n + 1 / n);  // at 0 this is 1/∞ = 0
  if (exponential) f = n == 0 ? 1 : -std::expm1(-n) / n;
  if (f * n > longest) f = longest / n;
  for (int64_t k = 0; k < D; k++) v[k] = float(s[k] * f);
}

// With ŝ = s/n and ρ = ŝ·dv, ds = f·((dv − ρŝ) + g'/f·ρŝ). The parts across and along s are kept
// apart: where n is large, their sum would cancel the second.
inline void squash_gradient_row(const float* grad_v, const float* s, float* __restrict grad_s, int64_t D,
                                bool exponential) {
  const double n = length(s, D), inverse = n == 0 ? 0 : 1 / n;
  double f = n == 0 ? 0 : 1 / (n + inverse), ratio = 2 * f * inverse;
  if (exponential) {
    f = n == 0 ? 1 : -std::expm1(-n) * inverse;
    ratio = std::exp(-n) / f;
  }
  const double share = dot(s, grad_v, D) * inverse * inverse;  // ρ / n
  for (int64_t k = 0; k < D; k++) {
    const double along = s[k] * share;
    grad_s[k] = float(((grad_v[k] - along) + along * ratio) * f);
  }
}

// Of the rows of (J, D). Padding stays 0.
inline void squash(const vf* s, vf* v, const Sizes& d) {
  for (int64_t j = 0; j < d.J; j++) {
    float* y = floats(v + j * d.Dv);
    squash_row(floats(s + j * d.Dv), y, d.D, false);
    for (int64_t k = d.D; k < d.Dv * L; k++) y[k] = 0;
  }
}
inline void squash_gradient(const vf* grad_v, const vf* s, vf* grad_s, const Sizes& d) {
  for (int64_t j = 0; j < d.J; j++) {
    float* out = floats(grad_s + j * d.Dv);
    squash_gradient_row(floats(grad_v + j * d.Dv), floats(s + j * d.Dv), out, d.D, false);
    for (int64_t k = d.D; k < d.Dv * L; k++) out[k] = 0;
  }
}

}  // namespace
