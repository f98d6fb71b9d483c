// The sizes of a call, how its work is cut, and the threads that do it.
//
// Rows (J, D) are held as J·Dv vectors: the D components of an output capsule, padded by zeros to
// whole vectors. Values of pairs (i, j) are held in blocks of LANES input capsules, one vector an
// output capsule. So products with û run over d, and the softmax over j runs with i in the lanes.
//
// With P = 0 there is no weight: u is û itself, (B, I, J, D).
#pragma once

#include <algorithm>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lanes.h"

namespace {

struct Sizes {
  int64_t B, I, P, J, D, iterations;
  bool leaky;
  int64_t Dv, NV, blocks;  // vectors of D and of J·D, blocks of I
  int64_t row;             // values of u for an input capsule
  vi inside;               // of the last vector of D: −1 in the lanes that are no padding

  Sizes(const int64_t* n, bool leaky)
      : B(n[0]), I(n[1]), P(n[2]), J(n[3]), D(n[4]), iterations(n[5]), leaky(leaky),
        Dv((D + L - 1) / L), NV(J * Dv), blocks((I + L - 1) / L), row(P ? P : J * D), inside() {
    for (int64_t k = 0; k < D - (Dv - 1) * L; k++) inside[k] = -1;
  }
  bool padded() const { return D % L != 0; }
  int64_t rows(int64_t block) const { return std::min<int64_t>(L, I - block * L); }
  float uniform() const { return 1.f / float(J + leaky); }
};

// How the work is cut. The number of threads changes no bit: the sum over i of an image is always the
// sum, in order, of the sums over its slabs, which follow from the sizes.
//
// A thread works on a group of images. Their prediction vectors stay in cache for all iterations, if
// those of four images fit. If not, they are computed anew in each iteration, block by block, for
// more images at a time. A backward asks for less of the cache: there, keeping them gains less.
constexpr int64_t MB = 1 << 20, FORWARD_CACHE = 4 * MB, BACKWARD_CACHE = MB;

struct Plan {
  int64_t images;    // in a group
  int64_t slabs;     // cuts of the input capsules
  bool kept;
  bool together;     // threads share a group, each with some slabs, or each has groups of its own
  int64_t stride;    // vectors between the prediction vectors of two images

  Plan(const Sizes& d, int64_t B, int threads, int64_t cache) {
    const int64_t block = L * d.NV * int64_t(sizeof(vf)), image = d.blocks * block;
    kept = std::min<int64_t>(B, 4) * image <= cache;
    images = kept ? std::clamp<int64_t>(MB / image, 4, 64) : std::clamp<int64_t>(MB / block, 1, 16);
    slabs = std::clamp<int64_t>(d.blocks / 4, 1, 16);
    // Too few input capsules to share: as many groups as threads, of four images at least.
    if (slabs < threads) images = std::min(images, 4 * std::max<int64_t>(1, (B + 3) / 4 / threads));
    images = std::min(images, B);
    if (images > 4) images -= images % 4;
    stride = (kept ? d.blocks : 1) * L * d.NV;
    const int64_t groups = (B + images - 1) / images;
    together = groups < 2 * threads && slabs > groups;
  }
  int64_t start(int64_t slab, const Sizes& d) const { return d.blocks * slab / slabs; }
};

// The thread itself, among those that share its groups of images.
struct Team {
  int rank, size;

  void barrier() const {
#ifdef _OPENMP
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
};

// Calls work(rank, size) in each thread. One thread calls nothing of OpenMP.
template <class Work> void in_parallel(int threads, const Work& work) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  (void)threads;
  work(0, 1);
}

// Calls work(first, end) for the input capsules of a thread, cut at blocks.
template <class Work> void each_piece(const Sizes& d, int rank, int size, const Work& work) {
  const int64_t end = d.I * (rank + 1) / size;
  for (int64_t i = d.I * rank / size; i < end;) {
    const int64_t next = std::min(end, (i / L + 1) * L);
    work(i, next);
    i = next;
  }
}

// (J, D) to vectors, and back. Whole vectors are read and written as long as they lie inside (J, D):
// they reach into the next rows, whose values are masked when read, and come later when written.
template <class T> inline void pad(const T* x, vf* out, const Sizes& d) {
  const int64_t whole = d.J * d.D - L;
  for (int64_t j = 0; j < d.J; j++)
    for (int64_t k = 0; k < d.Dv; k++, out++) {
      const int64_t from = j * d.D + k * L, n = std::min<int64_t>(L, d.D - k * L);
      if (from <= whole) {
        *out = load(x + from);
        if (n < L) *out = d.inside ? *out : vf{};
      } else {
        *out = vf{};
        for (int64_t e = 0; e < n; e++) floats(out)[e] = raise(x[from + e]);
      }
    }
}
template <class T> inline void unpad(const vf* x, T* out, const Sizes& d) {
  const int64_t whole = d.J * d.D - L;
  for (int64_t j = 0; j < d.J; j++)
    for (int64_t k = 0; k < d.Dv; k++, x++) {
      const int64_t from = j * d.D + k * L, n = std::min<int64_t>(L, d.D - k * L);
      if constexpr (sizeof(T) == sizeof(float))
        if (from <= whole) {
          store(out + from, *x);
          continue;
        }
      for (int64_t e = 0; e < n; e++) put(out[from + e], floats(x)[e]);
    }
}

}  // namespace
