// The Gaussians of the output capsules, the densities of votes under them, and the softmax.
#pragma once

#include "em_votes.h"

namespace {

// What an E-step reads of the Gaussians that the iteration before has left.
struct Gaussians {
  vf *mean, *inverse;  // (J, D): μ and 1/(σ² + floor)
  vf* height;          // (J): logsigmoid(z) − ½ Σ log(σ² + floor), log p at μ but for a constant of all

  template <class S> static int64_t vectors(const S& d) { return d.J * (2 * d.D + 1); }
  template <class S> Gaussians(vf* memory, const S& d)
      : mean(memory), inverse(mean + d.J * d.D), height(inverse + d.J * d.D) {}
};

// Sums over i of an output capsule: Σ c, and of each component Σ c x and Σ c x².
struct Moments {
  vf *mass, *first, *second;  // (J), (J, D), (J, D)

  template <class S> static int64_t vectors(const S& d) { return d.J * (2 * d.D + 1); }
  template <class S> Moments(vf* memory, const S& d) : mass(memory), first(mass + d.J), second(first + d.J * d.D) {}
};

// 1/N. Without mass it is 0, and a NaN stays.
inline vf inverse_mass(vf mass) { return mass <= NO_MASS ? vf{} : 1.f / mass; }

// D β_u + ½ Σ log(σ² + floor), the cost of a unit of mass.
template <class S> inline vf cost(const vf* variance, float beta_u, const S& d) {
  vf sum = {};
  for (int64_t h = 0; h < d.D; h++) sum += log(variance[h] + d.min_variance);
  return 0.5f * sum + float(d.D) * beta_u;
}
// The logit of iteration t.
template <class S> inline vf logit(int64_t t, vf mass, vf cost, float beta_a, const S& d) {
  return d.temperature[t] * (beta_a - mass * cost);
}

// Gaussian j of an iteration with logit z.
template <class S>
inline void describe(const vf* mean, const vf* variance, vf z, vf cost, float beta_u, const Gaussians& out, int64_t j,
                     const S& d) {
  for (int64_t h = 0; h < d.D; h++) {
    out.mean[j * d.D + h] = mean[h];
    out.inverse[j * d.D + h] = 1.f / (variance[h] + d.min_variance);
  }
  out.height[j] = log_sigmoid(z) - (cost - float(d.D) * beta_u);
}

// log p of a vote, from its deviations.
template <class S> inline vf log_density(const vf* x, const vf* inverse, vf height, const S& d) {
  vf a = {}, b = {};
  const int64_t even = d.D - d.D % 2;
  for (int64_t h = 0; h < even; h += 2) {
    a += x[h] * x[h] * inverse[h];
    b += x[h + 1] * x[h + 1] * inverse[h + 1];
  }
  if (even < d.D) a += x[even] * x[even] * inverse[even];
  return height - 0.5f * (a + b);
}

// Σ c x and Σ c x² over `count` input capsules are added to the moments of an output capsule.
template <class S>
inline void add_moments(const vf* x, const vf* c, int64_t count, vf* first, vf* second, const S& d) {
  const auto add = [&](int64_t h, auto N) {
    vf a[N()] = {}, b[N()] = {};
    for (int64_t i = 0; i < count; i++)
      for (int n = 0; n < N(); n++) {
        const vf y = x[i * d.D + h + n], cy = c[i] * y;
        a[n] += cy;
        b[n] += cy * y;
      }
    for (int n = 0; n < N(); n++) first[h + n] += a[n], second[h + n] += b[n];
  };
  const int64_t whole = d.D - d.D % 4;
  for (int64_t h = 0; h < whole; h += 4) add(h, std::integral_constant<int, 4>());
  for (int64_t h = whole; h < d.D; h++) add(h, std::integral_constant<int, 1>());
}

// Values of the pairs of a block are (J, BLOCK) vectors. Of each input capsule: log Σ_j e^l, where l
// becomes its softmax.
template <class S> inline void softmax(vf* l, int64_t count, vf* log_sum, const S& d) {
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
template <class S> inline void softmax_with(const vf* log_sum, vf* l, int64_t count, const S& d) {
  for (int64_t j = 0; j < d.J; j++)
    for (int64_t i = 0; i < count; i++) l[j * BLOCK + i] = exp_of_negative(l[j * BLOCK + i] - log_sum[i]);
}

// The softmax over all rows that share an input capsule. Each row has left log Σ_j e^l of its own
// output capsules, (rows, I), and in a backward also δ, the mean of the gradient of l under its own
// softmax. Both become those of all rows together: log Σ eˡ of the logarithms, and the mean of the
// δ under the softmax of the logarithms. The sums run in the order of the rows.
//
// Of the input positions of `images` images, a thread has those of some lines.
inline void share(float* log_sum, float* mean, int64_t images, const Grid& grid, int64_t I, Team team) {
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
