/* The kernels for AVX2 and for AVX-512 with VNNI, compiled into one library and chosen when it runs.
 *
 * A row of x meets a row of w in one order of sums whatever the other rows of x are and however many: results of one to any
 * number of rows are equal bit by bit.
 */
#if defined(__x86_64__)
#include "gemm.h"

#include <immintrin.h>
#include <string.h>

#define AHEAD 3072 /* bytes of a panel that are asked for before they are used: what comes after a panel is the next one */
#define ROWS_AHEAD 4 /* the same for rows of floats */
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

INLINE int32_t four_bytes(const int8_t *at) {
    int32_t made;
    memcpy(&made, at, 4);
    return made;
}

/* -- AVX-512 ------------------------------------------------------------------------------------------------------------- */

AVX512 INLINE __m512 scales512(const mr_panel *p, int group) {
    if (p->wide) return _mm512_loadu_ps((const float *)p->scales + (size_t)group * PANEL);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p->scales + (size_t)group * PANEL * 2)));
}

AVX512 INLINE void tile512(const int count, const int four, const mr_panel *p, const mr_rounded *x, int first, float *y) {
    const int bytes = PANEL * BLOCK / (four ? 2 : 1);
    const uint8_t *line = p->values;
    const size_t stride = x->cols, blocks = x->blocks;
    const int8_t *values = x->values + first * stride;
    const float *scales = x->scales + first * blocks;
    const int32_t *offsets = x->offsets + first * blocks, *sums = x->sums + first * blocks;
    __m512 made[MOST_TILE];
    for (int t = 0; t < count; t++) made[t] = _mm512_setzero_ps();
    for (int b = 0, group = 0; b < x->blocks; group++) {
        __m512 scale = scales512(p, group);
        __m512i zero = _mm512_setzero_si512();
        if (four && p->zeros)
            zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p->zeros + (size_t)group * PANEL)));
        int stop = b + p->group_blocks < x->blocks ? b + p->group_blocks : x->blocks;
        for (; b < stop; b++, line += bytes) {
            __m512i dot[MOST_TILE];
            if (four && p->zeros)
                for (int t = 0; t < count; t++) dot[t] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(-sums[t * blocks + b]));
            else
                for (int t = 0; t < count; t++) dot[t] = _mm512_set1_epi32(offsets[t * blocks + b]);
            const int8_t *at = values + b * BLOCK;
            if (four) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    _mm_prefetch((const char *)line + j * 64 + AHEAD, _MM_HINT_T0);
                    __m512i both = _mm512_loadu_si512(line + j * 64);
                    __m512i low = _mm512_and_si512(both, _mm512_set1_epi8(15));
                    __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
                    for (int t = 0; t < count; t++)
                        dot[t] = _mm512_dpbusd_epi32(dot[t], low, _mm512_set1_epi32(four_bytes(at + t * stride + j * 4)));
                    for (int t = 0; t < count; t++)
                        dot[t] = _mm512_dpbusd_epi32(dot[t], high, _mm512_set1_epi32(four_bytes(at + t * stride + 16 + j * 4)));
                }
            } else {
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++) {
                    _mm_prefetch((const char *)line + j * 64 + AHEAD, _MM_HINT_T0);
                    __m512i w = _mm512_loadu_si512(line + j * 64);
                    for (int t = 0; t < count; t++)
                        dot[t] = _mm512_dpbusd_epi32(dot[t], w, _mm512_set1_epi32(four_bytes(at + t * stride + j * 4)));
                }
            }
            for (int t = 0; t < count; t++)
                made[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot[t]), scale), _mm512_set1_ps(scales[t * blocks + b]), made[t]);
        }
    }
    __mmask16 valid = (__mmask16)((1u << p->valid) - 1);
    __m512 bias = p->bias ? _mm512_maskz_loadu_ps(valid, p->bias) : _mm512_setzero_ps();
    for (int t = 0; t < count; t++)
        _mm512_mask_storeu_ps(y + (size_t)(first + t) * p->rows + p->row, valid, _mm512_add_ps(made[t], bias));
}

