// Prediction vectors û_ij = u_i W_ij of a few images, in cache, and products with them.
//
// The padding of W is 0, and so is that of û. If u_i is infinite or NaN, the padding of û_ij becomes
// NaN, but then all of û_ij is infinite or NaN itself.
#pragma once

#include "sizes.h"

namespace {

// Calls use(W_i), (P, NV) vectors of T or of float: in place, or in the buffer if they need padding.
template <class T, class Use>
inline void with_weight(const T* w, int64_t i, vf* buffer, const Sizes& d, const Use& use) {
  const T* x = w + i * d.P * d.J * d.D;
  if (!d.padded()) return use(x);
  for (int64_t p = 0; p < d.P; p++) pad(x + p * d.J * d.D, buffer + p * d.NV, d);
  use(static_cast<const float*>(floats(buffer)));
}

// The weight is read once, in order: ask for what comes two input capsules later.
template <class T> inline void prefetch_weight(const T* w, int64_t i, const Sizes& d) {
  if (i + 2 >= d.I) return;
  const int64_t bytes = d.P * d.J * d.D * int64_t(sizeof(T));
  const char* x = reinterpret_cast<const char*>(w) + (i + 2) * bytes;
  for (int64_t k = 0; k < std::min<int64_t>(bytes, 1 << 16); k += 64) __builtin_prefetch(x + k);
}

// û of N images and one input capsule: V vectors from `v` on.
template <int N, int V, class T>
inline void votes_tile(const T* W, const float* x, int64_t v, vf* out, int64_t stride, const Sizes& d) {
  vf a[N][V];
  for (int n = 0; n < N; n++)
    for (int k = 0; k < V; k++) a[n][k] = vf{};
  for (int64_t p = 0; p < d.P; p++) {
    vf y[V];
    for (int k = 0; k < V; k++) y[k] = load(W + (p * d.NV + v + k) * L);
    for (int n = 0; n < N; n++)
      for (int k = 0; k < V; k++) a[n][k] += y[k] * x[n * d.P + p];
  }
  for (int n = 0; n < N; n++)
    for (int k = 0; k < V; k++) out[n * stride + v + k] = a[n][k];
}
template <int N, class T> inline void votes(const T* W, const float* x, vf* out, int64_t stride, const Sizes& d) {
  constexpr int V = N == 4 ? 2 : 5;  // the tile fits 16 registers
  int64_t v = 0;
  for (; v + V <= d.NV; v += V) votes_tile<N, V>(W, x, v, out, stride, d);
  for (; v < d.NV; v++) votes_tile<N, 1>(W, x, v, out, stride, d);
}

// The same as `predict`, where u is û.
template <class T> void copy(const T* u, int64_t n, int64_t k, vf* out, int64_t stride, const Sizes& d) {
  for (int64_t m = 0; m < n; m++) {
    const int64_t rows = d.rows(k);
    for (int64_t i = 0; i < rows; i++) pad(u + (m * d.I + k * L + i) * d.row, out + m * stride + i * d.NV, d);
    clear(out + m * stride + rows * d.NV, (L - rows) * d.NV);
  }
}

// û of n images and block k: image m's is at out + m·stride, (L, NV). Rows beyond the last input
// capsule are 0. Scratch: `rows` (P, NV), `x` (n, P).
template <class T>
void predict(const T* u, const T* w, int64_t n, int64_t k, vf* out, int64_t stride, vf* rows, float* x,
             const Sizes& d) {
  if (d.P == 0) return copy(u, n, k, out, stride, d);
  for (int64_t i = k * L; i < (k + 1) * L; i++, out += d.NV) {
    if (i >= d.I) {
      for (int64_t m = 0; m < n; m++) clear(out + m * stride, d.NV);
      continue;
    }
    prefetch_weight(w, i, d);
    for (int64_t m = 0; m < n; m++)
      for (int64_t p = 0; p < d.P; p++) x[m * d.P + p] = raise(u[(m * d.I + i) * d.P + p]);
    with_weight(w, i, rows, d, [&](const auto* W) {
      int64_t m = 0;
      for (; m + 4 <= n; m += 4) votes<4>(W, x + m * d.P, out + m * stride, stride, d);
      for (; m < n; m++) votes<1>(W, x + m * d.P, out + m * stride, stride, d);
    });
  }
}

// Of one block: lane i of out[j] = û_ij · x_j. Asks for the block that comes next in memory.
inline void agreements(const vf* u_hat, const vf* x, vf* out, const Sizes& d) {
  for (int64_t j = 0; j < d.J; j++) {
    vf a[L];
    const vf* y = u_hat + j * d.Dv;
    for (int i = 0; i < L; i++) __builtin_prefetch(y + (L + i) * d.NV);
    for (int i = 0; i < L; i++) a[i] = y[i * d.NV] * x[j * d.Dv];
    for (int64_t k = 1; k < d.Dv; k++)
      for (int i = 0; i < L; i++) a[i] += y[i * d.NV + k] * x[j * d.Dv + k];
    out[j] = reduce(a);
  }
}

// Of one block: s_j += Σ_i c_ij û_ij. Rows beyond the last input capsule are left out: 0·∞ is NaN.
inline void add_weighted(const vf* u_hat, const vf* c, int64_t rows, vf* s, const Sizes& d) {
  for (int64_t j = 0; j < d.J; j++) {
    const float* cj = floats(c + j);
    for (int64_t k = 0; k < d.Dv; k++) {
      vf a = {}, b = {};
      const vf* y = u_hat + j * d.Dv + k;
      if (rows == L) {
        for (int i = 0; i < L; i += 2) {
          a += y[i * d.NV] * cj[i];
          b += y[(i + 1) * d.NV] * cj[i + 1];
        }
      } else {
        for (int64_t i = 0; i < rows; i++) a += y[i * d.NV] * cj[i];
      }
      s[j * d.Dv + k] += a + b;
    }
  }
}

// Of one block: s += Σ_i û_i.
inline void add_rows(const vf* u_hat, vf* s, const Sizes& d) {
  for (int64_t v = 0; v < d.NV; v++) {
    vf a = {};
    for (int i = 0; i < L; i++) a += u_hat[i * d.NV + v];
    s[v] += a;
  }
}

// Adds values of pairs, (I, J), to one block, or writes a block to them.
template <class T> inline void add_pairs(vf* block, int64_t k, const T* pairs, const Sizes& d) {
  for (int64_t i = 0; i < d.rows(k); i++)
    for (int64_t j = 0; j < d.J; j++) floats(block + j)[i] += raise(pairs[(k * L + i) * d.J + j]);
}
template <class T> inline void put_pairs(const vf* block, int64_t k, T* pairs, const Sizes& d) {
  for (int64_t i = 0; i < d.rows(k); i++)
    for (int64_t j = 0; j < d.J; j++) put(pairs[(k * L + i) * d.J + j], floats(block + j)[i]);
}

// c = softmax_j(û·pose + prior) of block k. Null: no pose, no prior. Leaky: one more class, logit 0.
inline void coupling(const vf* u_hat, const vf* pose, const float* prior, int64_t k, vf* c, const Sizes& d) {
  if (pose)
    agreements(u_hat, pose, c, d);
  else
    clear(c, d.J);
  if (prior) add_pairs(c, k, prior, d);
  vf top = d.leaky ? vf{} : c[0], total = {};
  for (int64_t j = 0; j < d.J; j++) top = larger(c[j], top);
  if (d.leaky) total = exp_of_negative(-top);
  for (int64_t j = 0; j < d.J; j++) total += c[j] = exp_of_negative(c[j] - top);
  total = 1.f / total;
  for (int64_t j = 0; j < d.J; j++) c[j] *= total;
}

// db = c (dc − Σ_j c dc), the gradient of the softmax.
inline void coupling_gradient(const vf* c, const vf* grad_c, vf* grad_b, const Sizes& d) {
  vf total = {};
  for (int64_t j = 0; j < d.J; j++) total += c[j] * grad_c[j];
  for (int64_t j = 0; j < d.J; j++) grad_b[j] = c[j] * (grad_c[j] - total);
}

// A thread's way through the prediction vectors of a group, and the sums over i.
template <class T> class Votes {
 public:
  Votes(const T* u, const T* w, const Sizes& d, const Plan& plan, Team team, vf* u_hat, vf* rows, float* x, vf* partial)
      : u_(u), w_(w), d_(d), plan_(plan), team_(team), u_hat_(u_hat), rows_(rows), x_(x), partial_(partial) {}

  void start(int64_t first, int64_t n) { first_ = first, n_ = n, made_ = false; }

  // Calls visit(k, m, block, sum) for the blocks k of this thread and each image m of the group,
  // and adds up the sums, (NV), to `total`, (n, NV), the same in each thread. `total` may be null.
  template <class Visit> void visit_blocks(vf* total, const Visit& visit) {
    const int64_t last = plan_.slabs * (team_.rank + 1) / team_.size;
    for (int64_t s = plan_.slabs * team_.rank / team_.size; s < last; s++) {
      vf* sum = partial(s);
      clear(sum, n_ * d_.NV);
      const int64_t from = plan_.start(s, d_), to = plan_.start(s + 1, d_);
      if (made_ && plan_.kept)  // image by image: memory in order
        for (int64_t m = 0; m < n_; m++)
          for (int64_t k = from; k < to; k++) visit(k, m, u_hat_ + m * plan_.stride + k * L * d_.NV, sum + m * d_.NV);
      else
        for (int64_t k = from; k < to; k++) {
          vf* block = u_hat_ + (plan_.kept ? k * L * d_.NV : 0);
          predict(u_ + first_ * d_.I * d_.row, w_, n_, k, block, plan_.stride, rows_, x_, d_);
          for (int64_t m = 0; m < n_; m++) visit(k, m, block + m * plan_.stride, sum + m * d_.NV);
        }
    }
    made_ = true;
    if (total) add_up(total);
  }

 private:
  // A slab's sums have one place, whatever the group: only the thread of the slab writes there.
  vf* partial(int64_t slab) const { return partial_ + (turn_ * plan_.slabs + slab) * plan_.images * d_.NV; }

  // Two buffers in turn: a thread may write the next sums while another still reads these.
  void add_up(vf* total) {
    team_.barrier();
    memcpy(static_cast<void*>(total), partial(0), n_ * d_.NV * sizeof(vf));
    for (int64_t s = 1; s < plan_.slabs; s++)
      for (int64_t k = 0; k < n_ * d_.NV; k++) total[k] += partial(s)[k];
    turn_ ^= 1;
  }

  const T *u_, *w_;
  const Sizes& d_;
  const Plan& plan_;
  const Team team_;
  vf *u_hat_, *rows_;
  float* x_;
  vf* partial_;
  int64_t first_ = 0, n_ = 0;
  int turn_ = 0;
  bool made_ = false;
};

// The memory of `Votes` for all threads, and `own` vectors more for each thread.
template <class T> class Workspace {
 public:
  Workspace(const Sizes& d, const Plan& plan, int threads, int64_t own)
      : d_(d), plan_(plan), own_size_(own), u_hats_(plan.together && plan.kept ? 1 : threads),
        partials_(plan.together ? 1 : threads), u_hat_(u_hats_ * plan.images * plan.stride),
        partial_(partials_ * partial_size()), rows_(threads * d.P * d.NV), own_(threads * own),
        x_(threads * plan.images * d.P) {}

  bool allocated() const {
    return u_hat_.values && partial_.values && rows_.values && own_.values && x_.values;
  }
  Votes<T> votes(const T* u, const T* w, int rank, Team team) const {
    return {u, w, d_, plan_, team, u_hat_.values + rank % u_hats_ * plan_.images * plan_.stride,
            rows(rank), x_.values + rank * plan_.images * d_.P,
            partial_.values + rank % partials_ * partial_size()};
  }
  vf* rows(int rank) const { return rows_.values + rank * d_.P * d_.NV; }
  vf* own(int rank) const { return own_.values + rank * own_size_; }

 private:
  int64_t partial_size() const { return 2 * plan_.slabs * plan_.images * d_.NV; }

  const Sizes& d_;
  const Plan& plan_;
  int64_t own_size_, u_hats_, partials_;
  Buffer<vf> u_hat_, partial_, rows_, own_;
  Buffer<float> x_;
};

// Calls work(first image, images) for the groups of a thread among `images` images.
template <class Work> void each_group(int64_t images, const Plan& plan, int rank, int size, const Work& work) {
  const int64_t groups = (images + plan.images - 1) / plan.images;
  for (int64_t g = plan.together ? 0 : rank; g < groups; g += plan.together ? 1 : size)
    work(g * plan.images, std::min(plan.images, images - g * plan.images));
}

}  // namespace
