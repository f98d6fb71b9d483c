// From the gradient of û to those of u, W and of values of pairs.
//
// dû_ij is a sum of products: Σ_t a⁽ᵗ⁾_ij x⁽ᵗ⁾_j, a coefficient of each pair times a vector of each
// output capsule. A first walk, image by image, leaves both factors (`Terms`). A second walk, input
// capsule by input capsule, multiplies them for eight images at a time, and contracts dû at once:
//
//     du_i = Σ_j W_ij dû_ij,   dW_ij = Σ_b u_i ⊗ dû_ij
//
// So dû is never in memory, and every sum over the batch runs in the order of the images, whatever
// the number of threads. Where u is û itself, the second walk writes dû.
#pragma once

#include "votes.h"

namespace {

// The factors of a round of images: as many as have coefficients of 6 MB or a quarter of the weight.
// Each round reads the weight and its gradient once more.
struct Terms {
  const Sizes& d;
  int64_t products;  // terms of dû with a coefficient for each pair
  bool uniform;      // one vector more, without a coefficient
  int64_t stored;    // coefficients kept: those of the products, and some to be summed only
  int64_t round;     // images
  Buffer<vf> coefficients, vectors;

  Terms(const Sizes& d, int64_t products, bool uniform, int64_t stored)
      : d(d), products(products), uniform(uniform), stored(stored), round(images(d, stored)),
        coefficients(round * stored * d.blocks * d.J), vectors(round * (products + uniform) * d.NV) {}

  bool allocated() const { return coefficients.values && vectors.values; }
  vf* coefficient(int64_t image, int64_t term, int64_t block) const {
    return coefficients.values + ((image * stored + term) * d.blocks + block) * d.J;
  }
  vf* vector(int64_t image, int64_t term) const {
    return vectors.values + (image * (products + uniform) + term) * d.NV;
  }

