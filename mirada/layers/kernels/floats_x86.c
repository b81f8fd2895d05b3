/* Products of a few rows of x with matrices of floats, for AVX2 and for AVX-512.
 *
 * Memory is what bounds them, so a matrix is read as it lies, one row after the other: a processor that sees one stream fetches
 * it ahead by itself, better than prefetches do (four rows side by side took four times as long beside a busy neighbour). Sums
 * run in four strands of vectors, so that none waits for the one before, and four rows are added up across lanes together. A row
 * of x meets a row of w in one order of sums, however many rows of x there are.
 */
#if defined(__x86_64__)
#include "gemm.h"

#include <immintrin.h>

#define STRANDS 4
#define DEEP 4 /* rows of w whose sums over lanes are made together */
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

/* Sums over the lanes of four vectors, in one order for each. */
AVX2 INLINE __m128 totals(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 made = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(made), _mm256_extractf128_ps(made, 1));
}

/* Of rows [row, row + deep). */
INLINE void put(const mr_matrix *w, const float *sums, int row, const int deep, float *y) {
    for (int r = 0; r < deep; r++) y[row + r] = sums[r] + (w->bias ? w->bias[row + r] : 0.0f);
}

/* -- AVX-512 ------------------------------------------------------------------------------------------------------------- */

AVX512 INLINE __m512 sixteen(const int narrow, const void *values, size_t at) {
    if (!narrow) return _mm512_loadu_ps((const float *)values + at);
    __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)values + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

AVX512 INLINE __m512 some(const int narrow, const void *values, size_t at, __mmask16 mask) {
    if (!narrow) return _mm512_maskz_loadu_ps(mask, (const float *)values + at);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)values + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* `deep` rows of w, one after the other, against `count` rows of x. */
AVX512 INLINE void dots512(const int deep, const int count, const int narrow, const mr_matrix *w, const float *x, int row, float *y) {
    const size_t cols = w->cols;
    __m256 sums[6][DEEP];
#pragma GCC unroll 4
    for (int r = 0; r < deep; r++) {
        const size_t begin = (row + r) * cols;
        __m512 made[6][STRANDS];
        for (int t = 0; t < count; t++)
            for (int s = 0; s < STRANDS; s++) made[t][s] = _mm512_setzero_ps();
        size_t c = 0;
        for (; c + 16 * STRANDS <= cols; c += 16 * STRANDS)
#pragma GCC unroll 4
            for (int s = 0; s < STRANDS; s++) {
                __m512 value = sixteen(narrow, w->values, begin + c + 16 * s);
                for (int t = 0; t < count; t++)
                    made[t][s] = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + t * cols + c + 16 * s), made[t][s]);
            }
#pragma GCC unroll 4
        for (int s = 0; s < STRANDS; s++) {
            if (c >= cols) continue;
            __mmask16 mask = cols - c < 16 ? (__mmask16)((1u << (cols - c)) - 1) : 0xffff;
            __m512 value = some(narrow, w->values, begin + c, mask);
            for (int t = 0; t < count; t++)
                made[t][s] = _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(mask, x + t * cols + c), made[t][s]);
            c += 16;
        }
        for (int t = 0; t < count; t++) {
            __m512 sum = _mm512_add_ps(_mm512_add_ps(made[t][0], made[t][1]), _mm512_add_ps(made[t][2], made[t][3]));
            sums[t][r] = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
        }
    }
    for (int t = 0; t < count; t++) {
        float out[DEEP];
        for (int r = deep; r < DEEP; r++) sums[t][r] = _mm256_setzero_ps();
        _mm_storeu_ps(out, totals(sums[t][0], sums[t][1], sums[t][2], sums[t][3]));
        put(w, out, row, deep, y + (size_t)t * w->rows);
    }
}

#define DOTS512(deep, n) case n: dots512(deep, n, narrow, w, at, row, to); break;
AVX512 INLINE void floats512(const int narrow, const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    for (int row = begin, deep; row < end; row += deep) { /* rows outside: each is read from memory once, then from the cache */
        deep = row + DEEP <= end ? DEEP : 1;
        for (int first = 0; first < n; first += 6) {
            const float *at = x + (size_t)first * w->cols;
            float *to = y + (size_t)first * w->rows;
            if (deep == DEEP) {
                switch (n - first) {
                    DOTS512(DEEP, 1) DOTS512(DEEP, 2) DOTS512(DEEP, 3) DOTS512(DEEP, 4) DOTS512(DEEP, 5)
                    default: dots512(DEEP, 6, narrow, w, at, row, to);
                }
            } else {
                for (int t = first; t < n && t < first + 6; t++) dots512(1, 1, narrow, w, x + (size_t)t * w->cols, row, y + (size_t)t * w->rows);
            }
        }
    }
}

