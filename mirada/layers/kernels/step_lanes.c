/* The arithmetic of a step between its matrix products (step_lanes.h), for each set of instructions. */
#include "step_own.h"

#include <math.h>

typedef float fours __attribute__((vector_size(16)));

static inline __attribute__((always_inline)) float total_of_four(fours x) { return (x[0] + x[1]) + (x[2] + x[3]); }

static inline __attribute__((always_inline)) fours totals_of_four(fours a, fours b, fours c, fours e) {
    return (fours){total_of_four(a), total_of_four(b), total_of_four(c), total_of_four(e)};
}

#define W 4
#define TARGET
#define FOR(name) name##_any
#define FMA(a, b, c) ((a) * (b) + (c))
#define MAX(a, b) pick_any((a) > (b), a, b)
#define MIN(a, b) pick_any((a) < (b), a, b)
#include "step_lanes.h"
#undef W
#undef TARGET
#undef FOR
#undef FMA
#undef MAX
#undef MIN

#if defined(__x86_64__)
#include <immintrin.h>

/* The same sums in the same order. */
__attribute__((target("avx2,fma"), always_inline)) static inline fours hadd_four(fours a, fours b, fours c, fours e) {
    return _mm_hadd_ps(_mm_hadd_ps(a, b), _mm_hadd_ps(c, e));
}
#define totals_of_four hadd_four

#define W 8
#define TARGET __attribute__((target("avx2,fma")))
#define FOR(name) name##_avx2
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#include "step_lanes.h"
#undef W
#undef TARGET
#undef FOR
#undef FMA
#undef MAX
#undef MIN

#define W 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma")))
#define FOR(name) name##_avx512
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#include "step_lanes.h"
#undef W
#undef TARGET
#undef FOR
#undef FMA
#undef MAX
#undef MIN
#undef totals_of_four
#endif

const mr_lanes *mr_lanes_for(int d) {
#if defined(__x86_64__)
    if (d % 16 == 0 && mr_kernel() == &mr_avx512) return &lanes_avx512;
    if (d % 8 == 0 && mr_kernel() != &mr_scalar) return &lanes_avx2;
#else
    (void)d;
#endif
    return &lanes_any;
}

void mr_swiglu(const float *gate, const float *up, int n, float *out) { mr_lanes_for(PANEL)->swiglu(gate, up, n, out); }
