/* The experts of a few tokens, all in one task of the pool: reading their weights is what takes the time. */
#include "experts.h"

#include "gemm.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 64            /* rows of a matrix that a thread takes at once */
#define SERIAL_BYTES 131072 /* rows times columns below which a second thread costs more than it brings */

/* One expert and those of the tokens that chose it. */
typedef struct {
    const mr_expert *expert;
    int first, count; /* among all pairs */
    void *prepared;   /* the tokens' x */
    float *gate, *up; /* [count, I]; then gate is silu(gate) * up */
    void *inner;      /* that, prepared */
    float *out;       /* [count, D] */
} job;

typedef struct {
    int expert, token;
    float share;
} pair;

struct mr_block {
    job *jobs;
    pair *pairs;
    int count, n, cols;
    float *sums, *y; /* [n, D]; another one: sums are added to y */
};

typedef struct {
    const mr_block *block;
    _Atomic int next[3];
} work;

static int chunks(int rows) { return (rows + CHUNK - 1) / CHUNK; }

static int end_of(int begin, int rows) { return begin + CHUNK < rows ? begin + CHUNK : rows; }

void mr_block_inner(const mr_block *b, _Atomic int *next) {
    for (int at = 0, before = 0, unit; (unit = atomic_fetch_add(next, 1)) >= 0;) {
        while (at < b->count && unit >= before + chunks(b->jobs[at].expert->gate.rows)) before += chunks(b->jobs[at++].expert->gate.rows);
        if (at == b->count) return;
        const job *j = &b->jobs[at];
        int rows = j->expert->gate.rows, begin = (unit - before) * CHUNK, end = end_of(begin, rows);
        mr_rows(&j->expert->gate, j->prepared, j->count, begin, end, j->gate);
        mr_rows(&j->expert->up, j->prepared, j->count, begin, end, j->up);
        for (int t = 0; t < j->count; t++) {
            float *gate = j->gate + (size_t)t * rows + begin;
            mr_swiglu(gate, j->up + (size_t)t * rows + begin, end - begin, gate);
        }
    }
}

void mr_block_prepare(const mr_block *b, _Atomic int *next) {
    for (int at; (at = atomic_fetch_add(next, 1)) < b->count;) {
        const job *j = &b->jobs[at];
        mr_prepare(j->expert->down.format, j->expert->down.group, j->gate, j->count, j->expert->down.cols, j->inner);
    }
}

/* Channels [begin, end) of what all experts together make of each token: in `sums` [n, D]. */
static void sum_part(const mr_block *b, int begin, int end, float *sums) {
    for (int t = 0; t < b->n; t++) memset(sums + (size_t)t * b->cols + begin, 0, (end - begin) * sizeof(float));
    for (int at = 0; at < b->count; at++) {
        const job *j = &b->jobs[at];
        mr_rows(&j->expert->down, j->inner, j->count, begin, end, j->out);
        for (int i = 0; i < j->count; i++) {
            const pair *p = &b->pairs[j->first + i];
            const float *from = j->out + (size_t)i * b->cols;
            float *to = sums + (size_t)p->token * b->cols;
            for (int c = begin; c < end; c++) to[c] += from[c] * p->share;
        }
    }
}

void mr_block_out(const mr_block *b, _Atomic int *next) {
    for (int unit; (unit = atomic_fetch_add(next, 1)) < chunks(b->cols);) {
        int begin = unit * CHUNK, end = end_of(begin, b->cols);
        sum_part(b, begin, end, b->sums);
        if (b->sums == b->y) continue;
        for (int t = 0; t < b->n; t++)
            for (size_t c = (size_t)t * b->cols + begin; c < (size_t)t * b->cols + end; c++) b->y[c] += b->sums[c];
    }
}

static void run(void *context, int part, int parts) {
    work *w = context;
    (void)part, (void)parts;
    mr_block_inner(w->block, &w->next[0]);
    mr_barrier();
    mr_block_prepare(w->block, &w->next[1]);
    mr_barrier();
    mr_block_out(w->block, &w->next[2]);
}

/* Pairs in the order of experts, then tokens; those of `shared` (number `count`) last. Returns how many. */
static int sort_pairs(pair *pairs, int count, int shared, const int64_t *chosen, const float *shares, int k, int n) {
    int made = 0;
    for (int t = 0; t < n; t++) {
        for (int i = 0; i < k; i++) {
            int64_t expert = chosen[(size_t)t * k + i];
            if (expert < 0 || expert >= count) continue;
            int at = made++;
            for (; at > 0 && pairs[at - 1].expert > expert; at--) pairs[at] = pairs[at - 1];
            pairs[at] = (pair){(int)expert, t, shares[(size_t)t * k + i]};
        }
    }
    for (int t = 0; t < n && shared; t++) pairs[made++] = (pair){count, t, 1.0f};
    return made;
}

/* Cuts `bytes` off memory; without memory it only counts. */
static void *cut(char *memory, size_t *at, size_t bytes) {
    void *here = memory ? memory + *at : NULL;
    *at += ALIGN(bytes, 64);
    return here;
}

