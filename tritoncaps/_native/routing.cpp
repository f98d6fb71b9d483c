// The operators' C interface. Tensors are contiguous, null where an option is not given. `sizes` is
// B, I, P, J, D, iterations, all of them at least 1. Only fused_dynamic_routing takes P = 0: it is
// dynamic_routing then, u is û, and there is no weight. The result is 1, or 0 if memory ran out.
#include "dynamic.h"
#include "exports.h"
#include "pass.h"

#define OPERATORS(SUFFIX, T)                                                                                  \
  EXPORT int tritoncaps_fused_dynamic_routing_fwd_##SUFFIX(                                                   \
      const void* u, const void* weight, const float* prior, const float* pose_bias, const int64_t* sizes,    \
      int leaky, int squashed, void* v, void* coupling, float* sums, int threads) {                           \
    const Sizes d(sizes, leaky != 0);                                                                         \
    return dynamic_forward<T>({as<T>(u), as<T>(weight), prior, pose_bias, squashed != 0}, d, as<T>(v), sums,  \
                              as<T>(coupling), threads);                                                      \
  }                                                                                                           \
  EXPORT int tritoncaps_fused_dynamic_routing_bwd_##SUFFIX(                                                   \
      const float* grad_v, const float* grad_coupling, const void* u, const void* weight, const float* prior, \
      const float* pose_bias, const float* sums, const int64_t* sizes, int leaky, int squashed, int full,     \
      void* grad_u, float* grad_weight, float* grad_prior, float* grad_pose_bias, int threads) {              \
    const Sizes d(sizes, leaky != 0);                                                                         \
    return dynamic_backward<T>({as<T>(u), as<T>(weight), prior, pose_bias, squashed != 0}, d, grad_v,         \
                               grad_coupling, sums, full != 0,                                                \
                               {as<T>(grad_u), grad_weight, grad_prior, grad_pose_bias}, threads);            \
  }                                                                                                           \
  EXPORT int tritoncaps_routing_pass_fwd_##SUFFIX(                                                            \
      const void* u, const void* weight, const void* pose, const float* prior, const float* bias,             \
      const int64_t* sizes, int leaky, void* s, void* coupling, int threads) {                                \
    const Sizes d(sizes, leaky != 0);                                                                         \
    return pass_forward<T>({as<T>(u), as<T>(weight), as<T>(pose), prior, bias}, d, as<T>(s), as<T>(coupling), \
                           threads);                                                                          \
  }                                                                                                           \
  EXPORT int tritoncaps_routing_pass_bwd_##SUFFIX(                                                            \
      const float* grad_s, const float* grad_coupling, const void* u, const void* weight, const void* pose,   \
      const float* prior, const float* bias, const int64_t* sizes, int leaky, void* grad_u,                   \
      float* grad_weight, void* grad_pose, float* grad_prior, float* grad_bias, int threads) {                \
    const Sizes d(sizes, leaky != 0);                                                                         \
    return pass_backward<T>({as<T>(u), as<T>(weight), as<T>(pose), prior, bias}, d, grad_s, grad_coupling,    \
                            {as<T>(grad_u), as<T>(grad_pose), grad_weight, grad_prior, grad_bias}, threads);  \
  }

OPERATORS(f32, float)
OPERATORS(bf16, bf16)

// The widest vectors that this processor has, in floats. Only the portable library asks.
EXPORT int tritoncaps_lanes() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) return 16;
  if (__builtin_cpu_supports("x86-64-v3")) return 8;
#endif
  return 4;
}
