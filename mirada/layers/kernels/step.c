/* A decoder's forward for a few new tokens: Qwen2 and Qwen3 layers with three-dimensional rotary positions.
 *
 * All layers run inside one task of the pool. Between two barriers the threads take pieces of a stage from a counter, so one
 * that is held up delays the others by a piece at most. What is cheap (norms, the joining of attention's parts, bringing x
 * into the form of a matrix) every thread does for itself: that saves a barrier each.
 */
#include "step.h"

#include "experts.h"
#include "gemm.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define TILE 64    /* keys whose scores are computed together */
#define SPAN 256   /* keys of one piece of attention; parts are joined in order */
#define MANY 32    /* rows of x from which rows of a float matrix are worth being turned */
#define STAGES 5   /* qkv, attention, out, gate and up, down */

/* Keys and values of one head: [room, d] each; int8: and a scale per token. */
typedef struct {
    char *keys, *values;
    float *key_scales, *value_scales;
} head_slab;

static inline size_t kv_size(int kv) { return kv == MR_KV_F32 ? 4 : kv == MR_KV_BF16 ? 2 : 1; }

typedef struct {
    int width;
    void (*norm)(const float *x, const float *weight, int n, float eps, float *out);
    void (*swiglu)(const float *gate, const float *up, int n, float *out);
    void (*attend)(const float *q, const int *limits, int queries, const head_slab *slab, int begin, int end, int d,
                   float *const *parts, int kv);
} lanes;

typedef float fours __attribute__((vector_size(16)));

static inline __attribute__((always_inline)) float total_of_four(fours x) { return (x[0] + x[1]) + (x[2] + x[3]); }

static inline __attribute__((always_inline)) fours totals_of_four(fours a, fours b, fours c, fours e) {
    return (fours){total_of_four(a), total_of_four(b), total_of_four(c), total_of_four(e)};
}

#define W 4
#define TARGET
#define FOR(name) name##_any
#define FMA(a, b, c) ((a) * (b) + (c))
#define MAX(a, b) pick_any((a) > (b), a, b)
#define MIN(a, b) pick_any((a) < (b), a, b)
#include "step_lanes.h"
#undef W
#undef TARGET
#undef FOR
#undef FMA
#undef MAX
#undef MIN

#if defined(__x86_64__)
#include <immintrin.h>

/* The same sums in the same order. */
__attribute__((target("avx2,fma"), always_inline)) static inline fours hadd_four(fours a, fours b, fours c, fours e) {
    return _mm_hadd_ps(_mm_hadd_ps(a, b), _mm_hadd_ps(c, e));
}
#define totals_of_four hadd_four

#define W 8
#define TARGET __attribute__((target("avx2,fma")))
#define FOR(name) name##_avx2
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#include "step_lanes.h"
#undef W
#undef TARGET
#undef FOR
#undef FMA
#undef MAX
#undef MIN

#define W 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma")))
#define FOR(name) name##_avx512
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#include "step_lanes.h"
#undef W
#undef TARGET
#undef FOR
#undef FMA
#undef MAX
#undef MIN
#undef totals_of_four
#endif

/* The widest that is in use (mr_set_isa) and that heads of d channels divide into. */
static const lanes *lanes_for(int d) {
#if defined(__x86_64__)
    if (d % 16 == 0 && mr_kernel() == &mr_avx512) return &lanes_avx512;
    if (d % 8 == 0 && mr_kernel() != &mr_scalar) return &lanes_avx2;
#else
    (void)d;
#endif
    return &lanes_any;
}

/* What a thread has to itself. */
typedef struct {
    float *row;    /* [n, max(D, H d, I)] */
    float *q;      /* [most new tokens of a sequence * G, d] */
    float *k;      /* [d] */
    void *prepared;
    float **parts; /* [most new tokens of a sequence * G] */
    int *limits;   /* the same */
} own;

typedef struct {
    const mr_decoder *model;
    const mr_call *call;
    const lanes *with;
    _Atomic int *next;   /* [layers * STAGES + 1]: the piece that is taken next */
    const float *first;  /* [n, D] embeddings */
    float *x;            /* [n, D] residual */
    float *qkv;          /* [n, (H + 2K) d] */
    float *sum;          /* [n, D] what is added to the residual */
    float *gate_up;      /* [n, 2I] */
    float *inner;        /* [n, I] */
    float *cos, *sin;    /* [n, d / 2] */
    float *parts;        /* per sequence [new, H, spans, d + 2] */
    own *own;            /* [threads] */
    int threads;
} step;

