// routing_pass: c̃ = softmax_j(û·pose + prior), c = c̃ + bias, s_j = Σ_i c_ij û_ij. Backward:
//
//     dc = û·ds (+ grad_coupling),  db = softmax'(c̃)·dc,  dpose_j = Σ_i db_ij û_ij
//     dprior = Σ_b db,  dbias = Σ_b dc,  dû_ij = c_ij ds_j + db_ij pose_j
#pragma once

#include "gradients.h"

namespace {

template <class T> struct PassInputs {
  const T *u, *w, *pose;
  const float *prior, *bias;  // or null
};

template <class T>
bool pass_forward(const PassInputs<T>& in, const Sizes& d, T* s, T* coupling_out, int threads) {
  const Plan plan(d, d.B, threads, FORWARD_CACHE);
  const int64_t group = plan.images * d.NV;
  const Workspace<T> workspace(d, plan, threads, 2 * group + d.J);
  if (!workspace.allocated()) return false;
  in_parallel(threads, [&](int rank, int size) {
    const Team team = plan.together ? Team{rank, size} : Team{0, 1};
    Votes<T> votes = workspace.votes(in.u, in.w, rank, team);
    vf *total = workspace.own(rank), *pose = total + group, *c = pose + group;
    each_group(d.B, plan, rank, size, [&](int64_t first, int64_t n) {
      for (int64_t m = 0; m < n; m++) pad(in.pose + (first + m) * d.J * d.D, pose + m * d.NV, d);
      votes.start(first, n);
      votes.visit_blocks(total, [&](int64_t k, int64_t m, const vf* block, vf* sum) {
        coupling(block, pose + m * d.NV, in.prior, k, c, d);
        if (in.bias) add_pairs(c, k, in.bias, d);
        add_weighted(block, c, d.rows(k), sum, d);
        if (coupling_out) put_pairs(c, k, coupling_out + (first + m) * d.I * d.J, d);
      });
      if (team.rank == 0)
        for (int64_t m = 0; m < n; m++) unpad(total + m * d.NV, s + (first + m) * d.J * d.D, d);
    });
  });
  return true;
}

template <class T> struct PassGradients {
  T *u, *pose;
  float *w, *prior, *bias;  // the last two or null
};

template <class T>
bool pass_backward(const PassInputs<T>& in, const Sizes& d, const float* grad_s, const float* grad_coupling,
                   const PassGradients<T>& out, int threads) {
  const Terms terms(d, 2, false, in.bias ? 3 : 2);  // c, db and, to be summed, dc
  const Plan plan(d, terms.round, threads, BACKWARD_CACHE);
  const int64_t group = plan.images * d.NV, JD = d.J * d.D;
  const Workspace<T> workspace(d, plan, threads, 3 * group + 2 * d.J + contract_scratch(d));
  if (!terms.allocated() || !workspace.allocated()) return false;
  in_parallel(threads, [&](int rank, int size) {
    const Team team = plan.together ? Team{rank, size} : Team{0, 1}, all{rank, size};
    Votes<T> votes = workspace.votes(in.u, in.w, rank, team);
    vf *own = workspace.own(rank), *ds = own, *pose = ds + group, *grad_pose = pose + group;
    vf *c = grad_pose + group, *dc = c + d.J;
    for (int64_t first = 0; first < d.B; first += terms.round) {
      const int64_t round = std::min(terms.round, d.B - first);
      each_group(round, plan, rank, size, [&](int64_t image, int64_t n) {
        for (int64_t m = 0; m < n; m++) {
          pad(grad_s + (first + image + m) * JD, ds + m * d.NV, d);
          pad(in.pose + (first + image + m) * JD, pose + m * d.NV, d);
          if (team.rank != 0) continue;
          memcpy(static_cast<void*>(terms.vector(image + m, 0)), ds + m * d.NV, d.NV * sizeof(vf));
          memcpy(static_cast<void*>(terms.vector(image + m, 1)), pose + m * d.NV, d.NV * sizeof(vf));
        }
        votes.start(first + image, n);
        votes.visit_blocks(grad_pose, [&](int64_t k, int64_t m, const vf* block, vf* sum) {
          vf* db = terms.coefficient(image + m, 1, k);
          coupling(block, pose + m * d.NV, in.prior, k, c, d);
          agreements(block, ds + m * d.NV, dc, d);
          if (grad_coupling) add_pairs(dc, k, grad_coupling + (first + image + m) * d.I * d.J, d);
          coupling_gradient(c, dc, db, d);
          add_weighted(block, db, d.rows(k), sum, d);
          if (in.bias) {
            add_pairs(c, k, in.bias, d);
            memcpy(static_cast<void*>(terms.coefficient(image + m, 2, k)), dc, d.J * sizeof(vf));
          }
          memcpy(static_cast<void*>(terms.coefficient(image + m, 0, k)), c, d.J * sizeof(vf));
        });
        if (team.rank == 0)
          for (int64_t m = 0; m < n; m++) unpad(grad_pose + m * d.NV, out.pose + (first + image + m) * JD, d);
      });
      all.barrier();
      each_piece(d, rank, size, [&](int64_t i, int64_t end) {
        contract(in.u, in.w, i, end, first, round, terms, out.u, out.w, workspace.rows(rank), own);
      });
      for (int64_t k = d.blocks * rank / size; k < d.blocks * (rank + 1) / size; k++) {
        if (out.prior) add_coefficients(terms, 1, 2, k, round, first == 0, out.prior, own);
        if (out.bias) add_coefficients(terms, 2, 2, k, round, first == 0, out.bias, own);
      }
      all.barrier();
    }
  });
  return true;
}

}  // namespace
