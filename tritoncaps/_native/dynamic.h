// fused_dynamic_routing, and without a weight dynamic_routing: r iterations of
//
//     c = softmax_j(prior + û·V⁽ᵗ⁻¹⁾),  s⁽ᵗ⁾ = Σ_i c û + pose_bias,  V⁽ᵗ⁾ = V⁽ᵗ⁻¹⁾ + squash(s⁽ᵗ⁾)
//
// from V⁽⁰⁾ = 0. All s⁽ᵗ⁾ are kept for the backward, (r, B, J, D). It walks the iterations from the
// last to the first, with g = dv at first:
//
//     ds = squash'(s⁽ᵗ⁾)·g,  dc = û·ds (+ grad_coupling),  db = softmax'(c)·dc
//     dû += c ds + db V⁽ᵗ⁻¹⁾,  dprior += db,  dpose_bias += ds
//     g = Σ_i db û, plus g from the second step on: s⁽ᵗ⁾ acts through all later V
//
// Without a prior, the first iteration has the uniform c, and no gradient passes through it. With
// gradient="last", dû is c⁽ʳ⁾ ds⁽ʳ⁾ alone.
#pragma once

#include "gradients.h"
#include "squash.h"

namespace {

template <class T> struct DynamicInputs {
  const T *u, *w;
  const float *prior, *pose_bias;  // or null
  bool squashed;                   // the result is v, not s
};

template <class T>
bool dynamic_forward(const DynamicInputs<T>& in, const Sizes& d, T* v, float* sums, T* last_coupling, int threads) {
  const Plan plan(d, d.B, threads, FORWARD_CACHE);
  const int64_t group = plan.images * d.NV;
  const Workspace<T> workspace(d, plan, threads, 2 * group + 2 * d.NV + d.J);
  if (!workspace.allocated()) return false;
  in_parallel(threads, [&](int rank, int size) {
    const Team team = plan.together ? Team{rank, size} : Team{0, 1};
    Votes<T> votes = workspace.votes(in.u, in.w, rank, team);
    vf *s = workspace.own(rank), *V = s + group, *out = V + group, *bias = out + d.NV, *c = bias + d.NV;
    if (in.pose_bias) pad(in.pose_bias, bias, d);
    each_group(d.B, plan, rank, size, [&](int64_t first, int64_t n) {
      votes.start(first, n);
      for (int64_t t = 0; t < d.iterations; t++) {
        const bool last = t == d.iterations - 1;
        T* keep = last && last_coupling ? last_coupling + first * d.I * d.J : nullptr;
        if (t == 0 && !in.prior) {
          votes.visit_blocks(s, [&](int64_t, int64_t, const vf* block, vf* sum) { add_rows(block, sum, d); });
          for (int64_t k = 0; k < n * d.NV; k++) s[k] *= d.uniform();
          if (keep && team.rank == 0)
            for (int64_t k = 0; k < n * d.I * d.J; k++) put(keep[k], d.uniform());
        } else {
          votes.visit_blocks(s, [&](int64_t k, int64_t m, const vf* block, vf* sum) {
            coupling(block, t ? V + m * d.NV : nullptr, in.prior, k, c, d);
            add_weighted(block, c, d.rows(k), sum, d);
            if (keep) put_pairs(c, k, keep + m * d.I * d.J, d);
          });
        }
        for (int64_t m = 0; m < n; m++) {
          vf *sm = s + m * d.NV, *Vm = V + m * d.NV;
          if (in.pose_bias)
            for (int64_t k = 0; k < d.NV; k++) sm[k] += bias[k];
          if (team.rank == 0) unpad(sm, sums + (t * d.B + first + m) * d.J * d.D, d);
          if (last && !in.squashed)
            memcpy(static_cast<void*>(out), sm, d.NV * sizeof(vf));
          else
            squash(sm, out, d);
          if (last && team.rank == 0) unpad(out, v + (first + m) * d.J * d.D, d);
          for (int64_t k = 0; k < d.NV; k++) Vm[k] = t ? Vm[k] + out[k] : out[k];
        }
      }
    });
  });
  return true;
}

template <class T> struct DynamicGradients {
  T* u;
  float *w, *prior, *pose_bias;  // the last two or null
};

template <class T>
bool dynamic_backward(const DynamicInputs<T>& in, const Sizes& d, const float* grad_v, const float* grad_coupling,
                      const float* sums, bool full, const DynamicGradients<T>& out, int threads) {
  const int64_t r = d.iterations, JD = d.J * d.D;
  const bool uniform = !in.prior && (full || r == 1);  // the walk reaches the first iteration
  const int64_t products = !full ? !uniform : 2 * r - (in.prior ? 1 : 2);
  const Terms terms(d, products, uniform, full && in.prior ? 2 * r : products);
  const Plan plan(d, terms.round, threads, BACKWARD_CACHE);
  const int64_t group = plan.images * d.NV;
  const Workspace<T> workspace(d, plan, threads,
                               (r + 3) * group + 2 * d.NV + 2 * d.J + contract_scratch(d));
  const Buffer<vf> all_ds(in.pose_bias ? terms.round * d.NV : 0), pose_bias(in.pose_bias ? d.NV : 0);
  if (!terms.allocated() || !workspace.allocated() || !all_ds.values || !pose_bias.values) return false;

  // The factors of images [first, first + n), which are `image`, ... of the round.
  const auto walk = [&](Votes<T>& votes, Team team, vf* own, int64_t first, int64_t image, int64_t n) {
    vf *V = own, *g = V + r * group, *ds = g + group, *share = ds + group;
    vf *s = share + group, *v = s + d.NV, *c = v + d.NV, *dc = c + d.J;
    const auto read_sum = [&](int64_t t, int64_t m) { pad(sums + (t * d.B + first + m) * JD, s, d); };
    for (int64_t m = 0; m < n; m++) {
      pad(grad_v + (first + m) * JD, g + m * d.NV, d);
      for (int64_t t = 0; t + 1 < r; t++) {  // V⁽ᵗ⁾ is at V + t·group
        const vf* before = V + t * group + m * d.NV;
        vf* after = V + (t + 1) * group + m * d.NV;
        read_sum(t, m);
        squash(s, v, d);
        for (int64_t k = 0; k < d.NV; k++) after[k] = t ? before[k] + v[k] : v[k];
      }
    }
    votes.start(first, n);
    int64_t term = 0;
    for (int64_t t = r - 1; t >= 0; t--) {
      const bool last = t == r - 1, plain = t == 0 && !in.prior;
      for (int64_t m = 0; m < n; m++) {
        vf *gm = g + m * d.NV, *dm = ds + m * d.NV;
        read_sum(t, m);
        if (in.squashed || !last)
          squash_gradient(gm, s, dm, d);
        else
          memcpy(static_cast<void*>(dm), gm, d.NV * sizeof(vf));
        if (team.rank != 0) continue;
        vf *x = terms.vector(image + m, term), *total = all_ds.values + (image + m) * d.NV;
        for (int64_t k = 0; k < d.NV; k++) x[k] = plain ? dm[k] * d.uniform() : dm[k];
        if (in.pose_bias)
          for (int64_t k = 0; k < d.NV; k++) total[k] = last ? dm[k] : total[k] + dm[k];
        if (t && full) {
          void* before = terms.vector(image + m, term + 1);
          memcpy(before, V + t * group + m * d.NV, d.NV * sizeof(vf));
        }
      }
      if (plain) return;
      votes.visit_blocks(t && full ? share : nullptr, [&](int64_t k, int64_t m, const vf* block, vf* sum) {
        coupling(block, t ? V + t * group + m * d.NV : nullptr, in.prior, k, c, d);
        memcpy(static_cast<void*>(terms.coefficient(image + m, term, k)), c, d.J * sizeof(vf));
        if (!full) return;
        agreements(block, ds + m * d.NV, dc, d);
        if (last && grad_coupling) add_pairs(dc, k, grad_coupling + (first + m) * d.I * d.J, d);
        vf* db = terms.coefficient(image + m, term + 1, k);
        coupling_gradient(c, dc, db, d);
        if (t) add_weighted(block, db, d.rows(k), sum, d);
      });
      if (!full) return;
      term += 2;
      if (t)
        for (int64_t k = 0; k < n * d.NV; k++) g[k] = last ? share[k] : g[k] + share[k];
    }
  };

  in_parallel(threads, [&](int rank, int size) {
    const Team team = plan.together ? Team{rank, size} : Team{0, 1}, all{rank, size};
    Votes<T> votes = workspace.votes(in.u, in.w, rank, team);
    vf* own = workspace.own(rank);
    for (int64_t first = 0; first < d.B; first += terms.round) {
      const int64_t n = std::min(terms.round, d.B - first);
      each_group(n, plan, rank, size, [&](int64_t image, int64_t some) {
        walk(votes, team, own, first + image, image, some);
      });
      all.barrier();
      each_piece(d, rank, size, [&](int64_t i, int64_t end) {
        contract(in.u, in.w, i, end, first, n, terms, out.u, out.w, workspace.rows(rank), own);
      });
      if (out.prior)
        for (int64_t k = d.blocks * rank / size; k < d.blocks * (rank + 1) / size; k++)
          add_coefficients(terms, 1, 2, k, n, first == 0, out.prior, own);
      if (in.pose_bias)
        for (int64_t k = d.NV * rank / size; k < d.NV * (rank + 1) / size; k++) {
          vf total = first ? pose_bias.values[k] : vf{};
          for (int64_t from = 0; from < n; from += 64) {  // runs keep the roundings of many images few
            vf run = {};
            for (int64_t m = from; m < std::min<int64_t>(from + 64, n); m++) run += all_ds.values[m * d.NV + k];
            total += run;
          }
          pose_bias.values[k] = total;
        }
      all.barrier();
    }
  });
  if (in.pose_bias) unpad(pose_bias.values, out.pose_bias, d);
  return true;
}

}  // namespace
