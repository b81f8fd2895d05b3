/* Between the canonical form of integers (row by row) and panels, and from floats to integers.
 *
 * Canonical: INT8 [rows, cols] bytes, the number + 128; INT4 [rows, ceil(cols / 2)] bytes, the even column in the low half;
 * scales float32 [rows, groups]; zeros bytes [rows, groups], or NULL for 128 and 8.
 */
#include "gemm.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

static uint16_t float_to_half(float value) { /* to nearest, ties to even */
    union { float f; uint32_t u; } in = {value};
    uint32_t sign = in.u >> 16 & 0x8000, most = in.u & 0x7fffffffu;
    if (most > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (most >= 0x47800000u) return (uint16_t)(sign | 0x7c00);
    if (most < 0x38800000u) { /* below the least normal number: adding this moves the bits to their place, rounded */
        union { float f; uint32_t u; } moved = {.u = most};
        moved.f += 0.5f;
        return (uint16_t)(sign | (moved.u - 0x3f000000u));
    }
    uint32_t odd = most >> 13 & 1;
    return (uint16_t)(sign | ((most + 0xc8000fffu + odd) >> 13));
}

static size_t place(int lane, int col, int four) { /* of a column in its block */
    int low = four ? col % 16 : col;
    return (size_t)low / 4 * 64 + lane * 4 + low % 4;
}

/* Bytes of values, scales and zeros in panels. */
void mr_packed_bytes(int format, int rows, int cols, int group, int wide, size_t *made) {
    size_t padded = ALIGN(rows, PANEL), scales = padded * mr_groups(cols, group);
    made[0] = padded * mr_padded_cols(cols, group) / (format == MR_INT4 ? 2 : 1);
    made[1] = scales * (wide ? 4 : 2);
    made[2] = scales;
}

/* Canonical rows into rows [begin, begin + count) of w, whose buffers are written (they begin as zeros). */
void mr_pack(const mr_matrix *w, int begin, int count, const uint8_t *values, const float *scales, const uint8_t *zeros) {
    int four = w->format == MR_INT4, padded = mr_padded_cols(w->cols, w->group), groups = mr_groups(w->cols, w->group);
    int blocks = padded / BLOCK, stride = four ? (w->cols + 1) / 2 : w->cols;
    size_t block_bytes = (size_t)PANEL * BLOCK / (four ? 2 : 1);
    for (int i = 0; i < count; i++) {
        int row = begin + i, lane = row % PANEL;
        const uint8_t *from = values + (size_t)i * stride;
        uint8_t *to = (uint8_t *)w->values + (size_t)(row / PANEL) * blocks * block_bytes;
        for (int b = 0; b < blocks; b++, to += block_bytes) {
            int left = w->cols - b * BLOCK, width = left > BLOCK ? BLOCK : left;
            if (four) {
                uint8_t one[BLOCK] = {0};
                for (int c = 0; c < width; c++) one[c] = from[(b * BLOCK + c) / 2] >> (c % 2 ? 4 : 0) & 15;
                for (int c = 0; c < 16; c++) to[place(lane, c, 1)] = (uint8_t)(one[c] | one[c + 16] << 4);
            } else if (width == BLOCK) {
                for (int j = 0; j < 8; j++) memcpy(to + j * 64 + lane * 4, from + b * BLOCK + j * 4, 4);
            } else {
                for (int c = 0; c < width; c++) to[place(lane, c, 0)] = from[b * BLOCK + c];
            }
        }
        for (int g = 0; g < groups; g++) {
            size_t at = ((size_t)(row / PANEL) * groups + g) * PANEL + lane, source = (size_t)i * groups + g;
            if (w->wide)
                ((float *)w->scales)[at] = scales[source];
            else
                ((uint16_t *)w->scales)[at] = float_to_half(scales[source]);
            if (w->zeros) ((uint8_t *)w->zeros)[at] = zeros ? zeros[source] : 8;
        }
    }
}

/* The reverse of mr_pack. `zeros` may be NULL. */
void mr_unpack(const mr_matrix *w, int begin, int count, uint8_t *values, float *scales, uint8_t *zeros) {
    int four = w->format == MR_INT4, padded = mr_padded_cols(w->cols, w->group), groups = mr_groups(w->cols, w->group);
    int stride = four ? (w->cols + 1) / 2 : w->cols;
    size_t block_bytes = (size_t)PANEL * BLOCK / (four ? 2 : 1);
    memset(values, 0, (size_t)count * stride);
    for (int i = 0; i < count; i++) {
        int row = begin + i, lane = row % PANEL;
        const uint8_t *from = (const uint8_t *)w->values + (size_t)(row / PANEL) * (padded / BLOCK) * block_bytes;
        uint8_t *to = values + (size_t)i * stride;
        for (int c = 0; c < w->cols; c++) {
            uint8_t byte = from[c / BLOCK * block_bytes + place(lane, c % BLOCK, four)];
            if (four)
                to[c / 2] |= (uint8_t)((c % BLOCK < 16 ? byte & 15 : byte >> 4) << (c % 2 ? 4 : 0));
            else
                to[c] = byte;
        }
        for (int g = 0; g < groups; g++) {
            size_t at = ((size_t)(row / PANEL) * groups + g) * PANEL + lane, target = (size_t)i * groups + g;
            scales[target] = w->wide ? ((const float *)w->scales)[at] : mr_half_to_float(((const uint16_t *)w->scales)[at]);
            if (zeros) zeros[target] = w->zeros ? ((const uint8_t *)w->zeros)[at] : 8;
        }
    }
}

/* Rows [begin, begin + count) as float32 [count, cols]. */
void mr_widen(const mr_matrix *w, int begin, int count, float *to) {
    if (mr_is_stored(w->format)) {
        mr_widen_stored(w, begin, count, to);
        return;
    }
    if (w->format == MR_F32) {
        memcpy(to, (const float *)w->values + (size_t)begin * w->cols, (size_t)count * w->cols * sizeof(float));
        return;
    }
    if (w->format == MR_BF16) {
        const uint16_t *from = (const uint16_t *)w->values + (size_t)begin * w->cols;
        for (size_t i = 0; i < (size_t)count * w->cols; i++) to[i] = mr_bf16_to_float(from[i]);
        return;
    }
    int four = w->format == MR_INT4, padded = mr_padded_cols(w->cols, w->group), groups = mr_groups(w->cols, w->group);
    int width = w->group ? w->group : w->cols;
    size_t block_bytes = (size_t)PANEL * BLOCK / (four ? 2 : 1);
    for (int i = 0; i < count; i++, to += w->cols) {
        int row = begin + i, lane = row % PANEL;
        const uint8_t *from = (const uint8_t *)w->values + (size_t)(row / PANEL) * (padded / BLOCK) * block_bytes;
        for (int g = 0; g < groups; g++) {
            size_t at = ((size_t)(row / PANEL) * groups + g) * PANEL + lane;
            float scale = w->wide ? ((const float *)w->scales)[at] : mr_half_to_float(((const uint16_t *)w->scales)[at]);
            int zero = four ? w->zeros ? ((const uint8_t *)w->zeros)[at] : 8 : 128;
            int end = (g + 1) * width < w->cols ? (g + 1) * width : w->cols;
            for (int c = g * width; c < end; c++) {
                uint8_t byte = from[(size_t)(c / BLOCK) * block_bytes + place(lane, c % BLOCK, four)];
                to[c] = (float)((int)(four ? c % BLOCK < 16 ? byte & 15 : byte >> 4 : byte) - zero) * scale;
            }
        }
    }
}

static float as_half(float value) { return mr_half_to_float(float_to_half(value)); }

typedef float four_floats __attribute__((vector_size(16)));
typedef int32_t four_ints __attribute__((vector_size(16)));
#define QUADS(width) ((width) / 4) /* widths here are padded with zeros to blocks */

/* To whole numbers, ties to even, for magnitudes below 2^22: sums of this size have no bits left for fractions. */
static inline four_floats whole(four_floats x) {
    const four_floats shift = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
    return (x + shift) - shift;
}

static inline four_floats same(float x) { return (four_floats){x, x, x, x}; }

#if defined(__x86_64__)
static inline four_floats clamped(four_floats x, float low, float high) { return _mm_min_ps(_mm_max_ps(x, same(low)), same(high)); }
#else
static inline four_floats chosen(four_ints where, four_floats yes, four_floats no) {
    return (four_floats)(((four_ints)yes & where) | ((four_ints)no & ~where));
}

static inline four_floats clamped(four_floats x, float low, float high) {
    x = chosen(x < same(low), same(low), x);
    return chosen(x > same(high), same(high), x);
}
#endif

static inline float total(four_floats x) { return (x[0] + x[1]) + (x[2] + x[3]); }

/* Integers of one group for a scale, plus `zero`. */
static void divide(const four_floats *x, int width, float scale, float low, float high, float zero, uint8_t *to) {
    four_floats divisor = same(scale == 0.0f ? 1.0f : scale); /* so small that all become zero */
    for (int q = 0; q < QUADS(width); q++) {
        four_floats value = clamped(whole(x[q] / divisor), low, high) + same(zero);
        for (int k = 0; k < 4; k++) to[q * 4 + k] = (uint8_t)(int)value[k];
    }
}

static float round_int8(const four_floats *x, int width, float most, uint8_t *to) {
    float scale = as_half(fabsf(most) / 127.0f);
    divide(x, width, scale, -127.0f, 127.0f, 128.0f, to);
    return scale;
}

/* -8 .. 7, of which the value of largest magnitude takes about -8. Several scales are tried, and the one of least squared
 * error stays. (As make_qx_quants of ggml-quants.c in ggml-org/ggml, unweighted.) */
static float round_int4(const four_floats *x, int width, float most, uint8_t *to) {
    float best = 0.0f, gain = -1.0f;
    for (int step = -6; step <= 6 && most != 0.0f; step++) {
        four_floats inverse = same((-8.0f + 0.1f * (float)step) / most), products = {0}, squares = {0};
        for (int q = 0; q < QUADS(width); q++) {
            four_floats value = clamped(whole(x[q] * inverse), -8.0f, 7.0f);
            products += value * x[q], squares += value * value;
        }
        /* with the best scale for these integers, product / square, the error falls by product^2 / square */
        float product = total(products), square = total(squares);
        if (square > 0.0f && product * product > gain * square) gain = product * product / square, best = product / square;
    }
    float scale = as_half(best);
    divide(x, width, scale, -8.0f, 7.0f, 8.0f, to);
    return scale;
}

/* Floats [count, cols] to canonical integers and scales, which are float16 numbers. Returns 1 if some floats are not finite
 * or too large for that, 2 without memory. */
int mr_quantise(int format, int group, const float *x, int count, int cols, uint8_t *values, float *scales) {
    int width = group ? group : cols, groups = mr_groups(cols, group), four = format == MR_INT4, failed = 0;
    size_t stride = four ? (cols + 1) / 2 : cols, padded = ALIGN(width, BLOCK);
    char *memory = malloc(padded * (sizeof(float) + 1) + 15);
    if (!memory) return 2;
    four_floats *part = (four_floats *)(((uintptr_t)memory + 15) / 16 * 16);
    uint8_t *one = (uint8_t *)part + padded * sizeof(float);
    for (int i = 0; i < count; i++) {
        for (int g = 0; g < groups; g++) {
            int begin = g * width, size = begin + width < cols ? width : cols - begin;
            const float *from = x + (size_t)i * cols + begin;
            float most = 0.0f, *filled = (float *)part;
            memcpy(filled, from, size * sizeof(float));
            memset(filled + size, 0, (padded - size) * sizeof(float));
            for (int c = 0; c < size; c++) {
                if (!(fabsf(from[c]) < 500000.0f)) failed = 1;
                most = fabsf(from[c]) > fabsf(most) ? from[c] : most;
            }
            if (failed) break;
            float scale = four ? round_int4(part, (int)padded, most, one) : round_int8(part, (int)padded, most, one);
            scales[(size_t)i * groups + g] = scale;
            if (!four) {
                memcpy(values + (size_t)i * stride + begin, one, size);
                continue;
            }
            uint8_t *to = values + (size_t)i * stride + begin / 2; /* groups are even, or there is only one */
            for (int c = 0; c + 1 < size; c += 2) to[c / 2] = (uint8_t)(one[c] | one[c + 1] << 4);
            if (size % 2) to[size / 2] = one[size - 1];
        }
    }
    free(memory);
    return failed;
}

/* A number that any change of the bytes changes but for one time in 2^64; as fast as memory. `size` in bytes. */
uint64_t mr_checksum(const uint8_t *data, size_t size) {
    uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8}, word;
    size_t i = 0;
    for (; i + 64 <= size; i += 64)
        for (int k = 0; k < 8; k++) {
            memcpy(&word, data + i + 8 * k, 8);
            lanes[k] = (lanes[k] ^ word) * 0x9e3779b97f4a7c15u;
            lanes[k] ^= lanes[k] >> 29;
        }
    uint64_t sum = size;
    for (; i < size; i++) sum = (sum ^ data[i]) * 0x100000001b3u;
    for (int k = 0; k < 8; k++) sum = (sum ^ lanes[k]) * 0xff51afd7ed558ccdu, sum ^= sum >> 32;
    return sum;
}