#define CASE512(n) case n: tile512(n, four, p, x, first, y); break;
AVX512 INLINE void panel512(const int four, const mr_panel *p, const mr_rounded *x, int first, int count, float *y) {
    switch (count) {
        CASE512(1) CASE512(2) CASE512(3) CASE512(4) CASE512(5) CASE512(6)
        CASE512(7) CASE512(8) CASE512(9) CASE512(10) CASE512(11) CASE512(12)
    }
}

AVX512 static void panel8_512(const mr_panel *p, const mr_rounded *x, int first, int count, float *y) {
    panel512(0, p, x, first, count, y);
}

AVX512 static void panel4_512(const mr_panel *p, const mr_rounded *x, int first, int count, float *y) {
    panel512(1, p, x, first, count, y);
}

AVX512 static void round_row_512(const float *x, int cols, int padded, int offset, int8_t *values, float *scales, int32_t *sums, int32_t *offsets) {
    for (int b = 0; b < padded / BLOCK; b++) {
        int left = cols - b * BLOCK;
        __mmask16 first = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
        __mmask16 second = left >= 32 ? 0xffff : left > 16 ? (__mmask16)((1u << (left - 16)) - 1) : 0;
        __m512 low = _mm512_maskz_loadu_ps(first, x + b * BLOCK), high = _mm512_maskz_loadu_ps(second, x + b * BLOCK + 16);
        /* magnitudes as whole numbers, so that what is no number is the largest and stays visible */
        __m512i bits = _mm512_set1_epi32(0x7fffffff);
        __m512i most = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(low), bits), _mm512_and_si512(_mm512_castps_si512(high), bits));
        union { uint32_t u; float f; } largest = {_mm512_reduce_max_epu32(most)};
        float scale = largest.f / 127.0f, inverse = 127.0f / largest.f;
        if (largest.f < 1e-30f) scale = inverse = 0.0f; /* its inverse would not be finite */
        __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, _mm512_set1_ps(inverse)));
        __m512i c = _mm512_cvtps_epi32(_mm512_mul_ps(high, _mm512_set1_ps(inverse)));
        _mm_storeu_si128((__m128i *)(values + b * BLOCK), _mm512_cvtsepi32_epi8(a));
        _mm_storeu_si128((__m128i *)(values + b * BLOCK + 16), _mm512_cvtsepi32_epi8(c));
        int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, c));
        scales[b] = scale, sums[b] = sum, offsets[b] = -offset * sum;
    }
}

AVX512 INLINE __m512 sixteen(const int narrow, const void *values, size_t at, __mmask16 mask) {
    if (!narrow) return _mm512_maskz_loadu_ps(mask, (const float *)values + at);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)values + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* `deep` rows of w against `count` rows of x. */
AVX512 INLINE void dots512(const int deep, const int count, const int narrow, const mr_matrix *w, const float *x, int row, int first, float *y) {
    const size_t cols = w->cols, begin = row * cols;
    const float *at = x + first * cols;
    __m512 made[4][8];
    for (int r = 0; r < deep; r++)
        for (int t = 0; t < count; t++) made[r][t] = _mm512_setzero_ps();
    size_t c = 0;
    for (; c + 16 <= cols; c += 16) {
        __m512 line[4];
        if (!narrow || c % 32 == 0)
            for (int r = 0; r < deep; r++)
                _mm_prefetch((const char *)w->values + (begin + (r + ROWS_AHEAD) * cols + c) * (narrow ? 2 : 4), _MM_HINT_T0);
        for (int r = 0; r < deep; r++) line[r] = sixteen(narrow, w->values, begin + r * cols + c, 0xffff);
        for (int t = 0; t < count; t++) {
            __m512 value = _mm512_loadu_ps(at + t * cols + c);
            for (int r = 0; r < deep; r++) made[r][t] = _mm512_fmadd_ps(line[r], value, made[r][t]);
        }
    }
    if (c < cols) {
        __mmask16 mask = (__mmask16)((1u << (cols - c)) - 1);
        for (int r = 0; r < deep; r++) {
            __m512 line = sixteen(narrow, w->values, begin + r * cols + c, mask);
            for (int t = 0; t < count; t++) made[r][t] = _mm512_fmadd_ps(line, _mm512_maskz_loadu_ps(mask, at + t * cols + c), made[r][t]);
        }
    }
    for (int r = 0; r < deep; r++)
        for (int t = 0; t < count; t++)
            y[(size_t)(first + t) * w->rows + row + r] = _mm512_reduce_add_ps(made[r][t]) + (w->bias ? w->bias[row + r] : 0.0f);
}

