/* What a vision tower computes between its matrix products: GELU, and attention in which all tokens of a segment see each other.
 *
 * Attention never holds a matrix of scores: a few queries at a time pass over the keys in blocks that stay in the cache, with
 * the largest score and the sum of shares so far (arXiv 2205.14135). A query's result does not depend on what else is computed.
 */
#include "gemm.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define KEYS 256             /* of a block */
#define APART (KEYS + 16)    /* from one query's scores to the next's: not all in the same lines of the cache */
#define QUERIES 96           /* that pass over a block of keys before the next; a multiple of every GROUP */
#define LEAST_QUERIES 512    /* of a share of a head: each share brings the head's keys into form for itself */
#define SERIAL_NUMBERS 65536 /* below which a second thread costs more than it brings */

typedef struct {
    int width, group;
    void (*gate)(float *x, int n, float by, float cube);
    void (*turn_keys)(const float *keys, int64_t row, int count, int d, float *to);
    void (*block)(const float *q, const float *keys, const float *values, int count, int d, int width, float *scores, float *mixed,
                  float *most, float *sum);
} lanes;

#define W 4
#define GROUP 6
#define TARGET
#define FOR(name) name##_any
#define FMA(a, b, c) ((a) * (b) + (c))
#define MAX(a, b) pick_any((a) > (b), a, b)
#define MIN(a, b) pick_any((a) < (b), a, b)
#include "tower_lanes.h"
#undef W
#undef GROUP
#undef TARGET
#undef FOR
#undef FMA
#undef MAX
#undef MIN

#if defined(__x86_64__)
#include <immintrin.h>

#define W 8
#define GROUP 6
#define TARGET __attribute__((target("avx2,fma")))
#define FOR(name) name##_avx2
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#include "tower_lanes.h"
#undef W
#undef GROUP
#undef TARGET
#undef FOR
#undef FMA
#undef MAX
#undef MIN

#define W 16
#define GROUP 12
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define FOR(name) name##_avx512
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#include "tower_lanes.h"
#undef W
#undef GROUP
#undef TARGET
#undef FOR
#undef FMA
#undef MAX
#undef MIN
#endif

static const lanes *lanes_here(void) {
#if defined(__x86_64__)
    if (mr_kernel() == &mr_avx512) return &lanes_avx512;
    if (mr_kernel() == &mr_avx2) return &lanes_avx2;
#endif
    return &lanes_any;
}

typedef struct {
    const lanes *with;
    float *x, by, cube;
    int64_t count;
} gated;

static void gate_part(void *context, int part, int parts) {
    const gated *g = context;
    int64_t each = (int64_t)ALIGN((g->count + parts - 1) / parts, 64), begin = each * part, end = begin + each;
    if (end > g->count) end = g->count;
    for (int64_t step = 1 << 20; begin < end; begin += step)
        g->with->gate(g->x + begin, (int)(end - begin < step ? end - begin : step), g->by, g->cube);
}

/* GELU of x where it lies: by tanh, or `quick`: x sigmoid(1.702 x). */
void mr_gelu(float *x, int64_t count, int quick) {
    /* tanh(u) = 2 sigmoid(2 u) - 1, with u = sqrt(2 / pi) (x + 0.044715 x³) */
    const float by = quick ? -1.702f : -1.5957691216f, cube = quick ? 0.0f : -0.071354816273f;
    gated g = {lanes_here(), x, by, cube, count};
    mr_parallel_most(count < SERIAL_NUMBERS ? 1 : mr_threads(), gate_part, &g);
}

/* [tokens, heads, d] each, of which rows and heads lie so many numbers apart. */
typedef struct {
    const float *q, *k, *v;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;
    int32_t heads, d;
    float scale;
    int32_t segments;
    const int32_t *lengths; /* [segments] of the runs of tokens that see each other */
    float *out;             /* [tokens, heads, d] */
} mr_seen;

typedef struct {
    const mr_seen *of;
    const lanes *with;
    char *memory;
    size_t each; /* bytes of a thread */
    int queries; /* of the only segment; below 0: as many as there are keys, of every segment */
    int shares;  /* of a head, at most */
    _Atomic int64_t next;
} attention;

static size_t lay_out(char *memory, const attention *a, int most, float **parts) {
    const mr_seen *s = a->of;
    size_t width = ALIGN(s->d, a->with->width), keys = ALIGN(most, 2 * a->with->width), at = 0;
    const size_t sizes[7] = {keys * s->d, most * width, (size_t)QUERIES * s->d, (size_t)a->with->group * APART, QUERIES * width, QUERIES, QUERIES};
    for (int i = 0; i < 7; i++) {
        if (memory) parts[i] = (float *)(memory + at);
        at += ALIGN(sizes[i] * sizeof(float), 64);
    }
    return at;
}

