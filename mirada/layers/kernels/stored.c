/* Matrices as checkpoints store them, row by row, whatever their groups: widened to float32 a few rows at a time, in a cache, where
 * the kernels for floats multiply by them. Values are those of the stored numbers, and activations are never rounded.
 *
 *   MR_STORED8  [rows, cols] bytes, the number + its zero (128 without zeros)
 *   MR_STORED4  [rows, ceil(cols / 2)] bytes, the even column in the low half, the number + its zero (8 without zeros)
 *   MR_E4M3     [rows, cols] floats of 8 bits: sign, 4 bits of exponent less 7, 3 of fraction; no infinities
 *
 * Scales float16 or float32 [rows, groups], zeros bytes [rows, groups] or NULL; a group is any number of columns.
 */
#include "gemm.h"

#define ROWS 4              /* that are widened at a time: as many as the kernels for floats take together */
#define LONG_GROUP 96       /* columns from which halves of bytes are taken apart group by group, not for a whole row first */
#define MOST_HELD (1 << 18) /* numbers of them; of wider matrices one row is */

INLINE float of_e4m3(uint8_t value) {
    /* without a branch, so that compilers make vectors of it; numbers below the least normal one are fractions of 2^-9 */
    int32_t bits = value & 0x7f, small = (bits - 8) >> 31;
    union { int32_t i; float f; } normal = {(bits << 20) + (120 << 23)}, least = {.f = (float)bits * 0x1p-9f}, made;
    made.i = (least.i & small) | (normal.i & ~small) | (int32_t)((uint32_t)(value & 0x80) << 24);
    return made.f;
}

INLINE float scale_at(const mr_matrix *w, size_t at) {
    return w->wide ? ((const float *)w->scales)[at] : mr_half_to_float(((const uint16_t *)w->scales)[at]);
}

/* Columns [begin, end) of one row. */
INLINE void widen_eights(const uint8_t *restrict from, int begin, int end, int32_t zero, float scale, float *restrict to) {
    for (int c = begin; c < end; c++) to[c] = (float)((int32_t)from[c] - zero) * scale;
}

INLINE void widen_floats(const uint8_t *restrict from, int begin, int end, float scale, float *restrict to) {
    for (int c = begin; c < end; c++) to[c] = of_e4m3(from[c]) * scale;
}

INLINE void widen_fours(const uint8_t *restrict from, int begin, int end, int32_t zero, float scale, float *restrict to) {
    if (begin % 2 && begin < end) to[begin] = (float)((int32_t)(from[begin / 2] >> 4) - zero) * scale, begin++;
    const uint8_t *restrict pairs = from + begin / 2;
    float *restrict whole = to + begin;
    int count = (end - begin) / 2;
    for (int i = 0; i < count; i++) {
        whole[2 * i] = (float)((int32_t)(pairs[i] & 15) - zero) * scale;
        whole[2 * i + 1] = (float)((int32_t)(pairs[i] >> 4) - zero) * scale;
    }
    if (begin + 2 * count < end) to[end - 1] = (float)((int32_t)(from[(end - 1) / 2] & 15) - zero) * scale;
}

/* Numbers that were widened as they are, with a zero of 0 and a scale of 1. */
INLINE void scale_group(int begin, int end, float zero, float scale, float *restrict to) {
    for (int c = begin; c < end; c++) to[c] = (to[c] - zero) * scale;
}

INLINE void widen_row(const int format, const mr_matrix *w, size_t row, float *to) {
    int width = w->group ? w->group : w->cols, groups = mr_groups(w->cols, w->group);
    const uint8_t *from = (const uint8_t *)w->values + row * (format == MR_STORED4 ? (w->cols + 1) / 2 : w->cols);
    int apart = format == MR_STORED4 && width < LONG_GROUP;
    if (apart) widen_fours(from, 0, w->cols, 0, 1.0f, to);
    for (int g = 0; g < groups; g++) {
        size_t at = row * groups + g;
        int begin = g * width, end = w->cols - begin < width ? w->cols : begin + width;
        int32_t zero = w->zeros ? ((const uint8_t *)w->zeros)[at] : format == MR_STORED4 ? 8 : 128;
        float scale = scale_at(w, at);
        if (apart)
            scale_group(begin, end, (float)zero, scale, to);
        else if (format == MR_STORED4)
            widen_fours(from, begin, end, zero, scale, to);
        else if (format == MR_STORED8)
            widen_eights(from, begin, end, zero, scale, to);
        else
            widen_floats(from, begin, end, scale, to);
    }
}

INLINE void widen_rows(const mr_matrix *w, int begin, int count, float *to) {
    for (int i = 0; i < count; i++, to += w->cols) {
        if (w->format == MR_STORED4)
            widen_row(MR_STORED4, w, begin + i, to);
        else if (w->format == MR_STORED8)
            widen_row(MR_STORED8, w, begin + i, to);
        else
            widen_row(MR_E4M3, w, begin + i, to);
    }
}

/* The same code for each instruction set: compilers make vectors of its loops. */
static void widen_plain(const mr_matrix *w, int begin, int count, float *to) { widen_rows(w, begin, count, to); }
#if defined(__x86_64__)
__attribute__((target("avx2,fma,f16c"))) static void widen_256(const mr_matrix *w, int begin, int count, float *to) {
    widen_rows(w, begin, count, to);
}
__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))) static void widen_512(const mr_matrix *w, int begin, int count, float *to) {
    widen_rows(w, begin, count, to);
}
#endif

/* Rows [begin, begin + count) as float32 [count, cols]. */
void mr_widen_stored(const mr_matrix *w, int begin, int count, float *to) {
#if defined(__x86_64__)
    if (mr_kernel() == &mr_avx512) {
        widen_512(w, begin, count, to);
        return;
    }
    if (mr_kernel() == &mr_avx2) {
        widen_256(w, begin, count, to);
        return;
    }
#endif
    widen_plain(w, begin, count, to);
}

/* Rows [begin, end) of y for n rows of x. */
void mr_rows_stored(const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    int step = w->cols > MOST_HELD / ROWS ? 1 : ROWS;
    float held[(size_t)step * w->cols];
    mr_matrix part = {.format = MR_F32, .rows = w->rows, .cols = w->cols, .values = held};
    for (int row = begin; row < end; row += step) {
        int count = end - row < step ? end - row : step;
        mr_widen_stored(w, row, count, held);
        part.bias = w->bias ? w->bias + row : NULL;
        mr_kernel()->floats(&part, x, n, 0, count, y + row);
    }
}