#define FLOATS512(deep, n, narrow) case n: dots512(deep, n, narrow, w, x, row, first, y); break;
AVX512 INLINE void floats512(const int narrow, const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    for (int first = 0; first < n; first += 8) {
        int count = n - first < 8 ? n - first : 8, row = begin;
        for (; row + 4 <= end; row += 4) {
            switch (count) {
                FLOATS512(4, 1, narrow) FLOATS512(4, 2, narrow) FLOATS512(4, 3, narrow) FLOATS512(4, 4, narrow)
                FLOATS512(4, 5, narrow) FLOATS512(4, 6, narrow)
                case 7: dots512(2, 7, narrow, w, x, row, first, y); dots512(2, 7, narrow, w, x, row + 2, first, y); break;
                case 8: dots512(2, 8, narrow, w, x, row, first, y); dots512(2, 8, narrow, w, x, row + 2, first, y); break;
            }
        }
        for (; row < end; row++) {
            switch (count) {
                FLOATS512(1, 1, narrow) FLOATS512(1, 2, narrow) FLOATS512(1, 3, narrow) FLOATS512(1, 4, narrow)
                FLOATS512(1, 5, narrow) FLOATS512(1, 6, narrow) FLOATS512(1, 7, narrow) FLOATS512(1, 8, narrow)
            }
        }
    }
}

AVX512 static void floats_512(const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    if (w->format == MR_BF16)
        floats512(1, w, x, n, begin, end, y);
    else
        floats512(0, w, x, n, begin, end, y);
}

const mr_kernels mr_avx512 = {panel8_512, panel4_512, floats_512, round_row_512};

/* -- AVX2 ---------------------------------------------------------------------------------------------------------------- */

AVX2 INLINE __m256 scales256(const mr_panel *p, int group, int half) {
    size_t at = (size_t)group * PANEL + half * 8;
    if (p->wide) return _mm256_loadu_ps((const float *)p->scales + at);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p->scales + at * 2)));
}