static int most(int a, int b) { return a > b ? a : b; }

static int spans(const mr_call *call, int s) { return (call->past[s] + call->lengths[s] + SPAN - 1) / SPAN; }

/* Cuts `bytes` off scratch; with no scratch only counts. */
static void *cut(char *scratch, size_t *at, size_t bytes) {
    void *here = scratch ? scratch + *at : NULL;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

static size_t prepared_bytes(const mr_decoder *m, int n) {
    size_t bytes = 0;
    for (int l = 0; l <= m->layers; l++) {
        const mr_layer *layer = &m->layer[l];
        const mr_matrix *all[] = {&layer->qkv, &layer->out, &layer->gate_up, &layer->down};
        const mr_matrix *head[] = {&m->head};
        const mr_matrix **some = l < m->layers ? all : head;
        for (int i = 0; i < (l < m->layers ? 4 : 1); i++) {
            size_t needed = some[i]->rows ? mr_prepared_bytes(some[i]->format, some[i]->cols, some[i]->group, n) : 0;
            bytes = needed > bytes ? needed : bytes;
        }
    }
    return bytes;
}

/* Lays out `made` in the call's scratch; returns the bytes that takes. */
static size_t lay_out(const mr_decoder *m, const mr_call *call, char *scratch, step *made) {
    size_t at = 0, n = (size_t)call->rows, f = sizeof(float), parts = 0;
    int d = m->head_width, longest = 0, wide = most(most(m->width, m->heads * d), m->inner);
    for (int s = 0; s < call->sequences; s++) {
        longest = most(longest, call->lengths[s]);
        parts += (size_t)call->lengths[s] * m->heads * spans(call, s);
    }
    size_t queries = (size_t)longest * (m->heads / m->kv_heads);
    made->model = m, made->call = call, made->with = lanes_for(d), made->threads = call->threads;
    made->next = cut(scratch, &at, sizeof(_Atomic int) * (m->layers * STAGES + 1));
    made->x = cut(scratch, &at, n * m->width * f);
    made->first = call->x ? call->x : cut(scratch, &at, n * m->width * f);
    made->qkv = cut(scratch, &at, n * (m->heads + 2 * m->kv_heads) * d * f);
    made->sum = cut(scratch, &at, n * m->width * f);
    made->gate_up = cut(scratch, &at, n * 2 * m->inner * f);
    made->inner = cut(scratch, &at, n * m->inner * f);
    made->cos = cut(scratch, &at, n * d / 2 * f);
    made->sin = cut(scratch, &at, n * d / 2 * f);
    made->parts = cut(scratch, &at, parts * (d + 2) * f);
    made->own = cut(scratch, &at, sizeof(own) * call->threads);
    size_t prepared = prepared_bytes(m, call->rows);
    for (int t = 0; t < call->threads; t++) {
        own mine = {
            .row = cut(scratch, &at, n * wide * f),
            .q = cut(scratch, &at, queries * d * f),
            .k = cut(scratch, &at, d * f),
            .prepared = cut(scratch, &at, prepared),
            .parts = cut(scratch, &at, queries * sizeof(float *)),
            .limits = cut(scratch, &at, queries * sizeof(int)),
        };
        if (scratch) made->own[t] = mine;
    }
    return at;
}

/* Takes rows [begin, end) of `rows`, whole sixteens but for the last; false: there are none left. */
static bool take(_Atomic int *next, int rows, int parts, int *begin, int *end) {
    int blocks = (rows + PANEL - 1) / PANEL;
    int piece = parts == 1 ? blocks : most(blocks > 2 * parts ? 2 : 1, blocks / (8 * parts));
    int first = atomic_fetch_add_explicit(next, piece, memory_order_relaxed);
    if (first >= blocks) return false;
    *begin = first * PANEL;
    *end = (first + piece) * PANEL < rows ? (first + piece) * PANEL : rows;
    return true;
}

static void norm_rows(const step *s, const float *x, const float *weight, own *mine) {
    int width = s->model->width;
    for (int i = 0; i < s->call->rows; i++)
        s->with->norm(x + (size_t)i * width, weight, width, s->model->eps, mine->row + (size_t)i * width);
}

static void prepare(const step *s, const mr_matrix *w, const float *x, own *mine) {
    mr_prepare(w->format, w->group, x, s->call->rows, w->cols, mine->prepared);
}

/* Rows [begin, end) of y = w times what is prepared. */
static void rows_of(const step *s, const mr_matrix *w, const own *mine, int begin, int end, float *y) {
    int n = s->call->rows;
    if (n < MANY || !mr_kernel()->many || (w->format != MR_F32 && w->format != MR_BF16)) {
        mr_rows(w, mine->prepared, n, begin, end, y);
        return;
    }
    const float *x;
    memcpy(&x, mine->prepared, sizeof x);
    mr_kernel()->many(w, x, n, begin, end, y);
}

static void product(const step *s, const mr_matrix *w, own *mine, _Atomic int *next, int parts, float *y) {
    int begin, end;
    while (take(next, w->rows, parts, &begin, &end)) rows_of(s, w, mine, begin, end, y);
}

/* x = from + w * what is prepared. */
static void residual(const step *s, const mr_matrix *w, own *mine, _Atomic int *next, int parts, const float *from) {
    int begin, end;
    while (take(next, w->rows, parts, &begin, &end)) {
        rows_of(s, w, mine, begin, end, s->sum);
        for (int i = 0; i < s->call->rows; i++)
            for (size_t r = (size_t)i * w->rows + begin; r < (size_t)i * w->rows + end; r++) s->x[r] = from[r] + s->sum[r];
    }
}

/* A head [d] of the i-th row, normalised where the layer wants it, turned by its place, times `by`. */
static void turn(const step *s, const float *head, const float *norm, int row, float by, float *out) {
    int d = s->model->head_width, half = d / 2;
    const float *cos = s->cos + (size_t)row * half, *sin = s->sin + (size_t)row * half;
    if (norm) {
        s->with->norm(head, norm, d, s->model->head_eps, out);
        head = out;
    }
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        out[i] = (a * cos[i] - b * sin[i]) * by;
        out[i + half] = (b * cos[i] + a * sin[i]) * by;
    }
}