/* Jobs and all that they point to, in `memory` of the size that a call without memory returns. */
static size_t lay_out(char *memory, mr_block *b, const mr_expert *experts, const mr_expert *shared, int count, int pairs, const float *x) {
    size_t at = 0;
    b->jobs = cut(memory, &at, pairs * sizeof(job));
    b->count = 0;
    const mr_matrix *last = NULL; /* of the last job that took all tokens: others of its form share what was prepared for it */
    void *whole = NULL;
    for (int first = 0, end; first < pairs; first = end, b->count++) {
        int number = b->pairs[first].expert;
        for (end = first; end < pairs && b->pairs[end].expert == number;) end++;
        const mr_expert *e = number == count ? shared : &experts[number];
        int size = end - first, cols = e->gate.cols;
        int same = size == b->n && last && last->format == e->gate.format && last->group == e->gate.group;
        job made = {.expert = e, .first = first, .count = size, .prepared = whole};
        if (!same) {
            made.prepared = cut(memory, &at, mr_prepared_bytes(e->gate.format, cols, e->gate.group, size));
            float *rows = size == b->n ? NULL : cut(memory, &at, (size_t)size * cols * sizeof(float));
            for (int i = 0; i < size && memory && rows; i++)
                memcpy(rows + (size_t)i * cols, x + (size_t)b->pairs[first + i].token * cols, cols * sizeof(float));
            if (memory) mr_prepare(e->gate.format, e->gate.group, rows ? rows : x, size, cols, made.prepared);
            if (size == b->n) last = &e->gate, whole = made.prepared;
        }
        made.gate = cut(memory, &at, (size_t)size * e->gate.rows * sizeof(float));
        made.up = cut(memory, &at, (size_t)size * e->gate.rows * sizeof(float));
        made.inner = cut(memory, &at, mr_prepared_bytes(e->down.format, e->down.cols, e->down.group, size));
        made.out = cut(memory, &at, (size_t)size * b->cols * sizeof(float));
        if (memory) b->jobs[b->count] = made;
    }
    return at;
}

size_t mr_block_pair_bytes(const mr_expert *experts, int count, const mr_expert *shared) {
    size_t most = 0;
    for (int i = 0; i < count + (shared != NULL); i++) {
        const mr_expert *e = i < count ? &experts[i] : shared;
        const mr_matrix *g = &e->gate, *d = &e->down;
        size_t bytes = ALIGN(mr_prepared_bytes(g->format, g->cols, g->group, 1), 64) + 2 * ALIGN(g->cols * sizeof(float), 64) +
                       2 * ALIGN(g->rows * sizeof(float), 64) + ALIGN(mr_prepared_bytes(d->format, d->cols, d->group, 1), 64) +
                       ALIGN(d->rows * sizeof(float), 64);
        most = bytes > most ? bytes : most;
    }
    return most;
}

size_t mr_block_base_bytes(int pairs) {
    return ALIGN(sizeof(mr_block), 64) + ALIGN(pairs * sizeof(pair), 64) + ALIGN(pairs * sizeof(job), 64);
}

mr_block *mr_block_open(void *memory, const mr_expert *experts, int count, const mr_expert *shared, const int64_t *chosen,
                        const float *shares, int k, const float *x, int n, float *y) {
    size_t at = 0;
    mr_block *b = cut(memory, &at, sizeof *b);
    *b = (mr_block){.n = n, .cols = (count ? experts : shared)->down.rows, .y = y};
    b->pairs = cut(memory, &at, ((size_t)n * k + n) * sizeof(pair));
    b->sums = cut(memory, &at, (size_t)n * b->cols * sizeof(float));
    int pairs = sort_pairs(b->pairs, count, shared != NULL, chosen, shares, k, n);
    lay_out((char *)memory + at, b, experts, shared, count, pairs, x);
    return b;
}

int mr_experts(const mr_expert *experts, int count, const mr_expert *shared, const int64_t *chosen, const float *shares, int k,
               const float *x, int n, float *y) {
    const mr_expert *any = count ? experts : shared;
    if (n < 1 || !any) return 0;
    mr_block b = {.n = n, .cols = any->down.rows, .sums = y, .y = y};
    b.pairs = malloc(((size_t)n * k + n) * sizeof(pair));
    if (!b.pairs) return 1;
    int pairs = sort_pairs(b.pairs, count, shared != NULL, chosen, shares, k, n);
    char *memory = malloc(lay_out(NULL, &b, experts, shared, count, pairs, x) + 63);
    if (memory) {
        work w = {.block = &b};
        lay_out((char *)ALIGN((uintptr_t)memory, 64), &b, experts, shared, count, pairs, x);
        int64_t size = 0;
        for (int i = 0; i < b.count; i++) size += (int64_t)b.jobs[i].expert->gate.rows * b.cols;
        mr_parallel_most(size < SERIAL_BYTES ? 1 : mr_threads(), run, &w);
    }
    free(memory);
    free(b.pairs);
    return !memory;
}

typedef struct {
    const float *x;
    float *out;
    int rows, inner;
} gated;

static void gated_part(void *context, int part, int parts) {
    const gated *g = context;
    size_t inner = g->inner;
    int end = (int)((int64_t)g->rows * (part + 1) / parts);
    for (int r = (int)((int64_t)g->rows * part / parts); r < end; r++)
        mr_swiglu(g->x + 2 * r * inner, g->x + (2 * r + 1) * inner, g->inner, g->out + r * inner);
}

void mr_swiglu_rows(const float *x, int rows, int inner, float *out) {
    gated g = {x, out, rows, inner};
    mr_parallel_most((int64_t)rows * inner < SERIAL_BYTES ? 1 : mr_threads(), gated_part, &g);
}
