/* Products with matrices of every format: choice of kernels, plain C kernels, and the walk over panels. */
#include "gemm.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define GROUP_ROWS 64    /* rows whose weights stay in the cache while all rows of x pass */
#define SERIAL_WORK 65536 /* multiplications below which a second thread costs more than it brings */

/* Counts changes of packed forms, of what functions mean, or of structures. Python refuses another one. */
int mr_version(void) { return 9; }

/* -- which kernels ------------------------------------------------------------------------------------------------------ */

int mr_best_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        return MR_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return MR_AVX2; /* all of these have F16C */
#endif
    return MR_SCALAR;
}

static _Atomic int chosen = -1;

int mr_isa(void) {
    int now = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (now < 0) atomic_store(&chosen, now = mr_best_isa());
    return now;
}

/* Uses kernels that are not the best; returns what is in use then: never more than the processor has. */
int mr_set_isa(int isa) {
    int best = mr_best_isa();
    atomic_store(&chosen, isa < 0 || isa > best ? best : isa);
    return mr_isa();
}

const mr_kernels *mr_kernel(void) {
#if defined(__x86_64__)
    int isa = mr_isa();
    if (isa == MR_AVX512) return &mr_avx512;
    if (isa == MR_AVX2) return &mr_avx2;
#endif
    return &mr_scalar;
}

/* -- plain C ------------------------------------------------------------------------------------------------------------ */

static void round_row(const float *x, int cols, int padded, int offset, int8_t *values, float *scales, int32_t *sums, int32_t *offsets) {
    for (int b = 0; b < padded / BLOCK; b++) {
        int begin = b * BLOCK, end = begin + BLOCK < cols ? begin + BLOCK : cols;
        union { float f; uint32_t u; } most = {0}, value;
        for (int c = begin; c < end; c++) {
            value.f = x[c];
            value.u &= 0x7fffffffu; /* as a whole number, so that what is no number is the largest and stays visible */
            if (value.u > most.u) most = value;
        }
        float scale = most.f / 127.0f, inverse = 127.0f / most.f;
        if (most.f < 1e-30f) scale = inverse = 0.0f; /* its inverse would not be finite */
        int32_t sum = 0;
        for (int c = begin; c < begin + BLOCK; c++) {
            float scaled = c < cols ? x[c] * inverse : 0.0f;
            int32_t rounded = scaled >= -127.5f && scaled <= 127.5f ? (int32_t)nearbyintf(scaled) : 0;
            values[c] = (int8_t)rounded;
            sum += rounded;
        }
        scales[b] = scale, sums[b] = sum, offsets[b] = -offset * sum;
    }
}

static float scale_of(const mr_panel *p, int group, int lane) {
    size_t at = (size_t)group * PANEL + lane;
    return p->wide ? ((const float *)p->scales)[at] : mr_half_to_float(((const uint16_t *)p->scales)[at]);
}

static void panel(const mr_panel *p, const mr_rounded *x, int first, int count, float *y, int four) {
    for (int t = first; t < first + count; t++) {
        const int8_t *values = x->values + (size_t)t * x->cols;
        for (int lane = 0; lane < p->valid; lane++) {
            float sum = 0.0f;
            for (int b = 0; b < x->blocks; b++) {
                const uint8_t *block = p->values + (size_t)b * PANEL * (four ? BLOCK / 2 : BLOCK);
                int32_t dot = x->offsets[(size_t)t * x->blocks + b];
                int group = b / p->group_blocks;
                if (four && p->zeros) dot = -(int32_t)p->zeros[(size_t)group * PANEL + lane] * x->sums[(size_t)t * x->blocks + b];
                for (int c = 0; c < BLOCK; c++) {
                    int low = four ? c % 16 : c;
                    uint8_t byte = block[low / 4 * 64 + lane * 4 + low % 4];
                    dot += (int32_t)(four ? (c < 16 ? byte & 15 : byte >> 4) : byte) * values[b * BLOCK + c];
                }
                sum += (float)dot * scale_of(p, group, lane) * x->scales[(size_t)t * x->blocks + b];
            }
            y[(size_t)t * p->rows + p->row + lane] = sum + (p->bias ? p->bias[lane] : 0.0f);
        }
    }
}

