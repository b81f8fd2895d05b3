/* Products with matrices of floats, for AVX2 and for AVX-512.
 *
 * Memory is what bounds those of a few rows of x, so a matrix is read as it lies, one row after the other: a processor that sees one stream fetches
 * it ahead by itself, better than prefetches do (four rows side by side took four times as long beside a busy neighbour). Sums
 * run in four strands of vectors, so that none waits for the one before, and four rows are added up across lanes together. A row
 * of x meets a row of w in one order of sums, however many rows of x there are.
 */
#if defined(__x86_64__)
#include "gemm.h"

#include <immintrin.h>
#include <string.h>

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

/* The sums of dots512, of DEEP rows of w together, for 2 to 6 rows of x: these are read once for all DEEP. So that registers
 * suffice, one strand is summed after the other, over columns that the cache holds by then; what comes after these rows of w is
 * asked for meanwhile, as one stream. */
AVX512 INLINE void strands512(const int count, const int narrow, const int ahead, const mr_matrix *w, const float *x, int row, float *y) {
    const size_t cols = w->cols, begin = row * cols;
    const char *next = (const char *)w->values + (begin + DEEP * cols) * (narrow ? 2 : 4);
    __m512 kept[STRANDS][6][DEEP];
    for (int s = 0; s < STRANDS; s++) {
        __m512 made[6][DEEP];
#pragma GCC unroll 6
        for (int t = 0; t < count; t++)
#pragma GCC unroll 4
            for (int r = 0; r < DEEP; r++) made[t][r] = _mm512_setzero_ps();
        for (size_t c = 16 * s; c < cols; c += 16 * STRANDS) {
            __mmask16 mask = cols - c < 16 ? (__mmask16)((1u << (cols - c)) - 1) : 0xffff;
            __m512 value[DEEP];
#pragma GCC unroll 4
            for (int r = 0; r < DEEP && ahead; r++) {
                if (narrow && r % 2) continue;
                _mm_prefetch(next, _MM_HINT_T0), next += 64;
            }
#pragma GCC unroll 4
            for (int r = 0; r < DEEP; r++) value[r] = some(narrow, w->values, begin + r * cols + c, mask);
#pragma GCC unroll 6
            for (int t = 0; t < count; t++) {
                __m512 of = _mm512_maskz_loadu_ps(mask, x + t * cols + c);
#pragma GCC unroll 4
                for (int r = 0; r < DEEP; r++) made[t][r] = _mm512_fmadd_ps(value[r], of, made[t][r]);
            }
        }
#pragma GCC unroll 6
        for (int t = 0; t < count; t++)
#pragma GCC unroll 4
            for (int r = 0; r < DEEP; r++) kept[s][t][r] = made[t][r];
    }
    for (int t = 0; t < count; t++) {
        __m256 sums[DEEP];
        float out[DEEP];
#pragma GCC unroll 4
        for (int r = 0; r < DEEP; r++) {
            __m512 sum = _mm512_add_ps(_mm512_add_ps(kept[0][t][r], kept[1][t][r]), _mm512_add_ps(kept[2][t][r], kept[3][t][r]));
            sums[r] = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
        }
        _mm_storeu_ps(out, totals(sums[0], sums[1], sums[2], sums[3]));
        put(w, out, row, DEEP, y + (size_t)t * w->rows);
    }
}