/* -- straight from floats to panels -------------------------------------------------------------------------------------- */

typedef struct {
    const mr_matrix *w;
    const void *x;
    int begin, count, narrow;
    _Atomic int failed;
} filling;

static void fill_part(void *context, int part, int parts) {
    filling *f = context;
    int cols = f->w->cols, four = f->w->format == MR_INT4, groups = mr_groups(cols, f->w->group);
    size_t stride = four ? (cols + 1) / 2 : cols;
    /* One row at a time: the buffers are small, and are read again while they are in the cache. */
    char *memory = malloc(cols * sizeof(float) + groups * sizeof(float) + stride);
    if (!memory) {
        f->failed = 2;
        return;
    }
    float *row = (float *)memory, *scales = row + cols;
    uint8_t *values = (uint8_t *)(scales + groups);
    int first = (int)((int64_t)f->count * part / parts), stop = (int)((int64_t)f->count * (part + 1) / parts);
    for (int i = first; i < stop; i++) {
        const float *from = (const float *)f->x + (size_t)i * cols;
        if (f->narrow) {
            const uint16_t *stored = (const uint16_t *)f->x + (size_t)i * cols;
            for (int c = 0; c < cols; c++) row[c] = mr_bf16_to_float(stored[c]);
            from = row;
        }
        int failed = mr_quantise(f->w->format, f->w->group, from, 1, cols, values, scales);
        if (failed) {
            f->failed = failed;
            break;
        }
        mr_pack(f->w, f->begin + i, 1, values, scales, NULL);
    }
    free(memory);
}

/* Rows [begin, begin + count) of w from floats [count, cols], or bfloat16 if `narrow`: what mr_quantise and mr_pack make.
 * Returns what mr_quantise does. */
int mr_fill(const mr_matrix *w, int begin, int count, int narrow, const void *x) {
    filling f = {w, x, begin, count, narrow, 0};
    mr_parallel(fill_part, &f);
    return f.failed;
}
