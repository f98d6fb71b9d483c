// em_routing, backward, from the last iteration to the first.
//
// Each starts from the gradients of its μ, σ² and z; of the last, gσ² is 0. With S = σ² + floor and
// N, μ, σ², z of iteration t, its M-step hands on, for each output capsule,
//
//     gN = −λ gz (D β_u + ½ Σ log S),   gσ²_h −= λ gz N / (2 S_h)
//     dβ_a += λ gz,   dβ_u −= λ gz N D
//
// and for each pair, with x = V − μ, c = a_i R,
//
//     gc = gN + Σ_h (gμ_h x_h + gσ²_h (x_h² − σ²_h)) / N,   da_i += Σ_j R gc,   gR = a_i gc
//     dV = c (gμ + 2 gσ² x) / N
//
// The E-step before it has μ′, S′ and z′ of iteration t − 1, and y = V − μ′:
//
//     gl = R (gR − δ_i),   δ_i = Σ_j R gR,   dV −= gl y / S′
//     gz′ = Σ_i gl · sigmoid(−z′),   gμ′ = Σ_i gl y / S′,   gσ²′ = ½ (Σ_i gl y² / S′² − Σ_i gl / S′)
//
// dV is contracted at once: du_i += dV Wᵀ, dW += uᵀ dV. With gradient="last", gl = 0, and the last
// iteration is the only one.
#pragma once

#include "em_forward.h"