#define STRANDS512(n) case n: strands512(n, narrow, first == 0, w, at, row, to); break;
AVX512 INLINE void floats512(const int narrow, const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    for (int row = begin, deep; row < end; row += deep) { /* rows outside: each is read from memory once, then from the cache */
        deep = row + DEEP <= end ? DEEP : 1;
        for (int first = 0, count; first < n; first += count) {
            const float *at = x + (size_t)first * w->cols;
            float *to = y + (size_t)first * w->rows;
            count = n - first > 6 ? 4 : n - first;
            if (deep < DEEP || count == 1) {
                for (int t = 0; t < count; t++)
                    if (deep == DEEP)
                        dots512(DEEP, 1, narrow, w, at + (size_t)t * w->cols, row, to + (size_t)t * w->rows);
                    else
                        dots512(1, 1, narrow, w, at + (size_t)t * w->cols, row, to + (size_t)t * w->rows);
            } else {
                switch (count) { STRANDS512(2) STRANDS512(3) STRANDS512(4) STRANDS512(5) STRANDS512(6) }
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

/* Columns from `from` on, fewer than a vector, to sums of `deep` rows. */
AVX2 INLINE void add_rest(const mr_matrix *w, const float *x, size_t from, int row, const int deep, const int narrow, float *sums) {
    const size_t cols = w->cols;
    for (size_t k = from; k < cols; k++)
        for (int r = 0; r < deep; r++) {
            size_t i = (row + r) * cols + k;
            float value = narrow ? mr_bf16_to_float(((const uint16_t *)w->values)[i]) : ((const float *)w->values)[i];
            sums[r] = __builtin_fmaf(value, x[k], sums[r]);
        }
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
        add_rest(w, x + t * cols, c, row, deep, narrow, out);
        put(w, out, row, deep, y + (size_t)t * w->rows);
    }
}

/* See strands512: of dots256, for 2 or 3 rows of x. */
AVX2 INLINE void strands256(const int count, const int narrow, const int ahead, const mr_matrix *w, const float *x, int row, float *y) {
    const size_t cols = w->cols, begin = row * cols, whole = cols / 8 * 8;
    const char *next = (const char *)w->values + (begin + DEEP * cols) * (narrow ? 2 : 4);
    __m256 kept[STRANDS][3][DEEP];
    for (int s = 0; s < STRANDS; s++) {
        __m256 made[3][DEEP];
#pragma GCC unroll 3
        for (int t = 0; t < count; t++)
#pragma GCC unroll 4
            for (int r = 0; r < DEEP; r++) made[t][r] = _mm256_setzero_ps();
        for (size_t c = 8 * s; c < whole; c += 8 * STRANDS) {
            __m256 of[3];
            if (ahead) {
                _mm_prefetch(next, _MM_HINT_T0);
                if (!narrow) _mm_prefetch(next + 64, _MM_HINT_T0);
                next += narrow ? 64 : 128;
            }
#pragma GCC unroll 3
            for (int t = 0; t < count; t++) of[t] = _mm256_loadu_ps(x + t * cols + c);
#pragma GCC unroll 4
            for (int r = 0; r < DEEP; r++) {
                __m256 value = eight(narrow, w->values, begin + r * cols + c);
#pragma GCC unroll 3
                for (int t = 0; t < count; t++) made[t][r] = _mm256_fmadd_ps(value, of[t], made[t][r]);
            }
        }
#pragma GCC unroll 3
        for (int t = 0; t < count; t++)
#pragma GCC unroll 4
            for (int r = 0; r < DEEP; r++) kept[s][t][r] = made[t][r];
    }
    for (int t = 0; t < count; t++) {
        __m256 sums[DEEP];
        float out[DEEP];
#pragma GCC unroll 4
        for (int r = 0; r < DEEP; r++)
            sums[r] = _mm256_add_ps(_mm256_add_ps(kept[0][t][r], kept[1][t][r]), _mm256_add_ps(kept[2][t][r], kept[3][t][r]));
        _mm_storeu_ps(out, totals(sums[0], sums[1], sums[2], sums[3]));
        add_rest(w, x + t * cols, whole, row, DEEP, narrow, out);
        put(w, out, row, DEEP, y + (size_t)t * w->rows);
    }
}

#define STRANDS256(n) case n: strands256(n, narrow, first == 0, w, at, row, to); break;
AVX2 INLINE void floats256(const int narrow, const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    for (int row = begin, deep; row < end; row += deep) {
        deep = row + DEEP <= end ? DEEP : 1;
        for (int first = 0, count; first < n; first += count) {
            const float *at = x + (size_t)first * w->cols;
            float *to = y + (size_t)first * w->rows;
            count = n - first > 4 ? 3 : n - first > 1 ? 2 + (n - first == 3) : 1;
            if (deep < DEEP || count == 1) {
                for (int t = 0; t < count; t++)
                    if (deep == DEEP)
                        dots256(DEEP, 1, narrow, w, at + (size_t)t * w->cols, row, to + (size_t)t * w->rows);
                    else
                        dots256(1, 1, narrow, w, at + (size_t)t * w->cols, row, to + (size_t)t * w->rows);
            } else {
                switch (n == 2 ? 0 : count) {
                    STRANDS256(2) STRANDS256(3)
                    default: dots256(DEEP, 2, narrow, w, at, row, to);
                }
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

/* -- many rows of x --------------------------------------------------------------------------------------------------------
 *
 * Some rows of w are widened and turned, DEPTH columns at a time, so that a vector holds one column of them; it stays in the
 * cache while all rows of x pass, of which as many as there are registers for are summed at once. Sums run from the first
 * column to the last. */

#define DEPTH 512

/* Four columns of four rows from w + at on, `stride` apart, to four rows of `to`, `width` apart. */
AVX2 INLINE void turn_four(const int narrow, const void *values, size_t at, size_t stride, float *to, const int width) {
    __m128 r[4];
    for (int i = 0; i < 4; i++) {
        size_t here = at + i * stride;
        r[i] = narrow ? _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)((const uint16_t *)values + here))), 16))
                      : _mm_loadu_ps((const float *)values + here);
    }
    _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
    for (int i = 0; i < 4; i++) _mm_storeu_ps(to + i * width, r[i]);
}

/* Columns [from, from + depth) of rows [row, row + count) as [depth, width], zeros beyond count. */
AVX2 INLINE void turn_rows(const int narrow, const mr_matrix *w, int row, int count, int from, int depth, float *to, const int width) {
    const size_t cols = w->cols;
    int whole = count / 4 * 4, k = 0;
    for (; k + 4 <= depth; k += 4)
        for (int r = 0; r < whole; r += 4) turn_four(narrow, w->values, (row + r) * cols + from + k, cols, to + (size_t)k * width + r, width);
    for (int r = 0; r < width; r++)
        for (int j = r < whole ? k : 0; j < depth; j++) {
            size_t i = (size_t)(row + r) * cols + from + j;
            to[(size_t)j * width + r] = r >= count ? 0.0f : narrow ? mr_bf16_to_float(((const uint16_t *)w->values)[i]) : ((const float *)w->values)[i];
        }
}

/* y of `count` rows of x and `valid` <= 32 rows of w, whose turned columns begin at column `from`. */
AVX512 INLINE void tile_many512(const int count, const float *turned, const float *x, size_t cols, int depth, int valid, const float *bias, int first, float *y, size_t rows) {
    __m512 made[12][2];
    __mmask16 low = valid < 16 ? (__mmask16)((1u << valid) - 1) : 0xffff, high = valid < 32 ? (__mmask16)((1u << (valid < 16 ? 0 : valid - 16)) - 1) : 0xffff;
#pragma GCC unroll 12
    for (int t = 0; t < count; t++) {
        if (first) {
            made[t][0] = bias ? _mm512_maskz_loadu_ps(low, bias) : _mm512_setzero_ps();
            made[t][1] = bias ? _mm512_maskz_loadu_ps(high, bias + 16) : _mm512_setzero_ps();
        } else {
            made[t][0] = _mm512_maskz_loadu_ps(low, y + t * rows);
            made[t][1] = _mm512_maskz_loadu_ps(high, y + t * rows + 16);
        }
    }
    for (int k = 0; k < depth; k++) {
        __m512 a = _mm512_loadu_ps(turned + (size_t)k * 32), b = _mm512_loadu_ps(turned + (size_t)k * 32 + 16);
#pragma GCC unroll 12
        for (int t = 0; t < count; t++) {
            __m512 value = _mm512_set1_ps(x[t * cols + k]);
            made[t][0] = _mm512_fmadd_ps(a, value, made[t][0]);
            made[t][1] = _mm512_fmadd_ps(b, value, made[t][1]);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < count; t++) {
        _mm512_mask_storeu_ps(y + t * rows, low, made[t][0]);
        _mm512_mask_storeu_ps(y + t * rows + 16, high, made[t][1]);
    }
}

#define MANY512(n) case n: tile_many512(n, turned, at, cols, depth, valid, bias, from == 0, to, w->rows); break;
AVX512 void mr_many_avx512(const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    _Alignas(64) float turned[DEPTH * 32];
    const size_t cols = w->cols;
    for (int row = begin; row < end; row += 32) {
        int valid = end - row < 32 ? end - row : 32;
        const float *bias = w->bias ? w->bias + row : NULL;
        for (int from = 0; from < w->cols; from += DEPTH) {
            int depth = w->cols - from < DEPTH ? w->cols - from : DEPTH;
            if (w->format == MR_BF16)
                turn_rows(1, w, row, valid, from, depth, turned, 32);
            else
                turn_rows(0, w, row, valid, from, depth, turned, 32);
            for (int first = 0; first < n; first += 12) {
                const float *at = x + first * cols + from;
                float *to = y + (size_t)first * w->rows + row;
                switch (n - first) {
                    MANY512(1) MANY512(2) MANY512(3) MANY512(4) MANY512(5) MANY512(6) MANY512(7) MANY512(8) MANY512(9) MANY512(10) MANY512(11)
                    default: tile_many512(12, turned, at, cols, depth, valid, bias, from == 0, to, w->rows);
                }
            }
        }
    }
}

/* The same for `valid` <= 16 rows of w; of the last of them fewer are written. */
AVX2 INLINE void tile_many256(const int count, const float *turned, const float *x, size_t cols, int depth, int valid, const float *bias, int first, float *y, size_t rows) {
    __m256 made[6][2];
    float held[16] = {0};
#pragma GCC unroll 6
    for (int t = 0; t < count; t++) {
        const float *start = first ? bias : y + t * rows;
        if (start && valid < 16) memcpy(held, start, valid * sizeof(float)), start = held;
        made[t][0] = start ? _mm256_loadu_ps(start) : _mm256_setzero_ps();
        made[t][1] = start ? _mm256_loadu_ps(start + 8) : _mm256_setzero_ps();
    }
    for (int k = 0; k < depth; k++) {
        __m256 a = _mm256_loadu_ps(turned + (size_t)k * 16), b = _mm256_loadu_ps(turned + (size_t)k * 16 + 8);
#pragma GCC unroll 6
        for (int t = 0; t < count; t++) {
            __m256 value = _mm256_set1_ps(x[t * cols + k]);
            made[t][0] = _mm256_fmadd_ps(a, value, made[t][0]);
            made[t][1] = _mm256_fmadd_ps(b, value, made[t][1]);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < count; t++) {
        float *to = valid < 16 ? held : y + t * rows;
        _mm256_storeu_ps(to, made[t][0]);
        _mm256_storeu_ps(to + 8, made[t][1]);
        if (valid < 16) memcpy(y + t * rows, held, valid * sizeof(float));
    }
}

#define MANY256(n) case n: tile_many256(n, turned, at, cols, depth, valid, bias, from == 0, to, w->rows); break;
AVX2 void mr_many_avx2(const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    _Alignas(64) float turned[DEPTH * 16];
    const size_t cols = w->cols;
    for (int row = begin; row < end; row += 16) {
        int valid = end - row < 16 ? end - row : 16;
        const float *bias = w->bias ? w->bias + row : NULL;
        for (int from = 0; from < w->cols; from += DEPTH) {
            int depth = w->cols - from < DEPTH ? w->cols - from : DEPTH;
            if (w->format == MR_BF16)
                turn_rows(1, w, row, valid, from, depth, turned, 16);
            else
                turn_rows(0, w, row, valid, from, depth, turned, 16);
            for (int first = 0; first < n; first += 6) {
                const float *at = x + first * cols + from;
                float *to = y + (size_t)first * w->rows + row;
                switch (n - first) {
                    MANY256(1) MANY256(2) MANY256(3) MANY256(4) MANY256(5)
                    default: tile_many256(6, turned, at, cols, depth, valid, bias, from == 0, to, w->rows);
                }
            }
        }
    }
}
#else
typedef int mr_no_x86; /* a file may not be empty */
#endif
