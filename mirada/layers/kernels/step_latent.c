/* Attention over latents, absorbed: queries are mapped into the space of the latents and what is mixed out of it, so that the
 * cache is read as it is, once for all heads of a piece.
 *
 * n new tokens; H heads; c channels of a latent; r of the key that all heads share, which turns; v of a value.
 */
#include "step_own.h"

/* Channels 2i and 2i + 1 of x [r] turn together by the place of the row, and leave as i and i + r / 2, times `by`. */
static void turn_pairs(const mr_forward *s, const float *x, int row, float by, float *out) {
    int half = s->model->head_width / 2;
    const float *cos = s->cos + (size_t)row * half, *sin = s->sin + (size_t)row * half;
    for (int i = 0; i < half; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        out[i] = (a * cos[i] - b * sin[i]) * by;
        out[i + half] = (b * cos[i] + a * sin[i]) * by;
    }
}

static mr_latent_slab slab_of(const mr_forward *s, int sequence, int layer) {
    int eight = s->call->kv == MR_KV_INT8;
    const int64_t *found = s->call->slabs[sequence] + layer * (eight ? 3 : 2);
    return (mr_latent_slab){(char *)(intptr_t)found[0], eight ? (float *)(intptr_t)found[1] : NULL};
}

/* The row's latent, normed, and its key, turned, go into the slab. */
static void keep_latent(const mr_forward *s, int l, int row, mr_own *mine) {
    const mr_decoder *m = s->model;
    const mr_call *call = s->call;
    int c = m->rank, r = m->head_width, sequence = 0, first = 0;
    for (; row >= first + call->lengths[sequence]; sequence++) first += call->lengths[sequence];
    const float *made = s->latent + (size_t)row * (c + r);
    s->with->norm(made, m->layer[l].latent->norm, c, m->head_eps, mine->k);
    turn_pairs(s, made + c, row, 1.0f, mine->k + c);
    const mr_latent_slab slab = slab_of(s, sequence, l);
    size_t at = (size_t)call->past[sequence] + (row - first), size = mr_kv_size(call->kv);
    char *to = slab.rows + at * (c + r) * size;
    mr_keep(to, slab.scales + 2 * at, mine->k, c, call->kv);
    mr_keep(to + (size_t)c * size, slab.scales + 2 * at + 1, mine->k + c, r, call->kv);
}

/* Rows [begin, ..) of the matrix of all heads. */
static const char *map_of(const mr_matrix *heads, size_t begin) {
    return (const char *)heads->values + begin * heads->cols * (heads->format == MR_F32 ? 4 : 2);
}

/* Queries of one head: their channels that do not turn in the space of the latents, the others turned, all times the scale. */
static void enter_head(const mr_forward *s, int l, int head, mr_own *mine) {
    const mr_decoder *m = s->model;
    const mr_matrix *heads = &m->layer[l].latent->heads;
    int c = m->rank, r = m->head_width, nope = m->nope;
    const char *map = map_of(heads, (size_t)head * (nope + m->value));
    for (int t = 0; t < s->call->rows; t++) {
        const float *q = s->qkv + ((size_t)t * m->heads + head) * (nope + r);
        float *to = s->entered + ((size_t)t * m->heads + head) * (c + r);
        for (int i = 0; i < nope; i++) mine->k[i] = q[i] * m->scale;
        s->with->by_rows(mine->k, map, nope, c, heads->format, to);
        turn_pairs(s, q + nope, t, m->scale, to + c);
    }
}

/* Heads [head, end) of sequence `at`, whose rows begin at `row` and its parts at `parts`, over one span of latents. */
static void attend_span(const mr_forward *s, int l, int at, int row, float *parts, int head, int end, int span, mr_own *mine) {
    const mr_decoder *m = s->model;
    const mr_call *call = s->call;
    const mr_latent_slab slab = slab_of(s, at, l);
    int c = m->rank, r = m->head_width, past = call->past[at], length = call->lengths[at], spans = mr_spans(call, at), count = 0;
    int begin = span * SPAN, stop = begin + SPAN < past + length ? begin + SPAN : past + length;
    for (int t = 0; t < length; t++) {
        for (int h = head; h < end; h++, count++) {
            mine->queries[count] = s->entered + ((size_t)(row + t) * m->heads + h) * (c + r);
            mine->parts[count] = parts + (((size_t)t * m->heads + h) * spans + span) * (c + 2);
            mine->limits[count] = past + t + 1;
        }
    }
    s->with->attend_latents(mine->queries, mine->limits, count, &slab, begin, stop, c, r, mine->parts, call->kv);
}