static void panel8(const mr_panel *p, const mr_rounded *x, int first, int count, float *y) { panel(p, x, first, count, y, 0); }
static void panel4(const mr_panel *p, const mr_rounded *x, int first, int count, float *y) { panel(p, x, first, count, y, 1); }

static void floats(const mr_matrix *w, const float *x, int n, int begin, int end, float *y) {
    for (int r = begin; r < end; r++) {
        for (int t = 0; t < n; t++) {
            const float *row = x + (size_t)t * w->cols;
            size_t at = (size_t)r * w->cols;
            float sums[8] = {0}; /* in this many strands, which the compiler may keep side by side */
            for (int c = 0; c < w->cols; c++)
                sums[c % 8] += row[c] * (w->format == MR_BF16 ? mr_bf16_to_float(((const uint16_t *)w->values)[at + c])
                                                              : ((const float *)w->values)[at + c]);
            float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
            y[(size_t)t * w->rows + r] = sum + (w->bias ? w->bias[r] : 0.0f);
        }
    }
}

const mr_kernels mr_scalar = {panel8, panel4, floats, round_row, NULL};

/* -- x ------------------------------------------------------------------------------------------------------------------- */

/* Whether x stays as it is in front of such a matrix. */
static int takes_floats(int format) { return format != MR_INT8 && format != MR_INT4; }

size_t mr_prepared_bytes(int format, int cols, int group, int n) {
    if (takes_floats(format)) return sizeof(const float *);
    size_t padded = mr_padded_cols(cols, group);
    return ALIGN(n * padded, 64) + 3 * ALIGN(n * (padded / BLOCK) * sizeof(float), 64);
}

static mr_rounded rounded_at(const void *prepared, int cols, int group, int n) {
    int padded = mr_padded_cols(cols, group);
    size_t each = ALIGN((size_t)n * (padded / BLOCK) * sizeof(float), 64);
    const char *at = (const char *)prepared + ALIGN((size_t)n * padded, 64);
    mr_rounded made = {prepared, (const void *)at, (const void *)(at + each), (const void *)(at + 2 * each), padded, padded / BLOCK};
    return made;
}

static void prepare_rows(int format, int group, const float *x, int n, int cols, void *prepared, int begin, int end) {
    mr_rounded to = rounded_at(prepared, cols, group, n);
    const mr_kernels *kernel = mr_kernel();
    for (int t = begin; t < end; t++) {
        size_t block = (size_t)t * to.blocks;
        kernel->round_row(x + (size_t)t * cols, cols, to.cols, format == MR_INT4 ? 8 : 128,
                          (int8_t *)to.values + (size_t)t * to.cols, (float *)to.scales + block, (int32_t *)to.sums + block,
                          (int32_t *)to.offsets + block);
    }
}

void mr_prepare(int format, int group, const float *x, int n, int cols, void *prepared) {
    if (takes_floats(format))
        memcpy(prepared, &x, sizeof x);
    else
        prepare_rows(format, group, x, n, cols, prepared, 0, n);
}

/* -- y ------------------------------------------------------------------------------------------------------------------- */

static mr_panel panel_at(const mr_matrix *w, int row) {
    int padded = mr_padded_cols(w->cols, w->group), groups = mr_groups(w->cols, w->group), index = row / PANEL;
    int left = w->rows - row;
    size_t bytes = (size_t)padded * PANEL / (w->format == MR_INT4 ? 2 : 1), scales = (size_t)index * groups * PANEL;
    mr_panel made = {
        .values = (const uint8_t *)w->values + index * bytes,
        .scales = (const uint8_t *)w->scales + scales * (w->wide ? 4 : 2),
        .zeros = w->zeros ? (const uint8_t *)w->zeros + scales : NULL,
        .wide = w->wide,
        .group_blocks = w->group ? w->group / BLOCK : padded / BLOCK,
        .valid = left < PANEL ? left : PANEL,
        .bias = w->bias ? w->bias + row : NULL,
        .row = row,
        .rows = w->rows,
    };
    return made;
}

