// The C interface of em_routing. Tensors are contiguous, null where they are not given. `sizes` is B,
// I, R, P, J, Q, iterations, all of them at least 1. `grid` is H', W', K, S, or null. The result is 1,
// or 0 if memory ran out.
#include "em_backward.h"
#include "exports.h"

namespace {

// The sizes that nearly all networks have, as constants.
struct FourByFour : EmSizes {
  using EmSizes::EmSizes;
  static constexpr int64_t R = 4, P = 4, Q = 4, D = 16, poses = 16, products = 16;
};

template <class Call>
bool with_sizes(const int64_t* n, const float* temperature, float min_variance, const Call& call) {
  if (n[2] == 4 && n[3] == 4 && n[5] == 4) return call(FourByFour(n, temperature, min_variance));
  return call(EmSizes(n, temperature, min_variance));
}

}  // namespace

#define EM_ROUTING(SUFFIX, T)                                                                                  \
  EXPORT int tritoncaps_em_routing_fwd_##SUFFIX(                                                               \
      const void* poses, const void* activations, const void* weight, const float* beta_u, const float* beta_a, \
      const int64_t* sizes, const float* temperature, float min_variance, const int64_t* grid, void* v,        \
      void* logits, void* assignment, float* mass, float* mean, float* variance, int threads) {                \
    return with_sizes(sizes, temperature, min_variance, [&](const auto& d) {                                   \
      const EmInputs<T> in{as<T>(poses), as<T>(activations), as<T>(weight), beta_u, beta_a};                   \
      return em_forward<T>(in, d, Grid(grid, d.I), as<T>(v), as<T>(logits), as<T>(assignment),                 \
                           {mass, mean, variance}, threads);                                                   \
    });                                                                                                        \
  }                                                                                                            \
  EXPORT int tritoncaps_em_routing_bwd_##SUFFIX(                                                               \
      const void* grad_v, const void* grad_logits, const void* grad_assignment, const void* poses,             \
      const void* activations, const void* weight, const float* beta_u, const float* beta_a, float* mass,      \
      float* mean, float* variance, const int64_t* sizes, const float* temperature, float min_variance,        \
      const int64_t* grid, int full, void* grad_poses, void* grad_activations, void* grad_weight,              \
      float* grad_beta_u, float* grad_beta_a, int threads) {                                                   \
    return with_sizes(sizes, temperature, min_variance, [&](const auto& d) {                                   \
      const EmInputs<T> in{as<T>(poses), as<T>(activations), as<T>(weight), beta_u, beta_a};                   \
      return em_backward<T>({as<T>(grad_v), as<T>(grad_logits), as<T>(grad_assignment)}, in,                   \
                            {mass, mean, variance}, d, Grid(grid, d.I), full != 0,                             \
                            {as<T>(grad_poses), as<T>(grad_activations), as<T>(grad_weight), grad_beta_u,      \
                             grad_beta_a},                                                                     \
                            threads);                                                                          \
    });                                                                                                        \
  }

EM_ROUTING(f32, float)
EM_ROUTING(bf16, bf16)
