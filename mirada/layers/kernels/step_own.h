/* What the files of a decoder's forward share; nothing here is for others. */
#ifndef MIRADA_STEP_OWN_H
#define MIRADA_STEP_OWN_H

#include "gemm.h"
#include "step.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#define TILE 64   /* keys whose scores are computed together */
#define SPAN 256  /* keys of one piece of attention; parts are joined in order */
#define MANY 32   /* rows of x from which rows of a float matrix are worth being turned */
#define STAGES 12 /* most of a layer: six of attention over latents, its output, five of experts */

/* Keys and values of one head: [room, d] each; int8: and a scale per token. */
typedef struct {
    char *keys, *values;
    float *key_scales, *value_scales;
} mr_head_slab;

/* Latents, each with the key that all heads share: [room, c + r]; int8: and of each token the scales of the two. */
typedef struct {
    char *rows;
    float *scales;
} mr_latent_slab;

/* The arithmetic between matrix products, `width` floats at a time. A part of attention is what was mixed, then the largest
 * score and the sum of shares. */
typedef struct {
    int width;
    void (*norm)(const float *x, const float *weight, int n, float eps, float *out);
    void (*swiglu)(const float *gate, const float *up, int n, float *out);
    /* Queries [queries, d], of which the i-th sees keys up to limits[i] (exclusive), over the keys [begin, end) of one head. */
    void (*attend)(const float *q, const int *limits, int queries, const mr_head_slab *slab, int begin, int end, int d,
                   float *const *parts, int kv);
    /* The same for queries [c + r], wherever each lies, over latents of c = `rank` and keys of r = `turned` channels. */
    void (*attend_latents)(const float *const *q, const int *limits, int queries, const mr_latent_slab *slab, int begin, int end,
                           int rank, int turned, float *const *parts, int kv);
    /* out [width] = x [count] times rows [count, width] of F32 or BF16. */
    void (*by_rows)(const float *x, const void *rows, int count, int width, int format, float *out);
} mr_lanes;

/* The widest that is in use (mr_set_isa) and that runs of d channels divide into. (step_lanes.c) */
const mr_lanes *mr_lanes_for(int d);

/* What a thread has to itself. Q: most new tokens of a sequence times G, over latents times H. */
typedef struct {
    float *row;            /* [n, max(D, H d, I, rq, c + v)] */
    float *q;              /* [Q, d] */
    float *k;              /* [d]; over latents [max(c, nope) + r] */
    void *prepared;
    const float **queries; /* [Q] */
    float **parts;         /* [Q] */
    int *limits;           /* [Q] */
} mr_own;

typedef struct {
    const mr_decoder *model;
    const mr_call *call;
    const mr_lanes *with;
    _Atomic int *next;    /* [layers * STAGES + 1]: the piece that is taken next */
    const float *first;   /* [n, D] embeddings */
    float *x;             /* [n, D] residual */
    float *qkv;           /* [n, (H + 2K) d]; over latents the queries [n, H (nope + r)] */
    float *low;           /* [n, rq] */
    float *latent;        /* [n, c + r] */
    float *entered;       /* [n, H, c + r] */
    float *mixed;         /* [n, H v] */
    float *sum;           /* [n, D] what is added to the residual */
    float *gate_up;       /* [n, 2I] */
    float *inner;         /* [n, I] */
    float *scores;        /* [n, E] */
    void *experts;        /* room for the jobs of a block of experts */
    mr_block **block;     /* where one that is at work says which it is */
    float *cos, *sin;     /* [n, d / 2] */
    float *parts;         /* per sequence [new, H, spans, mr_part_width] */
    mr_own *own;          /* [threads] */
    int threads;
} mr_forward;

static inline int mr_most(int a, int b) { return a > b ? a : b; }

static inline size_t mr_kv_size(int kv) { return kv == MR_KV_F32 ? 4 : kv == MR_KV_BF16 ? 2 : 1; }

static inline int mr_spans(const mr_call *call, int s) { return (call->past[s] + call->lengths[s] + SPAN - 1) / SPAN; }

static inline int mr_part_width(const mr_decoder *m) { return (m->rank ? m->rank : m->head_width) + 2; }

/* Takes rows [begin, end) of `rows`, whole sixteens but for the last; false: there are none left. */
static inline bool mr_take(_Atomic int *next, int rows, int parts, int *begin, int *end) {
    int blocks = (rows + PANEL - 1) / PANEL;
    int piece = parts == 1 ? blocks : mr_most(blocks > 2 * parts ? 2 : 1, blocks / (8 * parts));
    int first = atomic_fetch_add_explicit(next, piece, memory_order_relaxed);
    if (first >= blocks) return false;
    *begin = first * PANEL;
    *end = (first + piece) * PANEL < rows ? (first + piece) * PANEL : rows;
    return true;
}

static inline void mr_prepare_for(const mr_forward *s, const mr_matrix *w, const float *x, mr_own *mine) {
    mr_prepare(w->format, w->group, x, s->call->rows, w->cols, mine->prepared);
}

/* Rows [begin, end) of y = w times what is prepared. */
static inline void mr_rows_of(const mr_forward *s, const mr_matrix *w, const mr_own *mine, int begin, int end, float *y) {
    int n = s->call->rows;
    if (n < MANY || !mr_kernel()->many || (w->format != MR_F32 && w->format != MR_BF16)) {
        mr_rows(w, mine->prepared, n, begin, end, y);
        return;
    }
    const float *x;
    memcpy(&x, mine->prepared, sizeof x);
    mr_kernel()->many(w, x, n, begin, end, y);
}

static inline void mr_product(const mr_forward *s, const mr_matrix *w, mr_own *mine, _Atomic int *next, int parts, float *y) {
    int begin, end;
    while (mr_take(next, w->rows, parts, &begin, &end)) mr_rows_of(s, w, mine, begin, end, y);
}

/* Writes x [d] as the numbers of a slab; int8: and their scale. (step.c) */
void mr_keep(char *to, float *scale, const float *x, int d, int kv);
/* The first `seen` parts [., d + 2] of one head put together: out [d]. (step.c) */
void mr_join(const float *parts, int seen, int d, float *out);

/* Attention over latents of layer l up to the product of its output, from the normed rows in mine->row: six stages.
 * Returns [n, H v]. (step_latent.c) */
const float *mr_attend_latents(const mr_forward *s, int l, mr_own *mine, _Atomic int *next, int parts);

/* Adds to the residual what the experts make of the normed rows in mine->row: five stages. (step_experts.c) */
void mr_add_experts(const mr_forward *s, const mr_routed *routed, mr_own *mine, _Atomic int *next, int parts);
/* Bytes for the jobs of the largest block of the model for n tokens. */
size_t mr_experts_bytes(const mr_decoder *m, int n);

#endif