static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64); /* still no number */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void keep_int8(int8_t *to, float *scale, const float *x, int d) {
    float most = 0;
    for (int i = 0; i < d; i++) most = fmaxf(most, fabsf(x[i]));
    *scale = fmaxf(most / 127, FLT_MIN);
    for (int i = 0; i < d; i++) to[i] = (int8_t)rintf(x[i] / *scale);
}

/* Writes x [d] as the at-th token of a slab's keys or values. */
static void keep(char *slab, float *scales, int at, const float *x, int d, int kv) {
    char *to = slab + (size_t)at * d * kv_size(kv);
    if (kv == MR_KV_F32) memcpy(to, x, (size_t)d * 4);
    else if (kv == MR_KV_INT8) keep_int8((int8_t *)to, scales + at, x, d);
    else for (int i = 0; i < d; i++) ((uint16_t *)to)[i] = to_bf16(x[i]);
}

static head_slab slab_of(const step *s, int sequence, int layer, int head) {
    int kv = s->call->kv;
    const int64_t *found = s->call->slabs[sequence] + layer * (kv == MR_KV_INT8 ? 5 : 3);
    size_t room = (size_t)head * (size_t)found[kv == MR_KV_INT8 ? 4 : 2], bytes = room * s->model->head_width * kv_size(kv);
    if (kv != MR_KV_INT8) return (head_slab){(char *)(intptr_t)found[0] + bytes, (char *)(intptr_t)found[1] + bytes, 0, 0};
    return (head_slab){
        (char *)(intptr_t)found[0] + bytes, (char *)(intptr_t)found[2] + bytes,
        (float *)(intptr_t)found[1] + room, (float *)(intptr_t)found[3] + room,
    };
}

/* Attention of sequence `at` (its rows begin at `row`, its parts at `parts`), one key-value head, one span of keys. */
static void attend_span(const step *s, int l, int at, int row, float *parts, int kv_head, int span, own *mine) {
    const mr_decoder *m = s->model;
    const mr_call *call = s->call;
    const mr_layer *layer = &m->layer[l];
    const head_slab slab = slab_of(s, at, l, kv_head);
    int d = m->head_width, group = m->heads / m->kv_heads, length = call->lengths[at], past = call->past[at];
    int begin = span * SPAN, end = begin + SPAN < past + length ? begin + SPAN : past + length, count = spans(call, at);
    size_t width = (size_t)(m->heads + 2 * m->kv_heads) * d;
    for (int t = 0; t < length; t++) {
        const float *qkv = s->qkv + (row + t) * width;
        if (past + t >= begin && past + t < end) {
            const float *value = qkv + (size_t)(m->heads + m->kv_heads + kv_head) * d;
            turn(s, qkv + (size_t)(m->heads + kv_head) * d, layer->k_norm, row + t, 1.0f, mine->k);
            keep(slab.keys, slab.key_scales, past + t, mine->k, d, call->kv);
            keep(slab.values, slab.value_scales, past + t, value, d, call->kv);
        }
        for (int g = 0; g < group; g++) {
            int head = kv_head * group + g, i = t * group + g;
            turn(s, qkv + (size_t)head * d, layer->q_norm, row + t, m->scale, mine->q + (size_t)i * d);
            mine->limits[i] = past + t + 1;
            mine->parts[i] = parts + (((size_t)t * m->heads + head) * count + span) * (d + 2);
        }
    }
    s->with->attend(mine->q, mine->limits, length * group, &slab, begin, end, d, mine->parts, call->kv);
}