void mr_rows(const mr_matrix *w, const void *prepared, int n, int begin, int end, float *y) {
    const mr_kernels *kernel = mr_kernel();
    if (n < 1 || end <= begin) return;
    if (takes_floats(w->format)) {
        const float *x;
        memcpy(&x, prepared, sizeof x);
        if (mr_is_stored(w->format))
            mr_rows_stored(w, x, n, begin, end, y);
        else
            kernel->floats(w, x, n, begin, end, y);
        return;
    }
    mr_rounded x = rounded_at(prepared, w->cols, w->group, n);
    void (*run)(const mr_panel *, const mr_rounded *, int, int, float *) = w->format == MR_INT4 ? kernel->panel4 : kernel->panel8;
    int tiles = (n + MOST_TILE - 1) / MOST_TILE;
    for (int group = begin; group < end; group += GROUP_ROWS) {
        int stop = group + GROUP_ROWS < end ? group + GROUP_ROWS : end;
        for (int tile = 0; tile < tiles; tile++) { /* tiles of equal size, not a small one at the end */
            int first = (int)((int64_t)n * tile / tiles), next = (int)((int64_t)n * (tile + 1) / tiles);
            for (int row = group; row < stop; row += PANEL) {
                mr_panel p = panel_at(w, row);
                run(&p, &x, first, next - first, y);
            }
        }
    }
}

typedef struct {
    const mr_matrix *w;
    const float *x;
    void *prepared;
    float *y;
    int n, step;
    void (*many)(const mr_matrix *w, const float *x, int n, int begin, int end, float *y); /* or NULL */
    _Atomic int next;
} product;

static void prepare_part(void *context, int part, int parts) {
    product *p = context;
    prepare_rows(p->w->format, p->w->group, p->x, p->n, p->w->cols, p->prepared, (int)((int64_t)p->n * part / parts),
                 (int)((int64_t)p->n * (part + 1) / parts));
}

static void some_rows(const product *p, int begin, int end) {
    if (p->many)
        p->many(p->w, p->x, p->n, begin, end, p->y);
    else
        mr_rows(p->w, p->prepared, p->n, begin, end, p->y);
}

/* Whoever is free takes the next rows: a thread that another process slows down takes fewer. */
static void rows_part(void *context, int part, int parts) {
    product *p = context;
    (void)part, (void)parts;
    for (int begin; (begin = atomic_fetch_add(&p->next, p->step)) < p->w->rows;) {
        int end = begin + p->step < p->w->rows ? begin + p->step : p->w->rows;
        some_rows(p, begin, end);
    }
}

int mr_linear(const mr_matrix *w, const float *x, int n, int many, float *y) {
    if (n < 1 || w->rows < 1) return 0;
    _Alignas(64) char small[8192];
    size_t bytes = mr_prepared_bytes(w->format, w->cols, w->group, n);
    void *memory = bytes <= sizeof small ? NULL : malloc(bytes + 63);
    if (bytes > sizeof small && !memory) return 1;
    void *prepared = memory ? (void *)(((uintptr_t)memory + 63) / 64 * 64) : small;
    int turned = many && takes_floats(w->format) && !mr_is_stored(w->format);
    product p = {.w = w, .x = x, .prepared = prepared, .y = y, .n = n, .many = turned ? mr_kernel()->many : NULL};
    int threads = (double)n * w->rows * w->cols < SERIAL_WORK ? 1 : mr_threads();
    if (takes_floats(w->format) || threads < 2 || n <= 8)
        mr_prepare(w->format, w->group, x, n, w->cols, prepared);
    else
        mr_parallel(prepare_part, &p);
    if (threads < 2) {
        some_rows(&p, 0, w->rows);
    } else {
        int shares = (w->rows + threads * 8 - 1) / (threads * 8);
        p.step = (int)ALIGN(shares < GROUP_ROWS && n > 1 ? GROUP_ROWS : shares, 2 * PANEL);
        mr_parallel(rows_part, &p);
    }
    free(memory);
    return 0;
}
