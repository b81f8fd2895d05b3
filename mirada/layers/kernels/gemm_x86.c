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

const mr_kernels mr_avx512 = {panel8_512, panel4_512, mr_floats_avx512, round_row_512, mr_many_avx512};

/* -- AVX2 ---------------------------------------------------------------------------------------------------------------- */

AVX2 INLINE __m256 scales256(const mr_panel *p, int group, int half) {
    size_t at = (size_t)group * PANEL + half * 8;
    if (p->wide) return _mm256_loadu_ps((const float *)p->scales + at);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p->scales + at * 2)));
}

/* What the sums of a block come to: `low` and (INT8) 16 times `high`, less the weights' offset, times both scales. */
AVX2 INLINE __m256 scaled256(const int four, const int zeros, __m256i low, __m256i high, __m256i zero, int32_t offset, __m256 scale, float by, __m256 sum) {
    __m256i dot = _mm256_madd_epi16(low, _mm256_set1_epi16(1)), start = _mm256_set1_epi32(offset);
    if (!four) dot = _mm256_add_epi32(dot, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    dot = zeros ? _mm256_sub_epi32(dot, _mm256_mullo_epi32(zero, start)) : _mm256_add_epi32(dot, start);
    return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale), _mm256_set1_ps(by), sum);
}

/* sum += the products of bytes of w, unsigned, and of x, in pairs. Written like this a compiler has no other products wait in
 * registers that it lacks then: sums that go through memory took twice as long. */
AVX2 INLINE __m256i pairs256(__m256i sum, __m256i w, __m256i x) {
    __m256i product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(w), "x"(x));
    return sum;
}

/* Eight rows of a block against `count` rows of x (INT4: up to 8, INT8: up to 4), whose sums so far are made[0 .. count).
 *
 * Bytes are taken apart into halves of at most 15, so that a block's products of one row, 16 of at most 15 * 127 in a lane of 16
 * bits, are summed without widening: 30480, no overflow. Sums have names, not indices, and the loop is not unrolled: then
 * compilers keep all of them in registers. */
AVX2 INLINE void block256(const int count, const int four, const int zeros, const uint8_t *line, const int8_t *at, size_t stride,
                          const float *scales, const int32_t *offsets, size_t blocks, __m256 scale, __m256i zero, __m256 *made) {
    const __m256i bits = _mm256_set1_epi8(15);
    __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0, sum2 = sum0, sum3 = sum0, sum4 = sum0, sum5 = sum0, sum6 = sum0, sum7 = sum0;
#define FOUR256(t)                                                                                           \
    if (four && t < count) {                                                                                 \
        sum##t = pairs256(sum##t, low, _mm256_set1_epi32(four_bytes(at + t * stride)));                      \
        sum##t = pairs256(sum##t, high, _mm256_set1_epi32(four_bytes(at + t * stride + 16)));                \
    }
#define EIGHT256(t, more)                                                                                    \
    if (!four && t < count) {                                                                                \
        __m256i x = _mm256_set1_epi32(four_bytes(at + t * stride));                                          \
        sum##t = pairs256(sum##t, low, x), sum##more = pairs256(sum##more, high, x);                         \
    }
    int lines = four ? 4 : 8;
    __asm__("" : "+r"(lines)); /* else it is unrolled */
    for (; lines > 0; lines--, line += 64, at += 4) {
        __m256i low = _mm256_loadu_si256((const __m256i *)line), high = _mm256_and_si256(_mm256_srli_epi16(low, 4), bits);
        low = _mm256_and_si256(low, bits);
        FOUR256(0) FOUR256(1) FOUR256(2) FOUR256(3) FOUR256(4) FOUR256(5) FOUR256(6) FOUR256(7)
        EIGHT256(0, 4) EIGHT256(1, 5) EIGHT256(2, 6) EIGHT256(3, 7)
    }
#define SCALE256(t, more) \
    if (t < count && (four || t < 4)) made[t] = scaled256(four, zeros, sum##t, sum##more, zero, offsets[t * blocks], scale, scales[t * blocks], made[t]);
    SCALE256(0, 4) SCALE256(1, 5) SCALE256(2, 6) SCALE256(3, 7) SCALE256(4, 0) SCALE256(5, 0) SCALE256(6, 0) SCALE256(7, 0)
}

/* A block against one row of x. */
AVX2 INLINE void one_block256(const int four, const int zeros, const uint8_t *line, const int8_t *at, float by, int32_t offset, const __m256 *scale, const __m256i *zero, __m256 *made) {
    const __m256i bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int j = 0; j < (four ? 4 : 8); j++) {
        __m256i x = _mm256_set1_epi32(four_bytes(at + j * 4)), more = four ? _mm256_set1_epi32(four_bytes(at + 16 + j * 4)) : x;
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m256i w = _mm256_loadu_si256((const __m256i *)(line + j * 64 + half * 32));
            if (four) {
                sum[half] = pairs256(sum[half], _mm256_and_si256(w, bits), x);
                sum[half] = pairs256(sum[half], _mm256_and_si256(_mm256_srli_epi16(w, 4), bits), more);
            } else { /* for one row, signs cost less than halves: two products of at most 128 * 127, no overflow */
                w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                __m256i product = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                sum[half] = _mm256_add_epi32(sum[half], _mm256_madd_epi16(product, ones));
            }
        }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        if (four)
            made[half] = scaled256(1, zeros, sum[half], sum[half], zero[half], offset, scale[half], by, made[half]);
        else
            made[half] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[half]), scale[half]), _mm256_set1_ps(by), made[half]);
    }
}