AVX512 void mr_floats_avx512(const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    if (w->format == MR_BF16)
        floats512(1, w, x, n, begin, end, y);
    else
        floats512(0, w, x, n, begin, end, y);
}

/* -- AVX2 ---------------------------------------------------------------------------------------------------------------- */

AVX2 INLINE __m256 eight(const int narrow, const void *values, size_t at) {
    if (!narrow) return _mm256_loadu_ps((const float *)values + at);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)values + at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 INLINE void dots256(const int deep, const int count, const int narrow, const mr_matrix *w, const float *x, int row, float *y) {
    const size_t cols = w->cols;
    __m256 sums[3][DEEP];
    size_t c = 0;
#pragma GCC unroll 4
    for (int r = 0; r < deep; r++) {
        const size_t begin = (row + r) * cols;
        __m256 made[3][STRANDS];
        for (int t = 0; t < count; t++)
            for (int s = 0; s < STRANDS; s++) made[t][s] = _mm256_setzero_ps();
        for (c = 0; c + 8 * STRANDS <= cols; c += 8 * STRANDS)
#pragma GCC unroll 4
            for (int s = 0; s < STRANDS; s++) {
                __m256 value = eight(narrow, w->values, begin + c + 8 * s);
                for (int t = 0; t < count; t++)
                    made[t][s] = _mm256_fmadd_ps(value, _mm256_loadu_ps(x + t * cols + c + 8 * s), made[t][s]);
            }
#pragma GCC unroll 4
        for (int s = 0; s < STRANDS; s++) {
            if (c + 8 > cols) continue;
            __m256 value = eight(narrow, w->values, begin + c);
            for (int t = 0; t < count; t++) made[t][s] = _mm256_fmadd_ps(value, _mm256_loadu_ps(x + t * cols + c), made[t][s]);
            c += 8;
        }
        for (int t = 0; t < count; t++)
            sums[t][r] = _mm256_add_ps(_mm256_add_ps(made[t][0], made[t][1]), _mm256_add_ps(made[t][2], made[t][3]));
    }
    for (int t = 0; t < count; t++) {
        float out[DEEP];
        for (int r = deep; r < DEEP; r++) sums[t][r] = _mm256_setzero_ps();
        _mm_storeu_ps(out, totals(sums[t][0], sums[t][1], sums[t][2], sums[t][3]));
        for (size_t k = c; k < cols; k++)
            for (int r = 0; r < deep; r++) {
                size_t i = (row + r) * cols + k;
                float value = narrow ? mr_bf16_to_float(((const uint16_t *)w->values)[i]) : ((const float *)w->values)[i];
                out[r] = __builtin_fmaf(value, x[t * cols + k], out[r]);
            }
        put(w, out, row, deep, y + (size_t)t * w->rows);
    }
}

#define DOTS256(deep, n) case n: dots256(deep, n, narrow, w, at, row, to); break;
AVX2 INLINE void floats256(const int narrow, const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    for (int row = begin, deep; row < end; row += deep) {
        deep = row + DEEP <= end ? DEEP : 1;
        for (int first = 0; first < n; first += 3) {
            const float *at = x + (size_t)first * w->cols;
            float *to = y + (size_t)first * w->rows;
            if (deep == DEEP) {
                switch (n - first) {
                    DOTS256(DEEP, 1) DOTS256(DEEP, 2)
                    default: dots256(DEEP, 3, narrow, w, at, row, to);
                }
            } else {
                for (int t = first; t < n && t < first + 3; t++) dots256(1, 1, narrow, w, x + (size_t)t * w->cols, row, y + (size_t)t * w->rows);
            }
        }
    }
}

AVX2 void mr_floats_avx2(const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    if (w->format == MR_BF16)
        floats256(1, w, x, n, begin, end, y);
    else
        floats256(0, w, x, n, begin, end, y);
}
#else
typedef int mr_no_x86; /* a file may not be empty */
#endif