static void attend(const step *s, int l, own *mine, _Atomic int *next) {
    const mr_decoder *m = s->model;
    const mr_call *call = s->call;
    int at = 0, row = 0, before = 0;
    float *parts = s->parts;
    for (;;) {
        int piece = atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
        while (at < call->sequences && piece >= before + m->kv_heads * spans(call, at)) {
            int count = spans(call, at), length = call->lengths[at];
            before += m->kv_heads * count;
            parts += (size_t)length * m->heads * count * (m->head_width + 2);
            row += length;
            at++;
        }
        if (at == call->sequences) return;
        int count = spans(call, at);
        attend_span(s, l, at, row, parts, (piece - before) / count, (piece - before) % count, mine);
    }
}

/* The spans of each head put together: mine->row [n, H d]. */
static void join(const step *s, own *mine) {
    const mr_decoder *m = s->model;
    const mr_call *call = s->call;
    int d = m->head_width;
    float *out = mine->row;
    const float *parts = s->parts;
    for (int at = 0; at < call->sequences; at++) {
        int count = spans(call, at);
        for (int i = 0; i < call->lengths[at] * m->heads; i++, out += d, parts += (size_t)count * (d + 2)) {
            int seen = (call->past[at] + i / m->heads) / SPAN + 1;
            float top = -INFINITY, sum = 0;
            for (int c = 0; c < seen; c++) top = fmaxf(top, parts[c * (d + 2) + d]);
            memset(out, 0, (size_t)d * 4);
            for (int c = 0; c < seen; c++) {
                const float *part = parts + (size_t)c * (d + 2);
                float by = seen == 1 ? 1.0f : expf(part[d] - top);
                sum += part[d + 1] * by;
                for (int j = 0; j < d; j++) out[j] += part[j] * by;
            }
            for (int j = 0; j < d; j++) out[j] /= sum;
        }
    }
}

/* gate and up rows of the MLP, and silu(gate) * up of those where they can be had together. */
static void gate_up(const step *s, const mr_matrix *w, own *mine, _Atomic int *next, int parts) {
    int n = s->call->rows, inner = s->model->inner, begin, end;
    if (inner % PANEL) {
        product(s, w, mine, next, parts, s->gate_up);
        return;
    }
    while (take(next, inner, parts, &begin, &end)) {
        rows_of(s, w, mine, begin, end, s->gate_up);
        rows_of(s, w, mine, inner + begin, inner + end, s->gate_up);
        for (int i = 0; i < n; i++) {
            const float *gate = s->gate_up + (size_t)i * 2 * inner + begin;
            s->with->swiglu(gate, gate + inner, end - begin, s->inner + (size_t)i * inner + begin);
        }
    }
}

static const float *inner_rows(const step *s, own *mine) {
    int n = s->call->rows, inner = s->model->inner;
    if (inner % PANEL == 0) return s->inner;
    for (int i = 0; i < n; i++) {
        const float *gate = s->gate_up + (size_t)i * 2 * inner;
        s->with->swiglu(gate, gate + inner, inner, mine->row + (size_t)i * inner);
    }
    return mine->row;
}

