// The Gaussians of the output capsules, the densities of votes under them, and the softmax.
#pragma once

#include "em_votes.h"

namespace {

// What an E-step reads of the Gaussians of the iteration before.
struct Gaussians {
  vf *mean, *inverse;  // (J, D): μ and 1/(σ² + floor)
  vf* height;          // (J): logsigmoid(z) − ½ Σ log 2π(σ² + floor), log p at μ

  template <class S> static int64_t vectors(const S& d) { return d.J * (2 * d.D + 1); }
  template <class S> Gaussians(vf* memory, const S& d)
      : mean(memory), inverse(mean + d.J * d.D), height(inverse + d.J * d.D) {}
};

// The moments of the votes for each output capsule so far: Σ c, the mean of V with weights c, and
// Σ c (V − mean)².
struct Moments {
  vf *mass, *mean, *second;  // (J), (J, D), (J, D)

  template <class S> static int64_t vectors(const S& d) { return d.J * (2 * d.D + 1); }
  template <class S> Moments(vf* memory, const S& d)
      : mass(memory), mean(mass + d.J), second(mean + d.J * d.D) {}
};

// 1/N. Without mass it is 0, and a NaN stays.
ALWAYS_INLINE vf inverse_mass(vf mass) { return mass <= NO_MASS ? vf{} : 1.f / mass; }

// Σ_h term(h). Four sums side by side keep the roundings few.
template <class S, class Term> ALWAYS_INLINE vf sum_over_components(const S& d, const Term& term) {
  vf a = {}, b = {}, c = {}, e = {};
  const int64_t whole = d.D - d.D % 4;
  for (int64_t h = 0; h < whole; h += 4) {
    a += term(h);
    b += term(h + 1);
    c += term(h + 2);
    e += term(h + 3);
  }
  for (int64_t h = whole; h < d.D; h++) a += term(h);
  return (a + b) + (c + e);
}

// ½ Σ log 2π(σ² + floor). It takes the 2π in, so that it is near 0 for usual variances and log p keeps
// its digits.
template <class S> ALWAYS_INLINE vf log_width(const vf* variance, const S& d) {
  constexpr float TWO_PI = 6.283185307f;
  return 0.5f * sum_over_components(d, [&](int64_t h) { return log(TWO_PI * (variance[h] + d.min_variance)); });
}
// D β_u + ½ Σ log(σ² + floor), the cost of a unit of mass.
template <class S> ALWAYS_INLINE vf cost(vf log_width, float beta_u, const S& d) {
  constexpr float HALF_LOG_TWO_PI = 0.9189385332f;
  return log_width + float(d.D) * (beta_u - HALF_LOG_TWO_PI);
}
// The logit of iteration t.
template <class S> ALWAYS_INLINE vf logit(int64_t t, vf mass, vf cost, float beta_a, const S& d) {
  return d.temperature[t] * (beta_a - mass * cost);
}

// Gaussian j of an iteration with logit z.
template <class S>
ALWAYS_INLINE void describe(const vf* mean, const vf* variance, vf z, vf log_width, const Gaussians& out,
                            int64_t j, const S& d) {
  for (int64_t h = 0; h < d.D; h++) {
    out.mean[j * d.D + h] = mean[h];
    out.inverse[j * d.D + h] = 1.f / (variance[h] + d.min_variance);
  }
  out.height[j] = log_sigmoid(z) - log_width;
}

// log p of a vote.
template <class S>
ALWAYS_INLINE vf log_density(const vf* vote, const vf* mean, const vf* inverse, vf height, const S& d) {
  return height - 0.5f * sum_over_components(d, [&](int64_t h) {
                    const vf x = vote[h] - mean[h];
                    return x * x * inverse[h];
                  });
}

// Adds `count` input capsules to the moments of an output capsule: their own moments are found in two
// steps, and merged with those before (Chan, Golub and LeVeque 1983). Nothing cancels, wherever the
// mean is. Equal votes, and one vote that has all the mass, are their mean to the last bit.
template <class S>
ALWAYS_INLINE void add_moments(const vf* votes, const vf* c, int64_t count, vf& mass, vf* mean, vf* second,
                               const S& d) {
  constexpr float none = 1e-30f;  // far below what counts as mass in the end
  vf own = {}, parts[BLOCK];
  for (int64_t k = 0; k < count; k++) own += c[k];
  for (int64_t k = 0; k < count; k++) parts[k] = own <= none ? vf{} : c[k] / own;
  const vf before = mass;
  mass += own;
  const vf part = mass <= none ? vf{} : own / mass, between = before * part;
  const auto add = [&](int64_t h, auto N) {
    vf a[N()] = {}, b[N()] = {};
    for (int64_t k = 0; k < count; k++)
      for (int n = 0; n < N(); n++) a[n] += parts[k] * votes[k * d.D + h + n];
    vf rest[N()] = {};  // what rounding has left out
    for (int64_t k = 0; k < count; k++)
      for (int n = 0; n < N(); n++) rest[n] += parts[k] * (votes[k * d.D + h + n] - a[n]);
    for (int n = 0; n < N(); n++) a[n] += rest[n];
    for (int64_t k = 0; k < count; k++)
      for (int n = 0; n < N(); n++) {
        const vf x = votes[k * d.D + h + n] - a[n];
        b[n] += c[k] * x * x;
      }
    for (int n = 0; n < N(); n++) {
      const vf step = a[n] - mean[h + n];
      mean[h + n] += part * step;
      second[h + n] += b[n] + between * step * step;
    }
  };
  const int64_t whole = d.D - d.D % 4;
  for (int64_t h = 0; h < whole; h += 4) add(h, std::integral_constant<int, 4>());
  for (int64_t h = whole; h < d.D; h++) add(h, std::integral_constant<int, 1>());
}

// Values of the pairs of a block are (J, BLOCK) vectors. Of each input capsule: log Σ_j e^l, where l
// becomes its softmax.
template <class S> ALWAYS_INLINE void softmax(vf* l, int64_t count, vf* log_sum, const S& d) {
  for (int64_t i = 0; i < count; i++) {
    vf top = l[i], sum = {};
    for (int64_t j = 1; j < d.J; j++) top = larger(l[j * BLOCK + i], top);
    for (int64_t j = 0; j < d.J; j++) sum += l[j * BLOCK + i] = exp_of_negative(l[j * BLOCK + i] - top);
    log_sum[i] = top + log(sum);
    sum = 1.f / sum;
    for (int64_t j = 0; j < d.J; j++) l[j * BLOCK + i] *= sum;
  }
}
// The same with a log Σ that is known.
template <class S> ALWAYS_INLINE void softmax_with(const vf* log_sum, vf* l, int64_t count, const S& d) {
  for (int64_t j = 0; j < d.J; j++)
    for (int64_t i = 0; i < count; i++) l[j * BLOCK + i] = exp_of_negative(l[j * BLOCK + i] - log_sum[i]);
}

// The softmax over all rows that share an input capsule. Each row has left log Σ_j e^l of its own
// output capsules, (rows, I), and in a backward also δ, the mean of the gradient of l under its own
// softmax. Both become those of all rows together: log Σ eˡ of the logarithms, and the mean of the
// δ under the softmax of the logarithms. The sums run in the order of the rows.
//
// Each thread takes some lines of input positions.
ALWAYS_INLINE void share(float* log_sum, float* mean, int64_t images, const Grid& grid, int64_t I, Team team) {
  const int64_t lines = images * grid.height();
  for (int64_t line = lines * team.rank / team.size; line < lines * (team.rank + 1) / team.size; line++) {
    const int64_t image = line / grid.height(), Y = line % grid.height();
    for (int64_t X = 0; X < grid.width(); X++) {
      // Calls visit(index) for the rows that have the capsule c of this position.
      const auto each_row = [&](int64_t c, const auto& visit) {
        for (int64_t y = grid.first(Y); y <= grid.last(Y, grid.H); y++)
          for (int64_t x = grid.first(X); x <= grid.last(X, grid.W); x++) {
            const int64_t row = (image * grid.H + y) * grid.W + x;
            visit(row * I + ((Y - y * grid.S) * grid.K + X - x * grid.S) * grid.C + c);
          }
      };
      for (int64_t c = 0; c < grid.C; c++) {
        float top = -__builtin_inff(), sum = 0, total = 0;
        each_row(c, [&](int64_t e) { top = log_sum[e] > top ? log_sum[e] : top; });
        each_row(c, [&](int64_t e) {
          const float weight = std::exp(log_sum[e] - top);
          sum += weight;
          if (mean) total += weight * mean[e];
        });
        each_row(c, [&](int64_t e) {
          log_sum[e] = top + std::log(sum);
          if (mean) mean[e] = total / sum;
        });
      }
    }
  }
}

}  // namespace