/* Eight rows of the panel against `count` <= 4 rows of x. */
AVX2 INLINE void tile256(const int count, const int four, const int half, const mr_panel *p, const mr_rounded *x, int first, float *y) {
    const int bytes = PANEL * BLOCK / (four ? 2 : 1);
    const uint8_t *line = p->values + half * 32;
    const size_t stride = x->cols, blocks = x->blocks;
    const int8_t *values = x->values + first * stride;
    const float *scales = x->scales + first * blocks;
    const int32_t *offsets = x->offsets + first * blocks, *sums = x->sums + first * blocks;
    const __m256i ones = _mm256_set1_epi16(1), low_bits = _mm256_set1_epi8(15);
    __m256 made[4];
    for (int t = 0; t < count; t++) made[t] = _mm256_setzero_ps();
    for (int b = 0, group = 0; b < x->blocks; group++) {
        __m256 scale = scales256(p, group, half);
        __m256i zero = _mm256_setzero_si256();
        if (four && p->zeros)
            zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p->zeros + (size_t)group * PANEL + half * 8)));
        int stop = b + p->group_blocks < x->blocks ? b + p->group_blocks : x->blocks;
        for (; b < stop; b++, line += bytes) {
            const int8_t *at = values + b * BLOCK;
            __m256i dot[4];
            if (four) {
                /* 16 products of at most 15 * 127 in a lane of 16 bits: 30480, no overflow */
                for (int t = 0; t < count; t++) dot[t] = _mm256_setzero_si256();
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    __m256i both = _mm256_loadu_si256((const __m256i *)(line + j * 64));
                    __m256i low = _mm256_and_si256(both, low_bits), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_bits);
                    for (int t = 0; t < count; t++) {
                        __m256i a = _mm256_set1_epi32(four_bytes(at + t * stride + j * 4));
                        __m256i c = _mm256_set1_epi32(four_bytes(at + t * stride + 16 + j * 4));
                        dot[t] = _mm256_add_epi16(dot[t], _mm256_add_epi16(_mm256_maddubs_epi16(low, a), _mm256_maddubs_epi16(high, c)));
                    }
                }
                for (int t = 0; t < count; t++) {
                    __m256i start = p->zeros ? _mm256_mullo_epi32(zero, _mm256_set1_epi32(-sums[t * blocks + b]))
                                             : _mm256_set1_epi32(offsets[t * blocks + b]);
                    dot[t] = _mm256_add_epi32(_mm256_madd_epi16(dot[t], ones), start);
                }
            } else {
                for (int t = 0; t < count; t++) dot[t] = _mm256_setzero_si256();
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++) {
                    __m256i w = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(line + j * 64)), _mm256_set1_epi8(-128));
                    __m256i magnitude = _mm256_abs_epi8(w); /* of -128: 128, read as unsigned */
                    for (int t = 0; t < count; t++) {
                        /* two products of at most 128 * 127 in a lane of 16 bits: 32512, no overflow */
                        __m256i a = _mm256_sign_epi8(_mm256_set1_epi32(four_bytes(at + t * stride + j * 4)), w);
                        dot[t] = _mm256_add_epi32(dot[t], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, a), ones));
                    }
                }
            }
            for (int t = 0; t < count; t++)
                made[t] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(dot[t]), scale), _mm256_set1_ps(scales[t * blocks + b]), made[t]);
        }
    }
    int valid = p->valid - half * 8;
    for (int t = 0; t < count; t++) {
        float out[8];
        _mm256_storeu_ps(out, made[t]);
        float *to = y + (size_t)(first + t) * p->rows + p->row + half * 8;
        for (int r = 0; r < 8 && r < valid; r++) to[r] = out[r] + (p->bias ? p->bias[half * 8 + r] : 0.0f);
    }
}

#define CASE256(n) case n: tile256(n, four, half, p, x, first, y); break;
AVX2 INLINE void panel256(const int four, const mr_panel *p, const mr_rounded *x, int first, int count, float *y) {
    for (int stop = first + count; first < stop; first += 4) {
        for (int half = 0; half < (p->valid > 8 ? 2 : 1); half++) {
            switch (stop - first < 4 ? stop - first : 4) { CASE256(1) CASE256(2) CASE256(3) CASE256(4) }
        }
    }
}

AVX2 static void panel8_256(const mr_panel *p, const mr_rounded *x, int first, int count, float *y) {
    panel256(0, p, x, first, count, y);
}

AVX2 static void panel4_256(const mr_panel *p, const mr_rounded *x, int first, int count, float *y) {
    panel256(1, p, x, first, count, y);
}

