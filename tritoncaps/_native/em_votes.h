// Votes V_ij = M_i W_ij of a group of rows, and what is summed from them.
//
// A vote is (R, Q) vectors, one lane a row, its input capsule (R, P) vectors, the weight (P, Q)
// numbers. Products of them are made in tiles that fit 16 registers.
#pragma once

#include <type_traits>

#include "em_sizes.h"

namespace {

// Input capsules at a time. Sums over i are loaded and stored once a block.
constexpr int BLOCK = 4;

// Calls tile(m, n, M, N) for the M×N tiles at (m, n) of a matrix.
template <int M, class Tile> inline void row_of_tiles(int64_t m, int64_t columns, const Tile& tile) {
  const int64_t even = columns - columns % 2;
  for (int64_t n = 0; n < even; n += 2)
    tile(m, n, std::integral_constant<int, M>(), std::integral_constant<int, 2>());
  if (even < columns) tile(m, even, std::integral_constant<int, M>(), std::integral_constant<int, 1>());
}
template <class Tile> inline void each_tile(int64_t rows, int64_t columns, const Tile& tile) {
  const int64_t whole = rows - rows % 4;
  for (int64_t m = 0; m < whole; m += 4) row_of_tiles<4>(m, columns, tile);
  for (int64_t m = whole; m < rows; m++) row_of_tiles<1>(m, columns, tile);
}

// sum (M, N) += u_i W_ij of a tile at (r, q).
template <int M, int N, class S>
inline void add_product(const vf* u, const float* w, int64_t r, int64_t q, vf (&sum)[M][N], const S& d) {
  for (int64_t p = 0; p < d.P; p++)
    for (int n = 0; n < N; n++) {
      const vf y = splat(w[p * d.Q + q + n]);
      for (int m = 0; m < M; m++) sum[m][n] += u[(r + m) * d.P + p] * y;
    }
}

// x = V − mean.
template <class S> inline void deviations(const vf* u, const float* w, const vf* mean, vf* x, const S& d) {
  each_tile(d.R, d.Q, [&](int64_t r, int64_t q, auto M, auto N) {
    vf sum[M()][N()];
    for (int m = 0; m < M(); m++)
      for (int n = 0; n < N(); n++) sum[m][n] = -mean[(r + m) * d.Q + q + n];
    add_product(u, w, r, q, sum, d);
    for (int m = 0; m < M(); m++)
      for (int n = 0; n < N(); n++) x[(r + m) * d.Q + q + n] = sum[m][n];
  });
}

// total += Σ u_i W_ij, over `count` input capsules whose weights are `stride` apart.
template <class S>
inline void add_votes(const vf* u, const float* w, int64_t stride, int64_t count, vf* total, const S& d) {
  each_tile(d.R, d.Q, [&](int64_t r, int64_t q, auto M, auto N) {
    vf sum[M()][N()] = {};
    for (int64_t i = 0; i < count; i++) add_product(u + i * d.poses, w + i * stride, r, q, sum, d);
    for (int m = 0; m < M(); m++)
      for (int n = 0; n < N(); n++) total[(r + m) * d.Q + q + n] += sum[m][n];
  });
}

// du_i += Σ_j dV_ij W_ijᵀ, where the gradients of votes are `stride` vectors apart.
template <class S> inline void add_pose_gradient(const vf* grad, int64_t stride, const float* w, vf* total, const S& d) {
  each_tile(d.R, d.P, [&](int64_t r, int64_t p, auto M, auto N) {
    vf sum[M()][N()] = {};
    for (int64_t j = 0; j < d.J; j++)
      for (int64_t q = 0; q < d.Q; q++)
        for (int n = 0; n < N(); n++) {
          const vf y = splat(w[j * d.products + (p + n) * d.Q + q]);
          for (int m = 0; m < M(); m++) sum[m][n] += grad[j * stride + (r + m) * d.Q + q] * y;
        }
    for (int m = 0; m < M(); m++)
      for (int n = 0; n < N(); n++) total[(r + m) * d.P + p + n] += sum[m][n];
  });
}

// dW_ij += Σ over the rows of M_iᵀ dV_ij. Scratch: (P, Q) vectors and LANES.
template <class S> inline void add_weight_gradient(const vf* u, const vf* grad, float* total, vf* scratch, const S& d) {
  each_tile(d.P, d.Q, [&](int64_t p, int64_t q, auto M, auto N) {
    vf sum[M()][N()] = {};
    for (int64_t r = 0; r < d.R; r++)
      for (int n = 0; n < N(); n++) {
        const vf y = grad[r * d.Q + q + n];
        for (int m = 0; m < M(); m++) sum[m][n] += u[r * d.P + p + m] * y;
      }
    for (int m = 0; m < M(); m++)
      for (int n = 0; n < N(); n++) scratch[(p + m) * d.Q + q + n] = sum[m][n];
  });
  clear(scratch + d.products, L);
  for (int64_t e = 0; e < d.products; e += L) store(total + e, load(total + e) + reduce(scratch + e));
}

}  // namespace