static void run(void *context, int part, int parts) {
    const step *s = context;
    const mr_decoder *m = s->model;
    own *mine = &s->own[part];
    _Atomic int *next = s->next;
    const float *x = s->first;
    for (int l = 0; l < m->layers; l++, next += STAGES) {
        const mr_layer *layer = &m->layer[l];
        norm_rows(s, x, layer->norm1, mine);
        prepare(s, &layer->qkv, mine->row, mine);
        product(s, &layer->qkv, mine, next, parts, s->qkv);
        mr_barrier();
        attend(s, l, mine, next + 1);
        mr_barrier();
        join(s, mine);
        prepare(s, &layer->out, mine->row, mine);
        residual(s, &layer->out, mine, next + 2, parts, x);
        x = s->x;
        mr_barrier();
        norm_rows(s, x, layer->norm2, mine);
        prepare(s, &layer->gate_up, mine->row, mine);
        gate_up(s, &layer->gate_up, mine, next + 3, parts);
        mr_barrier();
        prepare(s, &layer->down, inner_rows(s, mine), mine);
        residual(s, &layer->down, mine, next + 4, parts, x);
        mr_barrier();
    }
    norm_rows(s, x, m->norm, mine);
    if (part == 0 && s->call->hidden) memcpy(s->call->hidden, mine->row, (size_t)s->call->rows * m->width * 4);
    if (!s->call->logits) return;
    prepare(s, &m->head, mine->row, mine);
    product(s, &m->head, mine, next, parts, s->call->logits);
}

/* The rows of the table that the tokens name; false if it has no such row. */
static bool look_up(const mr_decoder *m, const mr_call *call, float *x) {
    for (int r = 0; r < call->rows; r++, x += m->width) {
        int64_t token = call->tokens[r];
        if (token < 0 || token >= m->table.rows) return false;
        mr_widen(&m->table, (int)token, 1, x);
    }
    return true;
}

size_t mr_step(const mr_decoder *decoder, const mr_call *call) {
    step made;
    size_t needed = lay_out(decoder, call, NULL, &made);
    if (needed > call->room) return needed;
    lay_out(decoder, call, call->scratch, &made);
    if (!call->x && !look_up(decoder, call, (float *)made.first)) return MR_NO_SUCH_TOKEN;
    int half = decoder->head_width / 2;
    for (int i = 0; i < decoder->layers * STAGES + 1; i++) atomic_init(&made.next[i], 0);
    for (int w = 0; w < decoder->wides; w++)
        for (int64_t i = 0; i < decoder->wide[w].count; i++) decoder->wide[w].to[i] = mr_bf16_to_float(decoder->wide[w].from[i]);
    for (int r = 0; r < call->rows; r++) {
        for (int i = 0; i < half; i++) {
            int64_t place = call->positions[decoder->axis[i] * call->position_strides[0] + r * call->position_strides[1]];
            float angle = (float)place * decoder->frequency[i];
            made.cos[(size_t)r * half + i] = cosf(angle), made.sin[(size_t)r * half + i] = sinf(angle);
        }
    }
    mr_parallel_most(call->threads, run, &made);
    return 0;
}

void mr_large_pages(const void *from, size_t size) {
#if defined(__linux__)
    enum { PAGE = 2 << 20, COLLAPSE = 25 }; /* MADV_COLLAPSE, Linux 6.1; older ones refuse it */
    uintptr_t begin = (uintptr_t)from / PAGE * PAGE, end = ((uintptr_t)from + size + PAGE - 1) / PAGE * PAGE;
    /* It does what it can and says what was left; the first and the last page may be half another's. */
    if (end - begin > PAGE && madvise((void *)begin, end - begin, COLLAPSE))
        madvise((void *)(begin + PAGE), end - begin - PAGE, COLLAPSE);
#else
    (void)from, (void)size;
#endif
}

void mr_largest(const float *x, int n, int64_t width, int64_t *places) {
    enum { STRANDS = 16 };
    for (int r = 0; r < n; r++, x += width) {
        float tops[STRANDS], top = -INFINITY;
        int32_t odd[STRANDS] = {0}, strange = 0;
        for (int k = 0; k < STRANDS; k++) tops[k] = -INFINITY;
        int64_t i = 0, at = 0;
        for (; i + STRANDS <= width; i += STRANDS)
            for (int k = 0; k < STRANDS; k++) {
                float value = x[i + k];
                tops[k] = value > tops[k] ? value : tops[k];
                odd[k] |= value != value;
            }
        for (int k = 0; k < STRANDS; k++) top = tops[k] > top ? tops[k] : top, strange |= odd[k];
        for (; i < width; i++) top = x[i] > top ? x[i] : top, strange |= x[i] != x[i];
        places[r] = -1;
        if (strange || !isfinite(top)) continue;
        while (x[at] != top) at++;
        places[r] = at;
    }
}

void mr_swiglu(const float *gate, const float *up, int n, float *out) { lanes_for(PANEL)->swiglu(gate, up, n, out); }
