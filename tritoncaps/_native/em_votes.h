// Votes V_ij = M_i W_ij of a group of rows, and what is summed from them.
//
// A vote is (R, Q) vectors, one lane a row, its input capsule (R, P) vectors, the weight (P, Q)
// numbers. Products of them are made in tiles that fit 16 registers.
#pragma once

#include <type_traits>

#include "em_sizes.h"

namespace {

// Input capsules at a time. Sums over i are loaded and stored once a block.
constexpr int BLOCK = 8;

// Keeps a vector in a register. GCC would load it anew for each product, and loads are what these
// loops wait for.
ALWAYS_INLINE vf hold(vf x) {
#if defined(__x86_64__)
  __asm__("" : "+x"(x));
#endif
  return x;
}

// Calls tile(m, n, M, N) for the M×N tiles at (m, n) of a matrix.
template <int M, class Tile> ALWAYS_INLINE void row_of_tiles(int64_t m, int64_t columns, const Tile& tile) {
  const int64_t even = columns - columns % 2;
  for (int64_t n = 0; n < even; n += 2)
    tile(m, n, std::integral_constant<int, M>(), std::integral_constant<int, 2>());
  if (even < columns) tile(m, even, std::integral_constant<int, M>(), std::integral_constant<int, 1>());
}
template <class Tile> ALWAYS_INLINE void each_tile(int64_t rows, int64_t columns, const Tile& tile) {
  const int64_t whole = rows - rows % 4;
  for (int64_t m = 0; m < whole; m += 4) row_of_tiles<4>(m, columns, tile);
  for (int64_t m = whole; m < rows; m++) row_of_tiles<1>(m, columns, tile);
}

// V = u W.
template <class S> ALWAYS_INLINE void make_vote(const vf* u, const float* w, vf* out, const S& d) {
  each_tile(d.R, d.Q, [&](int64_t r, int64_t q, auto M, auto N) {
    vf sum[M()][N()] = {};
    for (int64_t p = 0; p < d.P; p++) {
      vf y[N()];
      for (int n = 0; n < N(); n++) y[n] = splat(w[p * d.Q + q + n]);
      for (int m = 0; m < M(); m++) {
        const vf x = hold(u[(r + m) * d.P + p]);
        for (int n = 0; n < N(); n++) sum[m][n] += x * y[n];
      }
    }
    for (int m = 0; m < M(); m++)
      for (int n = 0; n < N(); n++) out[(r + m) * d.Q + q + n] = sum[m][n];
  });
}

// du_i += Σ_j dV_ij W_ijᵀ, where the gradients of votes are `stride` vectors apart.
template <class S>
ALWAYS_INLINE void add_pose_gradient(const vf* grad, int64_t stride, const float* w, vf* total, const S& d) {
  each_tile(d.R, d.P, [&](int64_t r, int64_t p, auto M, auto N) {
    vf sum[M()][N()] = {};
    for (int64_t j = 0; j < d.J; j++)
      for (int64_t q = 0; q < d.Q; q++) {
        vf y[N()];
        for (int n = 0; n < N(); n++) y[n] = splat(w[j * d.products + (p + n) * d.Q + q]);
        for (int m = 0; m < M(); m++) {
          const vf x = hold(grad[j * stride + (r + m) * d.Q + q]);
          for (int n = 0; n < N(); n++) sum[m][n] += x * y[n];
        }
      }
    for (int m = 0; m < M(); m++)
      for (int n = 0; n < N(); n++) total[(r + m) * d.P + p + n] += sum[m][n];
  });
}

// dW_ij += Σ over the rows of M_iᵀ dV_ij. Scratch: (P, Q) vectors and LANES.
template <class S>
ALWAYS_INLINE void add_weight_gradient(const vf* u, const vf* grad, float* total, vf* scratch, const S& d) {
  each_tile(d.P, d.Q, [&](int64_t p, int64_t q, auto M, auto N) {
    vf sum[M()][N()] = {};
    for (int64_t r = 0; r < d.R; r++) {
      vf y[N()];
      for (int n = 0; n < N(); n++) y[n] = grad[r * d.Q + q + n];
      for (int m = 0; m < M(); m++) {
        const vf x = hold(u[r * d.P + p + m]);
        for (int n = 0; n < N(); n++) sum[m][n] += x * y[n];
      }
    }
    for (int m = 0; m < M(); m++)
      for (int n = 0; n < N(); n++) scratch[(p + m) * d.Q + q + n] = sum[m][n];
  });
  clear(scratch + d.products, L);
  for (int64_t e = 0; e < d.products; e += L) store(total + e, load(total + e) + reduce(scratch + e));
}

}  // namespace
