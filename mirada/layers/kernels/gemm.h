/* What the files of the matrix products share; nothing here is for others.
 *
 * Integers are kept in panels of 16 rows (zeros fill the last one), a panel in blocks of 32 columns (zeros fill the last
 * group), so that all of a panel streams:
 *   INT8  block = 8 lines of 64 bytes; line j holds columns 4j .. 4j+3 of row 0, then of row 1, ..; a byte is the number + 128.
 *   INT4  block = 4 lines of 64 bytes; low halves hold columns 4j .. 4j+3 of row 0, then of row 1, .., high halves 16 more.
 * Scales and zeros: for each panel and group, 16 of them.
 * Activations are rounded to 8 bits in blocks of 32, each with a scale of its own: no row and no block changes another.
 */
#ifndef MIRADA_GEMM_H
#define MIRADA_GEMM_H

#include "cpu.h"

#define PANEL 16
#define BLOCK 32
#define MOST_TILE 12 /* rows of x that one pass over a panel takes */
#define ALIGN(n, to) (((size_t)(n) + (to)-1) / (to) * (to))
#define INLINE static inline __attribute__((always_inline))

enum mr_isa { MR_SCALAR = 0, MR_AVX2 = 1, MR_AVX512 = 2 };

/* x as integers: for each of n rows `cols` values (padded), and for each block a scale, the sum, and the sum times the
 * constant that weights are stored above their value (-128 or -8). */
typedef struct {
    const int8_t *values;
    const float *scales;
    const int32_t *sums, *offsets;
    int cols, blocks;
} mr_rounded;

/* A panel of integers. */
typedef struct {
    const uint8_t *values;
    const uint8_t *scales;
    const uint8_t *zeros;
    int wide;
    int group_blocks; /* blocks that share scales */
    int valid;        /* rows of the panel that exist */
    const float *bias;
    int row, rows; /* its first row, and those of the matrix */
} mr_panel;

typedef struct {
    /* Rows [row, row + panel->valid) of y for `count` <= MOST_TILE rows of x from `first` on. */
    void (*panel8)(const mr_panel *panel, const mr_rounded *x, int first, int count, float *y);
    void (*panel4)(const mr_panel *panel, const mr_rounded *x, int first, int count, float *y);
    /* The same for F32 and BF16, rows [begin, end) of y and any count. */
    void (*floats)(const mr_matrix *w, const float *x, int n, int begin, int end, float *y);
    /* One row of x [cols] to values [padded], scales, sums and offsets [padded / 32]. */
    void (*round_row)(const float *x, int cols, int padded, int offset, int8_t *values, float *scales, int32_t *sums, int32_t *offsets);
    /* `floats` for so many rows of x that rows of w are worth being turned first; another order of sums. NULL: there is none. */
    void (*many)(const mr_matrix *w, const float *x, int n, int begin, int end, float *y);
} mr_kernels;

extern const mr_kernels mr_scalar;
#if defined(__x86_64__)
extern const mr_kernels mr_avx2, mr_avx512;
/* floats_x86.c */
void mr_floats_avx2(const mr_matrix *w, const float *x, int n, int begin, int end, float *y);
void mr_floats_avx512(const mr_matrix *w, const float *x, int n, int begin, int end, float *y);
void mr_many_avx2(const mr_matrix *w, const float *x, int n, int begin, int end, float *y);
void mr_many_avx512(const mr_matrix *w, const float *x, int n, int begin, int end, float *y);
#endif

/* stored.c: as mr_widen and mr_rows, of matrices as checkpoints store them. */
void mr_widen_stored(const mr_matrix *w, int begin, int count, float *to);
void mr_rows_stored(const mr_matrix *w, const float *x, int n, int begin, int end, float *y);
static inline int mr_is_stored(int format) { return format >= MR_STORED8; }

/* The ones in use: the best that the processor has, or what mr_set_isa chose. */
const mr_kernels *mr_kernel(void);

static inline int mr_padded_cols(int cols, int group) { return (int)ALIGN(cols, group > BLOCK ? group : BLOCK); }
static inline int mr_groups(int cols, int group) { return group ? (cols + group - 1) / group : 1; }

static inline float mr_half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    union { uint32_t u; float f; } made;
    if (exponent == 0) { /* zero, or below the least normal number: fraction * 2^-24 */
        made.f = (float)fraction * 0x1p-24f;
        made.u |= sign;
    } else {
        made.u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    }
    return made.f;
}

static inline float mr_bf16_to_float(uint16_t value) {
    union { uint32_t u; float f; } made = {(uint32_t)value << 16};
    return made.f;
}

#endif
