// Squash, v = n² / (1 + n²) · s/n, and its gradient, of the rows of (J, D).
//
// Lengths are float64: no square of a float overflows or vanishes there. A row with an infinite
// component has the length NaN, which spoils that row alone. Padding stays 0.
#pragma once

#include "sizes.h"

namespace {

inline double length(const float* x, int64_t D) {
  double sum = 0;
  for (int64_t k = 0; k < D; k++) sum += double(x[k]) * x[k];
  const double n = std::sqrt(sum);
  return (n - n) + n;  // ∞ − ∞ is NaN
}

// v = s / (n + 1/n): at 0 this is 0/∞ = 0. Rounding makes no row longer than 1.
inline void squash(const vf* s, vf* v, const Sizes& d) {
  constexpr double longest = 1 - 4 * 1.1920929e-7;
  for (int64_t j = 0; j < d.J; j++) {
    const float* x = floats(s + j * d.Dv);
    float* y = floats(v + j * d.Dv);
    const double n = length(x, d.D);
    const double divisor = n + 1 / n, least = n / longest;
    const double factor = 1 / (divisor < least ? least : divisor);
    for (int64_t k = 0; k < d.D; k++) y[k] = float(x[k] * factor);
    for (int64_t k = d.D; k < d.Dv * L; k++) y[k] = 0;
  }
}

// With ŝ = s/n and ρ = ŝ·dv, ds = f·((dv − ρŝ) + g'/f·ρŝ), f = n/(1+n²), g'/f = 2/(1+n²). The parts
// across and along s are kept apart: where n is large, their sum would cancel the second.
inline void squash_gradient(const vf* grad_v, const vf* s, vf* grad_s, const Sizes& d) {
  for (int64_t j = 0; j < d.J; j++) {
    const float *x = floats(s + j * d.Dv), *g = floats(grad_v + j * d.Dv);
    float* out = floats(grad_s + j * d.Dv);
    const double n = length(x, d.D), f = 1 / (n + 1 / n), ratio = 2 / (1 + n * n);
    const double inverse = n == 0 ? 0 : 1 / n;
    double rho = 0;
    for (int64_t k = 0; k < d.D; k++) rho += x[k] * inverse * g[k];
    for (int64_t k = 0; k < d.D; k++) {
      const double along = x[k] * inverse * rho;
      out[k] = float(((g[k] - along) + along * ratio) * f);
    }
    for (int64_t k = d.D; k < d.Dv * L; k++) out[k] = 0;
  }
}

}  // namespace