/* A panel against step * many + rest rows of x, of which `step` share what is taken apart. Each block comes from memory once. */
AVX2 INLINE void tile256(const int many, const int rest, const int four, const int zeros, const mr_panel *p, const mr_rounded *x, int first, float *y) {
    const int bytes = PANEL * BLOCK / (four ? 2 : 1), step = four ? 8 : 4, count = step * many + rest;
    const uint8_t *line = p->values;
    const size_t stride = x->cols, blocks = x->blocks;
    const int8_t *values = x->values + first * stride;
    const float *scales = x->scales + first * blocks;
    const int32_t *offsets = (zeros ? x->sums : x->offsets) + first * blocks;
    __m256 made[2 * MOST_TILE]; /* of the first half of the panel, then of the second; one row: both side by side */
    for (int t = 0; t < 2 * count; t++) made[t] = _mm256_setzero_ps();
    for (int b = 0, group = 0; b < x->blocks; group++) {
        __m256 scale[2] = {scales256(p, group, 0), scales256(p, group, 1)};
        __m256i zero[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int half = 0; half < 2 && zeros; half++)
            zero[half] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p->zeros + (size_t)group * PANEL + half * 8)));
        int stop = b + p->group_blocks < x->blocks ? b + p->group_blocks : x->blocks;
        for (; b < stop; b++, line += bytes) {
            const int8_t *at = values + b * BLOCK;
#pragma GCC unroll 8
            for (int ahead = 0; ahead < bytes; ahead += 64) _mm_prefetch((const char *)line + AHEAD + ahead, _MM_HINT_T0);
            if (!many && rest == 1) {
                one_block256(four, zeros, line, at, scales[b], offsets[b], scale, zero, made);
                continue;
            }
            int half = 0;
            __asm__("" : "+r"(half)); /* else both halves are made into one, for which registers do not suffice */
            for (; half < 2; half++) {
                const uint8_t *lines = line + half * 32;
                __m256 *to = made + half * count;
                for (int t = 0; t < step * many; t += step)
                    block256(step, four, zeros, lines, at + t * stride, stride, scales + t * blocks + b, offsets + t * blocks + b, blocks,
                             scale[half], zero[half], to + t);
                const size_t t = step * many;
                if (rest)
                    block256(rest, four, zeros, lines, at + t * stride, stride, scales + t * blocks + b, offsets + t * blocks + b, blocks,
                             scale[half], zero[half], to + t);
            }
        }
    }
    float bias[PANEL] = {0}, out[PANEL];
    if (p->bias) memcpy(bias, p->bias, p->valid * sizeof(float));
    for (int t = 0; t < count; t++) {
        float *to = y + (size_t)(first + t) * p->rows + p->row, *whole = p->valid == PANEL ? to : out;
        _mm256_storeu_ps(whole, _mm256_add_ps(made[t], _mm256_loadu_ps(bias)));
        _mm256_storeu_ps(whole + 8, _mm256_add_ps(made[count + t], _mm256_loadu_ps(bias + 8)));
        if (whole == out) memcpy(to, out, p->valid * sizeof(float));
    }
}

#define CASE256(n, many, rest) case n: tile256(many, rest, four, zeros, p, x, first, y); break;
AVX2 INLINE void panel256(const int four, const int zeros, const mr_panel *p, const mr_rounded *x, int first, int count, float *y) {
    const int step = four ? 8 : 4;
    switch (count) {
        CASE256(1, 0, 1) CASE256(2, 0, 2) CASE256(3, 0, 3)
        CASE256(4, 4 / step, 4 % step) CASE256(5, 5 / step, 5 % step) CASE256(6, 6 / step, 6 % step) CASE256(7, 7 / step, 7 % step)
        CASE256(8, 8 / step, 8 % step) CASE256(9, 9 / step, 9 % step) CASE256(10, 10 / step, 10 % step) CASE256(11, 11 / step, 11 % step)
        CASE256(12, 12 / step, 12 % step)
    }
}

AVX2 static void panel8_256(const mr_panel *p, const mr_rounded *x, int first, int count, float *y) {
    panel256(0, 0, p, x, first, count, y);
}

AVX2 static void panel4_256(const mr_panel *p, const mr_rounded *x, int first, int count, float *y) {
    if (p->zeros)
        panel256(1, 1, p, x, first, count, y);
    else
        panel256(1, 0, p, x, first, count, y);
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

const mr_kernels mr_avx2 = {panel8_256, panel4_256, mr_floats_avx2, round_row_256, mr_many_avx2};
#else
typedef int mr_no_x86; /* a file may not be empty */
#endif