namespace {

template <class T> struct EmGradients {
  T *poses, *activations, *weight;
  float *beta_u, *beta_a;
};

template <class T> struct EmCotangents {
  const T *v, *logits, *assignment;  // the last two or null
};

// What a group of rows keeps from one walk to the next.
template <class S> struct EmSlot {
  vf *g_mean, *g_variance, *g_logit;          // what the next M-step starts from: (J, D), (J, D), (J)
  vf *linear, *square, *constant;             // gc = constant + Σ x (linear + square x)
  vf *mean;                                   // (J, D)
  vf *opposite;                               // (J): sigmoid(−z′)
  Gaussians before;
  vf *poses, *activations;                    // (I, R, P) and (I): du and da

  static int64_t vectors(const S& d) {
    return 5 * d.J * d.D + 3 * d.J + Gaussians::vectors(d) + d.I * (d.poses + 1);
  }
  EmSlot(vf* memory, const S& d)
      : g_mean(memory), g_variance(g_mean + d.J * d.D), g_logit(g_variance + d.J * d.D), linear(g_logit + d.J),
        square(linear + d.J * d.D), constant(square + d.J * d.D), mean(constant + d.J),
        opposite(mean + d.J * d.D), before(opposite + d.J, d), poses(opposite + d.J + Gaussians::vectors(d)),
        activations(poses + d.I * d.poses) {}
};

// The gradient of c of a pair.
template <class S>
ALWAYS_INLINE vf mass_gradient(const vf* vote, const vf* mean, const vf* linear, const vf* square, vf constant,
                               const S& d) {
  return constant + sum_over_components(d, [&](int64_t h) {
           const vf x = vote[h] - mean[h];
           return x * (linear[h] + square[h] * x);
         });
}

// The votes of `count` input capsules for an output capsule become dV. Σ gl y and Σ gl y² are added
// to `first` and `second`.
template <bool through_softmax, class S>
inline void vote_gradients(vf* votes, const vf* c, const vf* gl, int64_t count, int64_t j,
                           const EmSlot<S>& slot, vf* first, vf* second, const S& d) {
  for (int64_t h = 0; h < d.D; h++) {
    const int64_t e = j * d.D + h;
    const vf mean = slot.mean[e], linear = slot.linear[e], square = 2.f * slot.square[e];
    const vf mean_before = through_softmax ? slot.before.mean[e] : vf{};
    const vf inverse = through_softmax ? slot.before.inverse[e] : vf{};
    vf a = {}, b = {};
    for (int64_t k = 0; k < count; k++) {
      vf& vote = votes[k * d.D + h];
      vf dV = c[k] * (linear + square * (vote - mean));
      if constexpr (through_softmax) {
        const vf y = vote - mean_before, gy = gl[k] * y;
        a += gy;
        b += gy * y;
        dV -= gy * inverse;
      }
      vote = dV;
    }
    if constexpr (through_softmax) first[e] += a, second[e] += b;
  }
}

template <class T, class S>
bool em_backward(const EmCotangents<T>& grad, const EmInputs<T>& in, const EmStates& states, const S& d,
                 const Grid& grid, bool full, const EmGradients<T>& out, int threads) {
  const int64_t JD = d.J * d.D, pairs = d.J * BLOCK, I = d.I;
  const int64_t products = (d.products + L - 1) / L * L;  // of a pair, in the sums of a slab
  const EmPlan plan(d, grid, EmSlot<S>::vectors(d) + 2 * I, I * d.J * products);
  const int64_t own_size = BLOCK * (d.poses + 3) + pairs * (d.D + 2) + grid.K * grid.K +
                           2 * (d.J + JD + d.D) + products + L;
  const Buffer<vf> own(threads * own_size);
  const Buffer<vf> slots((grid.shared ? plan.groups : threads) * EmSlot<S>::vectors(d));
  const Buffer<float> weight(I * d.J * d.products);
  const Buffer<float> log_sums(grid.shared ? plan.rows * I : 0), deltas(grid.shared ? plan.rows * I : 0);
  const Buffer<float> weight_sums(plan.slabs * I * d.J * products);
  const Buffer<vf> beta_sums(plan.slabs * 2 * d.J);
  if (!own.values || !slots.values || !weight.values || !log_sums.values || !deltas.values ||
      !weight_sums.values || !beta_sums.values)
    return false;

  in_parallel(threads, [&](int rank, int size) {
    const Team team{rank, size};
    vf *u = own.values + rank * own_size, *a = u + BLOCK * d.poses;
    vf *log_sum = a + BLOCK, *delta = log_sum + BLOCK;
    vf *votes = delta + BLOCK, *R = votes + pairs * d.D, *gc = R + pairs, *shares = gc + pairs;
    vf* scratch = shares + grid.K * grid.K;
    vf *sum0 = scratch + d.J, *sum1 = sum0 + d.J, *sum2 = sum1 + JD;  // Σ gl, Σ gl y, Σ gl y²
    vf *mean = sum2 + JD, *variance = mean + d.D, *product = variance + d.D;
    const int64_t first_slab = plan.slabs * rank / size, last_slab = plan.slabs * (rank + 1) / size;
    pack_weight(in.weight, weight.values, I * rank / size, I * (rank + 1) / size, d);
    memset(weight_sums.values + first_slab * I * d.J * products, 0,
           (last_slab - first_slab) * I * d.J * products * sizeof(float));
    clear(beta_sums.values + first_slab * 2 * d.J, (last_slab - first_slab) * 2 * d.J);
    team.barrier();

    const InputBlocks<T, S> blocks{in, weight.values, u, a, d};

    // Gradients with respect to rows. Lanes that repeat a row have none.
    const auto load_gradient = [&](const auto* from, int64_t stride, const Group& group, int64_t n, vf* to) {
      vi inside;
      for (int e = 0; e < L; e++) inside[e] = e < group.rows ? -1 : 0;
      to_lanes(from, stride, group.rows, n, to);
      for (int64_t k = 0; k < n; k++) to[k] = inside ? to[k] : vf{};
    };
    const auto begin = [&](const Group& group, const EmSlot<S>& slot) {
      load_gradient(grad.v + group.first * JD, JD, group, JD, slot.g_mean);
      clear(slot.g_variance, JD);
      clear(slot.g_logit, d.J);
      if (grad.logits) load_gradient(grad.logits + group.first * d.J, d.J, group, d.J, slot.g_logit);
      clear(slot.poses, I * (d.poses + 1));
    };

    // The M-step of iteration t.
    const auto leave_fit = [&](const Group& group, int64_t t, const EmSlot<S>& slot, vf* betas) {
      const float *masses = states.mass + (t * d.B + group.first) * d.J, lambda = d.temperature[t];
      const float* means = states.mean + (t * d.B + group.first) * JD;
      const float* variances = states.variance + (t * d.B + group.first) * JD;
      to_lanes(masses, d.J, group.rows, d.J, scratch);
      for (int64_t j = 0; j < d.J; j++) {
        const vf mass = scratch[j], inverse = inverse_mass(mass), gz = lambda * slot.g_logit[j];
        to_lanes(variances + j * d.D, JD, group.rows, d.D, variance);
        slot.constant[j] = -gz * cost(log_width(variance, d), in.beta_u[j], d);
        betas[j] -= gz * mass * float(d.D);
        betas[d.J + j] += gz;
        for (int64_t h = 0; h < d.D; h++) {
          const int64_t e = j * d.D + h;
          const vf g_variance = slot.g_variance[e] - gz * mass * 0.5f / (variance[h] + d.min_variance);
          slot.linear[e] = slot.g_mean[e] * inverse;
          slot.square[e] = g_variance * inverse;
          slot.constant[j] -= slot.square[e] * variance[h];
        }
        to_lanes(means + j * d.D, JD, group.rows, d.D, slot.mean + j * d.D);
      }
      if (t == 0) return first_assignment(group, grid, shares, d);
      // The Gaussians before.
      to_lanes(masses - d.B * d.J, d.J, group.rows, d.J, scratch);
      for (int64_t j = 0; j < d.J; j++) {
        to_lanes(means - d.B * JD + j * d.D, JD, group.rows, d.D, mean);
        to_lanes(variances - d.B * JD + j * d.D, JD, group.rows, d.D, variance);
        const vf width = log_width(variance, d);
        const vf z = logit(t - 1, scratch[j], cost(width, in.beta_u[j], d), in.beta_a[j], d);
        describe(mean, variance, z, width, slot.before, j, d);
        slot.opposite[j] = sigmoid_of_negative(z);
      }
    };

    // Of a block: the votes, log p, and the gradient of c.
    const auto find_pairs = [&](int64_t t, int64_t count, const float* W, const EmSlot<S>& slot) {
      for (int64_t j = 0; j < d.J; j++)
        for (int64_t k = 0; k < count; k++) {
          const int64_t e = j * d.D;
          vf* vote = votes + (j * BLOCK + k) * d.D;
          make_vote(u + k * d.poses, W + (k * d.J + j) * d.products, vote, d);
          gc[j * BLOCK + k] =
              mass_gradient(vote, slot.mean + e, slot.linear + e, slot.square + e, slot.constant[j], d);
          if (t > 0)
            R[j * BLOCK + k] =
                log_density(vote, slot.before.mean + e, slot.before.inverse + e, slot.before.height[j], d);
        }
    };
    // δ. Also adds to da, and leaves the gradient of R in gc.
    const auto find_deltas = [&](const Group& group, int64_t t, int64_t i, int64_t count, vf* da) {
      for (int64_t k = 0; k < count; k++) {
        vf g = {}, total = {};
        for (int64_t j = 0; j < d.J; j++) {
          g += R[j * BLOCK + k] * gc[j * BLOCK + k];
          gc[j * BLOCK + k] *= a[k];
        }
        if (da) da[i + k] += g;
        if (grad.assignment && full && t == d.iterations - 1) {
          load_gradient(grad.assignment + (group.first * I + i + k) * d.J, I * d.J, group, d.J, scratch);
          for (int64_t j = 0; j < d.J; j++) gc[j * BLOCK + k] += scratch[j];
        }
        for (int64_t j = 0; j < d.J; j++) total += R[j * BLOCK + k] * gc[j * BLOCK + k];
        delta[k] = total;
      }
    };

    const auto leave_sums = [&](const Group& group, int64_t t, const EmSlot<S>& slot, float* sums,
                                float* means) {
      blocks.each(group, [&](int64_t i, int64_t count, const float* W) {
        find_pairs(t, count, W, slot);
        softmax(R, count, log_sum, d);
        find_deltas(group, t, i, count, nullptr);
        from_lanes(log_sum, I, group.rows, count, sums + i);
        from_lanes(delta, I, group.rows, count, means + i);
      });
    };
    const auto add_gradients = [&](const Group& group, int64_t t, const EmSlot<S>& slot, const float* sums,
                                   const float* means, float* dW) {
      const bool through_softmax = full && t > 0;
      clear(sum0, d.J + 2 * JD);
      blocks.each(group, [&](int64_t i, int64_t count, const float* W) {
        find_pairs(t, count, W, slot);
        if (t == 0) {
          for (int64_t j = 0; j < d.J; j++)
            for (int64_t k = 0; k < count; k++) R[j * BLOCK + k] = shares[(i + k) / grid.C];
        } else if (sums) {
          to_lanes(sums + i, I, group.rows, count, log_sum);
          softmax_with(log_sum, R, count, d);
        } else {
          softmax(R, count, log_sum, d);
        }
        find_deltas(group, t, i, count, slot.activations);
        if (sums && through_softmax) load_gradient(means + i, I, group, count, delta);
        for (int64_t j = 0; j < d.J; j++) {
          vf *c = R + j * BLOCK, *gl = gc + j * BLOCK, *dV = votes + j * BLOCK * d.D;
          for (int64_t k = 0; k < count; k++) {
            if (through_softmax) sum0[j] += gl[k] = c[k] * (gl[k] - delta[k]);
            c[k] *= a[k];
          }
          const auto make_gradients = through_softmax ? vote_gradients<true, S> : vote_gradients<false, S>;
          make_gradients(dV, c, gl, count, j, slot, sum1, sum2, d);
          for (int64_t k = 0; k < count; k++)
            add_weight_gradient(u + k * d.poses, dV + k * d.D, dW + ((i + k) * d.J + j) * products, product, d);
        }
        for (int64_t k = 0; k < count; k++)
          add_pose_gradient(votes + k * d.D, BLOCK * d.D, W + k * d.J * d.products, slot.poses + (i + k) * d.poses,
                            d);
      });
      if (!through_softmax) return;
      for (int64_t j = 0; j < d.J; j++) {
        slot.g_logit[j] = sum0[j] * slot.opposite[j];
        for (int64_t e = j * d.D; e < (j + 1) * d.D; e++) {
          const vf inverse = slot.before.inverse[e];
          slot.g_mean[e] = sum1[e] * inverse;
          slot.g_variance[e] = 0.5f * (sum2[e] * inverse - sum0[j]) * inverse;
        }
      }
    };

    for (int64_t first = 0; first < d.B; first += plan.rows) {
      const int64_t rows = std::min(plan.rows, d.B - first), groups = (rows + L - 1) / L;
      const auto route = [&](int64_t from, int64_t to, int64_t slab) {
        // Calls visit(group, slot, its place among the shared numbers, slab).
        const auto each_group = [&](const auto& visit) {
          for (int64_t k = from, s = slab; k < to; k++) {
            while (k >= plan.start(s + 1, groups)) s++;
            const EmSlot<S> slot(slots.values + (grid.shared ? k : rank) * EmSlot<S>::vectors(d), d);
            visit(Group(k, first, rows), slot, k * L * I, s);
          }
        };
        each_group([&](const Group& group, const EmSlot<S>& slot, int64_t, int64_t) { begin(group, slot); });
        for (int64_t t = d.iterations - 1; t >= (full ? 0 : d.iterations - 1); t--) {
          const bool shared = grid.shared && t > 0;
          if (shared) {
            each_group([&](const Group& group, const EmSlot<S>& slot, int64_t e, int64_t s) {
              leave_fit(group, t, slot, beta_sums.values + s * 2 * d.J);
              leave_sums(group, t, slot, log_sums.values + e, deltas.values + e);
            });
            team.barrier();
            share(log_sums.values, deltas.values, rows / grid.positions(), grid, I, team);
            team.barrier();
          }
          each_group([&](const Group& group, const EmSlot<S>& slot, int64_t e, int64_t s) {
            if (!shared) leave_fit(group, t, slot, beta_sums.values + s * 2 * d.J);
            add_gradients(group, t, slot, shared ? log_sums.values + e : nullptr, deltas.values + e,
                          weight_sums.values + s * I * d.J * products);
          });
        }
        each_group([&](const Group& group, const EmSlot<S>& slot, int64_t, int64_t) {
          from_lanes(slot.poses, I * d.poses, group.rows, I * d.poses, out.poses + group.first * I * d.poses);
          from_lanes(slot.activations, I, group.rows, I, out.activations + group.first * I);
        });
      };
      if (grid.shared)
        route(plan.start(first_slab, groups), plan.start(last_slab, groups), first_slab);
      else
        for (int64_t s = first_slab; s < last_slab; s++)
          for (int64_t k = plan.start(s, groups); k < plan.start(s + 1, groups); k++) route(k, k + 1, s);
    }

    team.barrier();
    for (int64_t i = I * rank / size; i < I * (rank + 1) / size; i++)
      for (int64_t p = 0; p < d.P; p++)
        for (int64_t j = 0; j < d.J; j++)
          for (int64_t q = 0; q < d.Q; q++) {
            float sum = 0;
            for (int64_t s = 0; s < plan.slabs; s++)
              sum += weight_sums.values[((s * I + i) * d.J + j) * products + p * d.Q + q];
            put(out.weight[((i * d.P + p) * d.J + j) * d.Q + q], sum);
          }
    if (rank > 0) return;
    for (int64_t k = 0; k < 2 * d.J; k++) {
      float sum = 0;
      for (int64_t s = 0; s < plan.slabs; s++)
        for (int e = 0; e < L; e++) sum += beta_sums.values[s * 2 * d.J + k][e];
      (k < d.J ? out.beta_u[k] : out.beta_a[k - d.J]) = sum;
    }
  });
  return true;
}

}  // namespace
