// The sizes of a call of EM routing, its grid, and how its work is cut.
#pragma once

#include "em_lanes.h"
#include "sizes.h"

namespace {

// An output capsule with no more mass has no mean and no variance. Both are 0, and pass no gradient.
constexpr float NO_MASS = 1e-20f;

struct EmSizes {
  int64_t B, I, R, P, J, Q, iterations;
  int64_t D, poses, products;  // R·Q, R·P, P·Q
  const float* temperature;    // of each iteration
  float min_variance;

  EmSizes(const int64_t* n, const float* temperature, float min_variance)
      : B(n[0]), I(n[1]), R(n[2]), P(n[3]), J(n[4]), Q(n[5]), iterations(n[6]), D(R * Q), poses(R * P),
        products(P * Q), temperature(temperature), min_variance(min_variance) {}
};

// Rows are the positions (y, x) of images, H by W of them. Input capsule (ky, kx, c) of a row is the
// capsule (y·S + ky, x·S + kx, c) of its image. All rows that have a capsule of an image among their
// inputs share it. Without a grid, each row is an image of one position.
struct Grid {
  int64_t H, W, K, S, C;  // C types: I = K·K·C
  bool shared;            // there is a grid

  Grid(const int64_t* n, int64_t I)
      : H(n ? n[0] : 1), W(n ? n[1] : 1), K(n ? n[2] : 1), S(n ? n[3] : 1), C(I / (K * K)), shared(n) {}
  int64_t positions() const { return H * W; }
  // Sides of the image, as far as there are rows.
  int64_t height() const { return (H - 1) * S + K; }
  int64_t width() const { return (W - 1) * S + K; }
  // Of `size` positions on a side, those that have the input position x: [first, last].
  int64_t first(int64_t x) const { return x < K ? 0 : (x - K) / S + 1; }
  int64_t last(int64_t x, int64_t size) const { return std::min(x / S, size - 1); }
  int64_t fed(int64_t x, int64_t size) const { return last(x, size) - first(x) + 1; }
  // How many rows share input k = ky·K + kx of a row.
  int64_t sharing(int64_t row, int64_t k) const {
    const int64_t y = row / W % H, x = row % W;
    return fed(y * S + k / K, H) * fed(x * S + k % K, W);
  }
};

// A thread works on groups of LANES rows, a few input capsules at a time: their votes stay in cache.
//
// With a grid, the softmax needs all rows of an image. Threads share a round of images then, each
// with some groups, and meet after each walk through the votes. Without, each group is by itself.
//
// The gradients that are sums over the rows are summed by slabs, runs of groups of each round. A slab
// has one thread. All of this but the number of threads follows from the sizes, and so does the order of
// every sum.
struct EmPlan {
  int64_t rows;    // of a round
  int64_t groups;  // of a round
  int64_t slabs;

  EmPlan(const EmSizes& d, const Grid& grid, int64_t vectors_of_a_group, int64_t floats_of_a_slab) {
    rows = d.B;
    if (grid.shared) {
      const int64_t images = d.B / grid.positions();
      const int64_t bytes = (grid.positions() * vectors_of_a_group + L - 1) / L * int64_t(sizeof(vf));
      const int64_t most = std::clamp<int64_t>(16 * MB / bytes, 1, images);
      const int64_t rounds = (images + most - 1) / most;
      rows = (images + rounds - 1) / rounds * grid.positions();
    }
    groups = (rows + L - 1) / L;
    const int64_t most = 16 * MB / (std::max<int64_t>(1, floats_of_a_slab) * int64_t(sizeof(float)));
    slabs = std::min(groups, std::clamp<int64_t>(most, 4, 16));
  }
  // The first group of a slab, among those of a round.
  int64_t start(int64_t slab, int64_t groups) const { return groups * slab / slabs; }
};

}  // namespace