 private:
  static int64_t images(const Sizes& d, int64_t stored) {
    const int64_t bytes = stored * d.blocks * d.J * int64_t(sizeof(vf));
    const int64_t most = std::max(6 * MB, d.I * d.P * d.J * d.D * int64_t(sizeof(float)) / 4);
    const int64_t n = std::clamp<int64_t>(most / std::max<int64_t>(1, bytes), 1, d.B);
    return n == d.B || n < 4 ? n : n < 8 ? 4 : n - n % 8;
  }
};

constexpr int64_t SIDE_BY_SIDE = 8;  // images whose dû exist at once

// out_j = start_j + Σ_t a⁽ᵗ⁾_j x⁽ᵗ⁾_j of N terms. Null: start from 0.
template <int N>
inline void add_terms(const float* a, int64_t a_stride, const vf* x, const vf* start, vf* out, const Sizes& d) {
  for (int64_t j = 0; j < d.J; j++) {
    vf c[N];
    for (int t = 0; t < N; t++) c[t] = splat(a[t * a_stride + j * L]);
    for (int64_t k = j * d.Dv; k < (j + 1) * d.Dv; k++) {
      vf sum = start ? start[k] : vf{};
      for (int t = 0; t < N; t++) sum += x[t * d.NV + k] * c[t];
      out[k] = sum;
    }
  }
}

// dû of n images and input capsule i, (n, NV).
inline void vote_gradients(const Terms& terms, int64_t image, int64_t n, int64_t i, vf* out) {
  const Sizes& d = terms.d;
  const int64_t stride = d.blocks * d.J * L;  // between the coefficients of two terms
  for (int64_t m = image; m < image + n; m++, out += d.NV) {
    const vf* start = terms.uniform ? terms.vector(m, terms.products) : nullptr;
    if (terms.products == 0) memcpy(static_cast<void*>(out), start, d.NV * sizeof(vf));
    for (int64_t t = 0; t < terms.products; t += 4, start = out) {
      const float* a = floats(terms.coefficient(m, t, i / L)) + i % L;
      const vf* x = terms.vector(m, t);
      switch (terms.products - t) {
        case 1: add_terms<1>(a, stride, x, start, out, d); break;
        case 2: add_terms<2>(a, stride, x, start, out, d); break;
        case 3: add_terms<3>(a, stride, x, start, out, d); break;
        default: add_terms<4>(a, stride, x, start, out, d);
      }
    }
  }
}

// du before its sum over lanes: acc (n, P) vectors, Σ over the vectors of W_ip · dû. A long row is
// summed in runs, which keeps the roundings few.
template <int N, int R, class T>
inline void pose_tile(const T* W, const vf* grad, int64_t m, int64_t p, vf* acc, const Sizes& d) {
  constexpr int64_t RUN = 128;
  for (int64_t from = 0; from < d.NV; from += RUN) {
    const int64_t to = std::min(from + RUN, d.NV);
    vf a[N][R];
    for (int k = 0; k < N; k++)
      for (int e = 0; e < R; e++) a[k][e] = vf{};
    for (int64_t v = from; v < to; v++)
      for (int e = 0; e < R; e++) {
        const vf y = load(W + ((p + e) * d.NV + v) * L);
        for (int k = 0; k < N; k++) a[k][e] += y * grad[(m + k) * d.NV + v];
      }
    for (int k = 0; k < N; k++)
      for (int e = 0; e < R; e++) {
        vf& sum = acc[(m + k) * d.P + p + e];
        sum = from ? sum + a[k][e] : a[k][e];
      }
  }
}
template <int N, int R, class T>
inline void pose_rows(const T* W, const vf* grad, int64_t m, vf* acc, const Sizes& d) {
  int64_t p = 0;
  for (; p + R <= d.P; p += R) pose_tile<N, R>(W, grad, m, p, acc, d);
  for (; p < d.P; p++) pose_tile<N, 1>(W, grad, m, p, acc, d);
}
template <class T> inline void pose_gradients(const T* W, const vf* grad, int64_t n, vf* acc, const Sizes& d) {
  int64_t m = 0;
  for (; m + 4 <= n; m += 4) pose_rows<4, 2>(W, grad, m, acc, d);
  for (; m < n; m++) pose_rows<1, 8>(W, grad, m, acc, d);
}

// dW_i += Σ u_p ⊗ dû of N images. u is (P, SIDE_BY_SIDE): the images of a component side by side.
template <int N>
inline void add_weight_gradient(const vf* grad, const float* u, float* out, bool fresh, const Sizes& d) {
  for (int64_t v = 0; v < d.NV; v++) {
    vf y[N];
    for (int m = 0; m < N; m++) y[m] = grad[m * d.NV + v];
    for (int64_t p = 0; p < d.P; p++) {
      float* o = out + (p * d.NV + v) * L;
      vf a = fresh ? vf{} : load(o), b = {};
      for (int m = 0; m < N; m++) (m % 2 ? b : a) += y[m] * u[p * SIDE_BY_SIDE + m];
      store(o, a + b);
    }
  }
}

// Vectors of scratch for `contract`.
inline int64_t contract_scratch(const Sizes& d) {
  return SIDE_BY_SIDE * d.NV + SIDE_BY_SIDE * d.P + L + d.P * d.NV + 2 * (SIDE_BY_SIDE * d.P / L + 2);
}

// Of the input capsules [start, end) and the images [first, first + n), where u is û: dû.
template <class T>
void write_vote_gradients(int64_t start, int64_t end, int64_t first, int64_t n, const Terms& terms, T* out,
                          vf* grad) {
  const Sizes& d = terms.d;
  for (int64_t m = 0; m < n; m++)
    for (int64_t i = start; i < end; i++) {
      vote_gradients(terms, m, 1, i, grad);
      unpad(grad, out + ((first + m) * d.I + i) * d.row, d);
    }
}

// Of the input capsules [start, end) of a block and the images [first, first + n): du, and dW, which
// grows from round to round.
template <class T>
void contract(const T* u, const T* w, int64_t start, int64_t end, int64_t first, int64_t n, const Terms& terms,
              T* grad_u, float* grad_w, vf* rows, vf* scratch) {
  const Sizes& d = terms.d;
  const int64_t P = d.P, JD = d.J * d.D;
  if (P == 0) return write_vote_gradients(start, end, first, n, terms, grad_u, scratch);
  vf *grad = scratch, *acc = grad + SIDE_BY_SIDE * d.NV, *padded = acc + SIDE_BY_SIDE * P + L;
  float *poses = floats(padded + P * d.NV), *du = poses + (SIDE_BY_SIDE * P / L + 1) * L;
  u += first * d.I * P, grad_u += first * d.I * P;

  const auto contract_images = [&](const auto* W, int64_t i, int64_t m, int64_t some, bool fresh, float* dW) {
    for (int64_t e = 0; e < some; e++)
      for (int64_t p = 0; p < P; p++) poses[p * SIDE_BY_SIDE + e] = raise(u[((m + e) * d.I + i) * P + p]);
    vote_gradients(terms, m, some, i, grad);
    pose_gradients(W, grad, some, acc, d);
    clear(acc + some * P, L);
    for (int64_t q = 0; q < some * P; q += L) store(du + q, reduce(acc + q));
    for (int64_t e = 0; e < some; e++)
      for (int64_t p = 0; p < P; p++) put(grad_u[((m + e) * d.I + i) * P + p], du[e * P + p]);
    int64_t e = 0;
    if (some == SIDE_BY_SIDE) add_weight_gradient<SIDE_BY_SIDE>(grad, poses, dW, fresh, d), e = some;
    if (some - e >= 4) add_weight_gradient<4>(grad, poses, dW, fresh, d), e = 4;
    for (; e < some; e++) add_weight_gradient<1>(grad + e * d.NV, poses + e, dW, fresh && e == 0, d);
  };
  // A few images outside, so that their factors stay near for all rows of the block. But padding and
  // unpadding the weight again costs more.
  const int64_t step = d.padded() ? n : SIDE_BY_SIDE;
  for (int64_t from = 0; from < n; from += step)
    for (int64_t i = start; i < end; i++) {
      const int64_t to = std::min(from + step, n);
      float *dW = grad_w + i * P * JD, *sum = d.padded() ? floats(padded) : dW;
      if (d.padded() && first)
        for (int64_t p = 0; p < P; p++) pad(dW + p * JD, padded + p * d.NV, d);
      if (from == 0) prefetch_weight(w, i, d);
      with_weight(w, i, rows, d, [&](const auto* W) {
        for (int64_t m = from; m < to; m += SIDE_BY_SIDE)
          contract_images(W, i, m, std::min(SIDE_BY_SIDE, to - m), first + m == 0, sum);
      });
      if (d.padded())
        for (int64_t p = 0; p < P; p++) unpad(padded + p * d.NV, dW + p * JD, d);
    }
}

// Of block k: the sum over n images of the coefficients from, from + step, ..., added to (I, J).
inline void add_coefficients(const Terms& terms, int64_t from, int64_t step, int64_t k, int64_t n, bool fresh,
                             float* pairs, vf* total) {
  const Sizes& d = terms.d;
  clear(total, d.J);
  if (!fresh) add_pairs(total, k, pairs, d);
  for (int64_t m = 0; m < n; m++)
    for (int64_t t = from; t < terms.stored; t += step) {
      const vf* a = terms.coefficient(m, t, k);
      for (int64_t j = 0; j < d.J; j++) total[j] += a[j];
    }
  put_pairs(total, k, pairs, d);
}

}  // namespace