AVX2 static void round_row_256(const float *x, int cols, int padded, int offset, int8_t *values, float *scales, int32_t *sums, int32_t *offsets) {
    for (int b = 0; b < padded / BLOCK; b++) {
        int left = cols - b * BLOCK;
        float tail[BLOCK] = {0};
        const float *from = x + b * BLOCK;
        if (left < BLOCK) {
            memcpy(tail, from, (left > 0 ? left : 0) * sizeof(float));
            from = tail;
        }
        __m256 part[4];
        __m256i most = _mm256_setzero_si256(), bits = _mm256_set1_epi32(0x7fffffff);
        for (int k = 0; k < 4; k++) {
            part[k] = _mm256_loadu_ps(from + 8 * k);
            most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(part[k]), bits));
        }
        uint32_t lanes[8];
        union { uint32_t u; float f; } largest = {0};
        _mm256_storeu_si256((__m256i *)lanes, most);
        for (int k = 0; k < 8; k++) largest.u = lanes[k] > largest.u ? lanes[k] : largest.u;
        float scale = largest.f / 127.0f, inverse = 127.0f / largest.f;
        if (largest.f < 1e-30f) scale = inverse = 0.0f; /* its inverse would not be finite */
        __m256i whole[4], sum = _mm256_setzero_si256();
        for (int k = 0; k < 4; k++) {
            whole[k] = _mm256_cvtps_epi32(_mm256_mul_ps(part[k], _mm256_set1_ps(inverse)));
            sum = _mm256_add_epi32(sum, whole[k]);
        }
        __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
        words = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)(values + b * BLOCK), words);
        int32_t sum_lanes[8], total = 0;
        _mm256_storeu_si256((__m256i *)sum_lanes, sum);
        for (int k = 0; k < 8; k++) total += sum_lanes[k];
        scales[b] = scale, sums[b] = total, offsets[b] = -offset * total;
    }
}

AVX2 INLINE __m256 eight(const int narrow, const void *values, size_t at) {
    if (!narrow) return _mm256_loadu_ps((const float *)values + at);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)values + at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 INLINE float sum256(__m256 v) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}

AVX2 INLINE void dots256(const int deep, const int count, const int narrow, const mr_matrix *w, const float *x, int row, int first, float *y) {
    const size_t cols = w->cols, begin = row * cols;
    const float *at = x + first * cols;
    __m256 made[4][4];
    for (int r = 0; r < deep; r++)
        for (int t = 0; t < count; t++) made[r][t] = _mm256_setzero_ps();
    size_t c = 0;
    for (; c + 8 <= cols; c += 8) {
        __m256 line[4];
        for (int r = 0; r < deep; r++) line[r] = eight(narrow, w->values, begin + r * cols + c);
        for (int t = 0; t < count; t++) {
            __m256 value = _mm256_loadu_ps(at + t * cols + c);
            for (int r = 0; r < deep; r++) made[r][t] = _mm256_fmadd_ps(line[r], value, made[r][t]);
        }
    }
    for (int r = 0; r < deep; r++)
        for (int t = 0; t < count; t++) {
            float sum = sum256(made[r][t]);
            for (size_t k = c; k < cols; k++) {
                size_t i = begin + r * cols + k;
                float value = narrow ? mr_bf16_to_float(((const uint16_t *)w->values)[i]) : ((const float *)w->values)[i];
                sum = __builtin_fmaf(value, at[t * cols + k], sum);
            }
            y[(size_t)(first + t) * w->rows + row + r] = sum + (w->bias ? w->bias[row + r] : 0.0f);
        }
}

#define FLOATS256(deep, n) case n: dots256(deep, n, narrow, w, x, row, first, y); break;
AVX2 INLINE void floats256(const int narrow, const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    for (int row = begin; row < end;) { /* rows outside: these few are read from memory once, then from the cache */
        int deep = row + 4 <= end ? 4 : 1;
        for (int first = 0; first < n; first += 4) {
            int count = n - first < 4 ? n - first : 4;
            if (deep == 4) {
                switch (count) {
                    FLOATS256(4, 1) FLOATS256(4, 2)
                    case 3: dots256(2, 3, narrow, w, x, row, first, y); dots256(2, 3, narrow, w, x, row + 2, first, y); break;
                    case 4: dots256(2, 4, narrow, w, x, row, first, y); dots256(2, 4, narrow, w, x, row + 2, first, y); break;
                }
            } else {
                switch (count) { FLOATS256(1, 1) FLOATS256(1, 2) FLOATS256(1, 3) FLOATS256(1, 4) }
            }
        }
        row += deep;
    }
}

AVX2 static void floats_256(const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    if (w->format == MR_BF16)
        floats256(1, w, x, n, begin, end, y);
    else
        floats256(0, w, x, n, begin, end, y);
}

const mr_kernels mr_avx2 = {panel8_256, panel4_256, floats_256, round_row_256};
#else
typedef int mr_no_x86; /* a file may not be empty */
#endif
