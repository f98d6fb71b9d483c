// The C interface of squash, of N rows of D values. Both are at least 1, tensors are contiguous. The
// result is 1, or 0 if memory ran out.
#include "exports.h"
#include "squash.h"

namespace {

// Calls work(row, scratch) for the rows of each thread. Scratch: 3·D floats, in whole cache lines.
template <class Work> bool each_row(int64_t N, int64_t D, int threads, const Work& work) {
  const int64_t lines = (3 * D + 15) / 16 * 16;
  const Buffer<float> scratch(threads * lines);
  if (!scratch.values) return false;
  in_parallel(threads, [&](int rank, int size) {
    float* own = scratch.values + rank * lines;
    for (int64_t row = N * rank / size; row < N * (rank + 1) / size; row++) work(row, own);
  });
  return true;
}

// A row in float32, in place or in the buffer, and a row of results likewise.
const float* read(const float* x, float*, int64_t) { return x; }
const float* read(const bf16* x, float* buffer, int64_t D) {
  for (int64_t k = 0; k < D; k++) buffer[k] = raise(x[k]);
  return buffer;
}
float* target(float* out, float*) { return out; }
float* target(bf16*, float* buffer) { return buffer; }
void write(const float*, float*, int64_t) {}
void write(const float* buffer, bf16* out, int64_t D) {
  for (int64_t k = 0; k < D; k++) put(out[k], buffer[k]);
}

template <class T> bool forward(const T* s, T* v, int64_t N, int64_t D, bool exponential, int threads) {
  return each_row(N, D, threads, [=](int64_t row, float* scratch) {
    const float* x = read(s + row * D, scratch, D);
    float* y = target(v + row * D, scratch + D);
    squash_row(x, y, D, exponential);
    write(y, v + row * D, D);
  });
}

template <class T>
bool backward(const T* grad_v, const T* s, T* grad_s, int64_t N, int64_t D, bool exponential, int threads) {
  return each_row(N, D, threads, [=](int64_t row, float* scratch) {
    const float *g = read(grad_v + row * D, scratch, D), *x = read(s + row * D, scratch + D, D);
    float* y = target(grad_s + row * D, scratch + 2 * D);
    squash_gradient_row(g, x, y, D, exponential);
    write(y, grad_s + row * D, D);
  });
}

}  // namespace

#define SQUASH(SUFFIX, T)                                                                                  \
  EXPORT int tritoncaps_squash_fwd_##SUFFIX(const void* s, const int64_t* sizes, int exponential, void* v, \
                                            int threads) {                                                 \
    return forward<T>(as<T>(s), as<T>(v), sizes[0], sizes[1], exponential != 0, threads);                  \
  }                                                                                                        \
  EXPORT int tritoncaps_squash_bwd_##SUFFIX(const void* grad_v, const void* s, const int64_t* sizes,       \
                                            int exponential, void* grad_s, int threads) {                  \
    return backward<T>(as<T>(grad_v), as<T>(s), as<T>(grad_s), sizes[0], sizes[1], exponential != 0,       \
                       threads);                                                                           \
  }

SQUASH(f32, float)
SQUASH(bf16, bf16)