/* Queries [from, to) of one head of the n tokens that begin at token `first`. */
static void attend_share(const attention *a, char *memory, int64_t first, int n, int h, int from, int to) {
    const mr_seen *s = a->of;
    const int d = s->d, width = (int)ALIGN(d, a->with->width), group = a->with->group;
    float *parts[7] = {0};
    lay_out(memory, a, n, parts);
    float *keys = parts[0], *values = parts[1], *q = parts[2], *scores = parts[3], *mixed = parts[4], *most = parts[5], *sum = parts[6];
    a->with->turn_keys(s->k + first * s->k_row + h * s->k_head, s->k_row, n, d, keys);
    memset(values, 0, (size_t)n * width * sizeof(float));
    for (int j = 0; j < n; j++) memcpy(values + (size_t)j * width, s->v + (first + j) * s->v_row + h * s->v_head, d * sizeof(float));
    for (int begin = from; begin < to; begin += QUERIES) {
        int count = to - begin < QUERIES ? to - begin : QUERIES, whole = (count + group - 1) / group * group;
        memset(q, 0, (size_t)whole * d * sizeof(float));
        memset(mixed, 0, (size_t)whole * width * sizeof(float));
        for (int t = 0; t < whole; t++) most[t] = -INFINITY, sum[t] = 0.0f;
        for (int t = 0; t < count; t++) {
            const float *row = s->q + (first + begin + t) * s->q_row + h * s->q_head;
            for (int i = 0; i < d; i++) q[(size_t)t * d + i] = row[i] * s->scale;
        }
        for (int at = 0; at < n; at += KEYS)
            for (int t = 0; t < whole; t += group)
                a->with->block(q + (size_t)t * d, keys + (size_t)at * d, values + (size_t)at * width, n - at < KEYS ? n - at : KEYS, d,
                               width, scores, mixed + (size_t)t * width, most + t, sum + t);
        for (int t = 0; t < count; t++) {
            float *row = s->out + ((first + begin + t) * s->heads + h) * d, by = 1.0f / sum[t];
            for (int i = 0; i < d; i++) row[i] = mixed[(size_t)t * width + i] * by;
        }
    }
}

/* Whoever is free takes the next share. */
static void attend_part(void *context, int part, int parts) {
    attention *a = context;
    const mr_seen *s = a->of;
    (void)parts;
    int64_t first = 0, before = 0, mine = atomic_fetch_add(&a->next, 1);
    for (int segment = 0; segment < s->segments; segment++) {
        int n = s->lengths[segment], asked = a->queries < 0 ? n : a->queries;
        int shares = asked / LEAST_QUERIES < 1 ? 1 : asked / LEAST_QUERIES;
        if (shares > a->shares) shares = a->shares;
        int64_t units = (int64_t)s->heads * shares;
        for (; mine < before + units; mine = atomic_fetch_add(&a->next, 1)) {
            int h = (int)((mine - before) / shares), share = (int)((mine - before) % shares);
            int from = (int)((int64_t)asked * share / shares), to = (int)((int64_t)asked * (share + 1) / shares);
            attend_share(a, a->memory + part * a->each, first, n, h, from, to);
        }
        before += units, first += n;
    }
}

/* softmax(q kᵀ scale) v of `queries` queries over the keys of the only segment; below 0: of each segment's over its own. 0, or 1
 * if there is no memory: some blocks, and for each thread one head's keys and values of the longest segment. */
int mr_attend_some(const mr_seen *s, int32_t queries) {
    attention a = {.of = s, .with = lanes_here(), .queries = queries};
    int64_t work = 0;
    int most = 0, threads = mr_threads();
    for (int i = 0; i < s->segments; i++) {
        work += (int64_t)s->lengths[i] * (queries < 0 ? s->lengths[i] : queries) * s->heads;
        if (s->lengths[i] > most) most = s->lengths[i];
    }
    if (work < SERIAL_NUMBERS) threads = 1;
    /* Four units of work for a thread at least, where a segment is that long. */
    int64_t units = (int64_t)s->heads * s->segments;
    a.shares = threads < 2 || units >= 4 * threads ? 1 : (int)((4 * threads + units - 1) / units);
    a.each = lay_out(NULL, &a, most, NULL);
    char *memory = malloc(a.each * threads + 63);
    if (!memory) return 1;
    a.memory = (char *)ALIGN((uintptr_t)memory, 64);
    mr_parallel_most(threads, attend_part, &a);
    free(memory);
    return 0;
}

/* The same inside each segment. */
int mr_attend_seen(const mr_seen *s) { return mr_attend_some(s, -1); }
