// em_routing, forward: T iterations of an M-step, with an E-step before each but the first.
//
//     R_ij = softmax_j(log p_j(V_ij) + logsigmoid(z_j)),   the first R = 1 / parents of i
//     N_j = Σ_i a_i R_ij,   μ_j = Σ_i a_i R_ij V_ij / N_j,   σ²_j = Σ_i a_i R_ij (V_ij − μ_j)² / N_j
//     z_j = λ (β_a − N_j (D β_u + ½ Σ_h log(σ²_jh + floor)))
//
// One walk through the votes does an E-step and the M-step after it: a block of input capsules at a
// time, the votes give log p, and with it their mean and variance, which are merged with those of the
// blocks before.
//
// N, μ and σ² of all iterations are kept for the backward.
#pragma once

#include "em_gaussians.h"

namespace {

template <class T> struct EmInputs {
  const T *poses, *activations, *weight;
  const float *beta_u, *beta_a;
};

struct EmStates {
  float *mass, *mean, *variance;  // (T, B, J), (T, B, J, D), (T, B, J, D)
};

// Up to LANES rows of a round, which are computed together.
struct Group {
  int64_t first, rows;
  Group(int64_t number, int64_t first_of_round, int64_t rows_of_round)
      : first(first_of_round + number * L), rows(std::min<int64_t>(L, rows_of_round - number * L)) {}
};

// The weight of each pair in one piece, (I, J, P, Q), in float32.
template <class T>
inline void pack_weight(const T* weight, float* out, int64_t from, int64_t to, const EmSizes& d) {
  for (int64_t i = from; i < to; i++)
    for (int64_t p = 0; p < d.P; p++)
      for (int64_t j = 0; j < d.J; j++)
        for (int64_t q = 0; q < d.Q; q++)
          out[((i * d.J + j) * d.P + p) * d.Q + q] = raise(weight[((i * d.P + p) * d.J + j) * d.Q + q]);
}

// The input capsules of a group of rows, BLOCK of them at a time.
template <class T, class S> struct InputBlocks {
  const EmInputs<T>& in;
  const float* weight;  // packed
  vf *u, *a;            // (BLOCK, R, P) and (BLOCK)
  const S& d;

  // Calls visit(i, count, W) for each block. Then u and a hold its poses and activations, and W is the
  // weight of its first capsule, i.
  template <class Visit> ALWAYS_INLINE void each(const Group& group, const Visit& visit) const {
    for (int64_t i = 0; i < d.I; i += BLOCK) {
      const int64_t count = std::min<int64_t>(BLOCK, d.I - i), first = group.first * d.I + i;
      to_lanes(in.poses + first * d.poses, d.I * d.poses, group.rows, count * d.poses, u);
      to_lanes(in.activations + first, d.I, group.rows, count, a);
      visit(i, count, weight + i * d.J * d.products);
    }
  }
};

// The first assignment of the inputs at (ky, kx) of each row, (K·K) vectors: 1 / (the number of output
// capsules that compete for them).
inline void first_assignment(const Group& group, const Grid& grid, vf* out, const EmSizes& d) {
  for (int64_t k = 0; k < grid.K * grid.K; k++)
    for (int64_t e = 0; e < L; e++) {
      const int64_t row = group.first + std::min(e, group.rows - 1);
      out[k][e] = 1.f / float(d.J * grid.sharing(row, k));
    }
}

// Writes the assignment of a block, (rows, I, J). Scratch: (J) vectors.
template <class T>
inline void put_assignment(const vf* R, const Group& group, int64_t i, int64_t count, T* out, vf* scratch,
                           const EmSizes& d) {
  for (int64_t k = 0; k < count; k++) {
    for (int64_t j = 0; j < d.J; j++) scratch[j] = R[j * BLOCK + k];
    from_lanes(scratch, d.I * d.J, group.rows, d.J, out + (group.first * d.I + i + k) * d.J);
  }
}

template <class T, class S>
bool em_forward(const EmInputs<T>& in, const S& d, const Grid& grid, T* v, T* logits, T* assignment,
                const EmStates& states, int threads) {
  const int64_t JD = d.J * d.D, pairs = d.J * BLOCK;
  const EmPlan plan(d, grid, Gaussians::vectors(d) + d.I, 1);
  const int64_t own_size = BLOCK * (d.poses + 2) + pairs * (d.D + 1) + grid.K * grid.K + d.J +
                           Moments::vectors(d) + 2 * d.D;
  const Buffer<vf> own(threads * own_size);
  const Buffer<vf> slots((grid.shared ? plan.groups : threads) * Gaussians::vectors(d));
  const Buffer<float> weight(d.I * d.J * d.products), sums(grid.shared ? plan.rows * d.I : 0);
  if (!own.values || !slots.values || !weight.values || !sums.values) return false;

  in_parallel(threads, [&](int rank, int size) {
    const Team team{rank, size};
    vf *u = own.values + rank * own_size, *a = u + BLOCK * d.poses, *log_sum = a + BLOCK;
    vf *votes = log_sum + BLOCK, *R = votes + pairs * d.D;
    vf *shares = R + pairs, *scratch = shares + grid.K * grid.K;
    const Moments moments(scratch + d.J, d);
    vf *mean = moments.mass + Moments::vectors(d), *variance = mean + d.D;
    pack_weight(in.weight, weight.values, d.I * rank / size, d.I * (rank + 1) / size, d);
    team.barrier();

    const InputBlocks<T, S> blocks{in, weight.values, u, a, d};
    const auto make_votes = [&](int64_t j, int64_t count, const float* W) {
      for (int64_t k = 0; k < count; k++)
        make_vote(u + k * d.poses, W + (k * d.J + j) * d.products, votes + (j * BLOCK + k) * d.D, d);
    };
    const auto find_densities = [&](int64_t count, const float* W, const Gaussians& g) {
      for (int64_t j = 0; j < d.J; j++) {
        make_votes(j, count, W);
        for (int64_t k = 0; k < count; k++)
          R[j * BLOCK + k] =
              log_density(votes + (j * BLOCK + k) * d.D, g.mean + j * d.D, g.inverse + j * d.D, g.height[j], d);
      }
    };

    // A walk that leaves log Σ_j e^l, where rows share inputs.
    const auto leave_sums = [&](const Group& group, float* out, const Gaussians& g) {
      blocks.each(group, [&](int64_t i, int64_t count, const float* W) {
        find_densities(count, W, g);
        softmax(R, count, log_sum, d);
        from_lanes(log_sum, d.I, group.rows, count, out + i);
      });
    };
    // A walk that finds the moments of the next Gaussians.
    const auto find_moments = [&](const Group& group, int64_t t, const float* all_sums, const Gaussians& g) {
      if (t == 0) first_assignment(group, grid, shares, d);
      const bool keep = assignment && t == d.iterations - 1;
      clear(moments.mass, Moments::vectors(d));
      blocks.each(group, [&](int64_t i, int64_t count, const float* W) {
        if (t == 0) {
          for (int64_t j = 0; j < d.J; j++) {
            make_votes(j, count, W);
            for (int64_t k = 0; k < count; k++) R[j * BLOCK + k] = shares[(i + k) / grid.C];
          }
        } else {
          find_densities(count, W, g);
          if (all_sums) {
            to_lanes(all_sums + i, d.I, group.rows, count, log_sum);
            softmax_with(log_sum, R, count, d);
          } else {
            softmax(R, count, log_sum, d);
          }
        }
        if (keep) put_assignment(R, group, i, count, assignment, scratch, d);
        for (int64_t j = 0; j < d.J; j++) {
          vf* c = R + j * BLOCK;
          for (int64_t k = 0; k < count; k++) c[k] *= a[k];
          add_moments(votes + j * BLOCK * d.D, c, count, moments.mass[j], moments.mean + j * d.D,
                      moments.second + j * d.D, d);
        }
      });
    };
    // The M-step. The Gaussians become the next ones.
    const auto fit = [&](const Group& group, int64_t t, const Gaussians& g) {
      const int64_t row = t * d.B + group.first;
      from_lanes(moments.mass, d.J, group.rows, d.J, states.mass + row * d.J);
      for (int64_t j = 0; j < d.J; j++) {
        const vf mass = moments.mass[j], inverse = inverse_mass(mass);
        for (int64_t h = 0; h < d.D; h++) {
          const int64_t e = j * d.D + h;
          mean[h] = mass <= NO_MASS ? vf{} : moments.mean[e];
          variance[h] = moments.second[e] * inverse;
        }
        from_lanes(mean, JD, group.rows, d.D, states.mean + row * JD + j * d.D);
        from_lanes(variance, JD, group.rows, d.D, states.variance + row * JD + j * d.D);
        const vf width = log_width(variance, d);
        const vf z = logit(t, mass, cost(width, in.beta_u[j], d), in.beta_a[j], d);
        describe(mean, variance, z, width, g, j, d);
        scratch[j] = z;
      }
      if (t < d.iterations - 1) return;
      from_lanes(g.mean, JD, group.rows, JD, v + group.first * JD);
      from_lanes(scratch, d.J, group.rows, d.J, logits + group.first * d.J);
    };

    for (int64_t first = 0; first < d.B; first += plan.rows) {
      const int64_t rows = std::min(plan.rows, d.B - first), groups = (rows + L - 1) / L;
      const auto route = [&](int64_t from, int64_t to) {
        const auto each_group = [&](const auto& visit) {
          for (int64_t k = from; k < to; k++) {
            const Gaussians g(slots.values + (grid.shared ? k : rank) * Gaussians::vectors(d), d);
            visit(Group(k, first, rows), grid.shared ? sums.values + k * L * d.I : nullptr, g);
          }
        };
        for (int64_t t = 0; t < d.iterations; t++) {
          if (t > 0 && grid.shared) {
            each_group(leave_sums);
            team.barrier();
            share(sums.values, nullptr, rows / grid.positions(), grid, d.I, team);
            team.barrier();
          }
          each_group([&](const Group& group, float* all_sums, const Gaussians& g) {
            find_moments(group, t, all_sums, g);
            fit(group, t, g);
          });
        }
      };
      const int64_t from = groups * rank / size, to = groups * (rank + 1) / size;
      if (grid.shared)
        route(from, to);
      else
        for (int64_t k = from; k < to; k++) route(k, k + 1);
    }
  });
  return true;
}

}  // namespace
