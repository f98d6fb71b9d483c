// The sizes of a call, how its work is cut, and the threads that do it.
//
// Rows (J, D) are held as J·Dv vectors: the D components of an output capsule, padded by zeros to
// whole vectors. Values of pairs (i, j) are held in blocks of LANES input capsules, one vector an
// output capsule. So products with û run over d, and the softmax over j runs with i in the lanes.
#pragma once

#include <algorithm>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lanes.h"

namespace tritoncaps {

struct Sizes {
  int64_t B, I, P, J, D, iterations;
  bool leaky;
  int64_t Dv, NV, blocks;  // vectors of D and of J·D, blocks of I

  Sizes(const int64_t* n, bool leaky)
      : B(n[0]), I(n[1]), P(n[2]), J(n[3]), D(n[4]), iterations(n[5]), leaky(leaky),
        Dv((D + L - 1) / L), NV(J * Dv), blocks((I + L - 1) / L) {}
  bool padded() const { return D % L != 0; }
  int64_t rows(int64_t block) const { return std::min<int64_t>(L, I - block * L); }
  float uniform() const { return 1.f / float(J + leaky); }
};

// How the work is cut. All of it follows from the sizes, except `together`, which changes no bit:
// the sum over i of an image is always the sum, in order, of the sums over its slabs.
//
// The prediction vectors of a group of images stay in cache for all iterations, if those of one
// image take at most 8 MB. If not, they are computed anew in each iteration, piece by piece.
struct Plan {
  int64_t images;    // in a group
  int64_t slabs;     // cuts of the input capsules
  bool kept;
  int64_t piece;     // blocks whose prediction vectors exist at once; a whole slab if kept
  bool together;     // threads share a group, each with some slabs, or each has groups of its own
  int64_t stride;    // vectors between the prediction vectors of two images

  Plan(const Sizes& d, int64_t B, int threads) {
    constexpr int64_t near = 3 << 20, most = 8 << 20;
    const int64_t block = L * d.NV * int64_t(sizeof(vf)), image = d.blocks * block;
    kept = image <= most;
    images = kept ? near / std::max<int64_t>(1, image) : 4;
    images = std::min({std::max<int64_t>(1, images), B, int64_t{64}});
    if (images > 4) images -= images % 4;
    slabs = std::clamp<int64_t>(d.blocks / 4, 1, 16);
    const int64_t slab = (d.blocks + slabs - 1) / slabs;
    piece = kept ? slab : std::clamp<int64_t>((near / 6) / (images * block), 1, slab);
    stride = (kept ? d.blocks : piece) * L * d.NV;
    together = threads > 1 && (B + images - 1) / images < 2 * threads && slabs > 1;
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

// (J, D) to vectors, and back.
template <class T> inline void pad(const T* x, vf* out, const Sizes& d) {
  if (d.padded()) clear(out, d.NV);
  for (int64_t j = 0; j < d.J; j++)
    for (int64_t k = 0; k < d.D; k++) floats(out)[j * d.Dv * L + k] = raise(x[j * d.D + k]);
}
template <class T> inline void unpad(const vf* x, T* out, const Sizes& d) {
  for (int64_t j = 0; j < d.J; j++)
    for (int64_t k = 0; k < d.D; k++) put(out[j * d.D + k], floats(x)[j * d.Dv * L + k]);
}

}  // namespace tritoncaps