/* Pieces are of one sequence and one span, and of so many heads that there are a few pieces for every thread: those of a piece
 * meet a latent while it lies in the cache. What comes out for a head does not depend on the others. */
static void attend(const mr_forward *s, int l, mr_own *mine, _Atomic int *next, int threads) {
    const mr_decoder *m = s->model;
    const mr_call *call = s->call;
    int all = 0, at = 0, row = 0, before = 0;
    for (int i = 0; i < call->sequences; i++) all += mr_spans(call, i);
    int wanted = threads == 1 ? 1 : (4 * threads + all - 1) / all;
    int size = wanted >= m->heads ? 1 : (m->heads + wanted - 1) / wanted, groups = (m->heads + size - 1) / size;
    float *parts = s->parts;
    for (;;) {
        int piece = atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
        while (at < call->sequences && piece >= before + groups * mr_spans(call, at)) {
            int count = mr_spans(call, at), length = call->lengths[at];
            before += groups * count;
            parts += (size_t)length * m->heads * count * (m->rank + 2);
            row += length;
            at++;
        }
        if (at == call->sequences) return;
        int count = mr_spans(call, at), head = (piece - before) / count * size;
        attend_span(s, l, at, row, parts, head, head + size < m->heads ? head + size : m->heads, (piece - before) % count, mine);
    }
}

/* What one head mixed, out of the space of the latents. */
static void leave_head(const mr_forward *s, int l, int head, mr_own *mine) {
    const mr_decoder *m = s->model;
    const mr_call *call = s->call;
    const mr_matrix *heads = &m->layer[l].latent->heads;
    int c = m->rank, v = m->value, n = call->rows, row = 0;
    float *joined = mine->row, *made = mine->row + (size_t)n * c;
    const float *parts = s->parts;
    for (int at = 0; at < call->sequences; at++) {
        size_t apart = (size_t)mr_spans(call, at) * (c + 2);
        for (int t = 0; t < call->lengths[at]; t++, row++, parts += m->heads * apart)
            mr_join(parts + head * apart, (call->past[at] + t) / SPAN + 1, c, joined + (size_t)row * c);
    }
    mr_matrix map = {.format = heads->format, .rows = v, .cols = c};
    map.values = map_of(heads, (size_t)head * (m->nope + v) + m->nope);
    mr_kernel()->floats(&map, joined, n, 0, v, made);
    for (int t = 0; t < n; t++) memcpy(s->mixed + ((size_t)t * m->heads + head) * v, made + (size_t)t * v, (size_t)v * 4);
}

const float *mr_attend_latents(const mr_forward *s, int l, mr_own *mine, _Atomic int *next, int parts) {
    const mr_decoder *m = s->model;
    const mr_latent *w = m->layer[l].latent;
    bool low = w->low.rows > 0;
    const mr_matrix *first = low ? &w->low : &w->q;
    mr_prepare_for(s, first, mine->row, mine);
    mr_product(s, first, mine, next, parts, low ? s->low : s->qkv);
    if (first->format != w->latent.format || first->group != w->latent.group) mr_prepare_for(s, &w->latent, mine->row, mine);
    mr_product(s, &w->latent, mine, next + 1, parts, s->latent);
    mr_barrier();
    if (low) {
        for (int t = 0; t < s->call->rows; t++) {
            size_t at = (size_t)t * m->low_rank;
            s->with->norm(s->low + at, w->q_norm, m->low_rank, m->head_eps, mine->row + at);
        }
        mr_prepare_for(s, &w->q, mine->row, mine);
        mr_product(s, &w->q, mine, next + 2, parts, s->qkv);
        mr_barrier();
    }
    for (int piece; (piece = atomic_fetch_add_explicit(next + 3, 1, memory_order_relaxed)) < m->heads + s->call->rows;) {
        if (piece < m->heads) enter_head(s, l, piece, mine);
        else keep_latent(s, l, piece - m->heads, mine);
    }
    mr_barrier();
    attend(s, l, mine, next + 4, parts);
    mr_barrier();
    for (int head; (head = atomic_fetch_add_explicit(next + 5, 1, memory_order_relaxed)) < m->heads;) leave_head(s, l, head, mine);
    mr_barrier();
    return s->mixed;
}
