/* A decoder's forward for a few new tokens: attention by groups of heads (Qwen2, Qwen3) or over latents, dense blocks or experts.
 *
 * All layers run inside one task of the pool. Between two barriers the threads take pieces of a stage from a counter, so one
 * that is held up delays the others by a piece at most. What is cheap (norms, the joining of attention's parts, bringing x
 * into the form of a matrix) every thread does for itself: that saves a barrier each.
 */
#include "step_own.h"

#include <float.h>
#include <math.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

/* Cuts `bytes` off scratch; with no scratch only counts. */
static void *cut(char *scratch, size_t *at, size_t bytes) {
    void *here = scratch ? scratch + *at : NULL;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

static size_t prepared_bytes(const mr_decoder *m, int n) {
    const mr_matrix none = {0};
    size_t bytes = 0;
    for (int l = 0; l <= m->layers; l++) {
        const mr_layer *layer = l < m->layers ? &m->layer[l] : NULL;
        const mr_latent *latent = layer ? layer->latent : NULL;
        const mr_routed *routed = layer ? layer->routed : NULL;
        const mr_matrix *all[] = {
            layer ? &layer->qkv : &m->head, layer ? &layer->out : &none, layer ? &layer->gate_up : &none,
            layer ? &layer->down : &none, latent ? &latent->low : &none, latent ? &latent->q : &none,
            latent ? &latent->latent : &none, routed ? &routed->router : &none,
        };
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
            size_t needed = all[i]->rows ? mr_prepared_bytes(all[i]->format, all[i]->cols, all[i]->group, n) : 0;
            bytes = needed > bytes ? needed : bytes;
        }
    }
    return bytes;
}

static int most_experts(const mr_decoder *m) {
    int most = 0;
    for (int l = 0; l < m->layers; l++)
        if (m->layer[l].routed) most = mr_most(most, m->layer[l].routed->count);
    return most;
}

/* What every layer of attention over latents writes. */
static void lay_out_latents(const mr_decoder *m, size_t n, char *scratch, size_t *at, mr_forward *made) {
    size_t f = sizeof(float), row = (size_t)m->rank + m->head_width;
    made->low = cut(scratch, at, n * m->low_rank * f);
    made->latent = cut(scratch, at, n * row * f);
    made->entered = cut(scratch, at, n * m->heads * row * f);
    made->mixed = cut(scratch, at, n * m->heads * m->value * f);
}

/* Lays out `made` in the call's scratch; returns the bytes that takes. */
static size_t lay_out(const mr_decoder *m, const mr_call *call, char *scratch, mr_forward *made) {
    size_t at = 0, n = (size_t)call->rows, f = sizeof(float), parts = 0;
    int d = m->head_width, longest = 0, wide = mr_most(mr_most(m->width, m->heads * d), m->inner);
    for (int s = 0; s < call->sequences; s++) {
        longest = mr_most(longest, call->lengths[s]);
        parts += (size_t)call->lengths[s] * m->heads * mr_spans(call, s);
    }
    size_t queries = (size_t)longest * (m->heads / m->kv_heads);
    size_t heads = m->rank ? (size_t)m->heads * (m->nope + d) : (size_t)(m->heads + 2 * m->kv_heads) * d;
    wide = mr_most(wide, mr_most(m->low_rank, m->rank + m->value));
    made->model = m, made->call = call, made->threads = call->threads;
    made->with = mr_lanes_for(d | m->rank);
    made->next = cut(scratch, &at, sizeof(_Atomic int) * (m->layers * STAGES + 1));
    made->x = cut(scratch, &at, n * m->width * f);
    made->first = call->x ? call->x : cut(scratch, &at, n * m->width * f);
    made->qkv = cut(scratch, &at, n * heads * f);
    made->sum = cut(scratch, &at, n * m->width * f);
    made->gate_up = cut(scratch, &at, n * 2 * m->inner * f);
    made->inner = cut(scratch, &at, n * m->inner * f);
    made->scores = cut(scratch, &at, n * most_experts(m) * f);
    made->experts = cut(scratch, &at, mr_experts_bytes(m, call->rows));
    made->block = cut(scratch, &at, sizeof *made->block);
    made->cos = cut(scratch, &at, n * d / 2 * f);
    made->sin = cut(scratch, &at, n * d / 2 * f);
    made->parts = cut(scratch, &at, parts * mr_part_width(m) * f);
    if (m->rank) lay_out_latents(m, n, scratch, &at, made);
    made->own = cut(scratch, &at, sizeof(mr_own) * call->threads);
    size_t prepared = prepared_bytes(m, call->rows), k = (size_t)mr_most(m->rank, m->nope) + d;
    for (int t = 0; t < call->threads; t++) {
        mr_own mine = {
            .row = cut(scratch, &at, n * wide * f),
            .q = cut(scratch, &at, m->rank ? 0 : queries * d * f),
            .k = cut(scratch, &at, k * f),
            .prepared = cut(scratch, &at, prepared),
            .queries = cut(scratch, &at, queries * sizeof(float *)),
            .parts = cut(scratch, &at, queries * sizeof(float *)),
            .limits = cut(scratch, &at, queries * sizeof(int)),
        };
        if (scratch) made->own[t] = mine;
    }
    return at;
}

static void norm_rows(const mr_forward *s, const float *x, const float *weight, mr_own *mine) {
    int width = s->model->width;
    for (int i = 0; i < s->call->rows; i++)
        s->with->norm(x + (size_t)i * width, weight, width, s->model->eps, mine->row + (size_t)i * width);
}

/* x = from + w * what is prepared. */
static void residual(const mr_forward *s, const mr_matrix *w, mr_own *mine, _Atomic int *next, int parts, const float *from) {
    int begin, end;
    while (mr_take(next, w->rows, parts, &begin, &end)) {
        mr_rows_of(s, w, mine, begin, end, s->sum);
        for (int i = 0; i < s->call->rows; i++)
            for (size_t r = (size_t)i * w->rows + begin; r < (size_t)i * w->rows + end; r++) s->x[r] = from[r] + s->sum[r];
    }
}

/* A head [d] of the i-th row, normalised where the layer wants it, turned by its place, times `by`. */
static void turn(const mr_forward *s, const float *head, const float *norm, int row, float by, float *out) {
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

void mr_keep(char *to, float *scale, const float *x, int d, int kv) {
    if (kv == MR_KV_F32) memcpy(to, x, (size_t)d * 4);
    else if (kv == MR_KV_INT8) keep_int8((int8_t *)to, scale, x, d);
    else for (int i = 0; i < d; i++) ((uint16_t *)to)[i] = to_bf16(x[i]);
}

/* Writes x [d] as the at-th token of a slab's keys or values. */
static void keep(char *slab, float *scales, int at, const float *x, int d, int kv) {
    mr_keep(slab + (size_t)at * d * mr_kv_size(kv), scales + at, x, d, kv);
}

static mr_head_slab slab_of(const mr_forward *s, int sequence, int layer, int head) {
    int kv = s->call->kv;
    const int64_t *found = s->call->slabs[sequence] + layer * (kv == MR_KV_INT8 ? 5 : 3);
    size_t room = (size_t)head * (size_t)found[kv == MR_KV_INT8 ? 4 : 2], bytes = room * s->model->head_width * mr_kv_size(kv);
    if (kv != MR_KV_INT8) return (mr_head_slab){(char *)(intptr_t)found[0] + bytes, (char *)(intptr_t)found[1] + bytes, 0, 0};
    return (mr_head_slab){
        (char *)(intptr_t)found[0] + bytes, (char *)(intptr_t)found[2] + bytes,
        (float *)(intptr_t)found[1] + room, (float *)(intptr_t)found[3] + room,
    };
}

/* Attention of sequence `at` (its rows begin at `row`, its parts at `parts`), one key-value head, one span of keys. */
static void attend_span(const mr_forward *s, int l, int at, int row, float *parts, int kv_head, int span, mr_own *mine) {
    const mr_decoder *m = s->model;
    const mr_call *call = s->call;
    const mr_layer *layer = &m->layer[l];
    const mr_head_slab slab = slab_of(s, at, l, kv_head);
    int d = m->head_width, group = m->heads / m->kv_heads, length = call->lengths[at], past = call->past[at];
    int begin = span * SPAN, end = begin + SPAN < past + length ? begin + SPAN : past + length, count = mr_spans(call, at);
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

static void attend(const mr_forward *s, int l, mr_own *mine, _Atomic int *next) {
    const mr_decoder *m = s->model;
    const mr_call *call = s->call;
    int at = 0, row = 0, before = 0;
    float *parts = s->parts;
    for (;;) {
        int piece = atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
        while (at < call->sequences && piece >= before + m->kv_heads * mr_spans(call, at)) {
            int count = mr_spans(call, at), length = call->lengths[at];
            before += m->kv_heads * count;
            parts += (size_t)length * m->heads * count * (m->head_width + 2);
            row += length;
            at++;
        }
        if (at == call->sequences) return;
        int count = mr_spans(call, at);
        attend_span(s, l, at, row, parts, (piece - before) / count, (piece - before) % count, mine);
    }
}

void mr_join(const float *parts, int seen, int d, float *out) {
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

/* The spans of each head put together: [n, H d]. */
static const float *join(const mr_forward *s, mr_own *mine) {
    const mr_decoder *m = s->model;
    const mr_call *call = s->call;
    int d = m->head_width;
    float *out = mine->row;
    const float *parts = s->parts;
    for (int at = 0; at < call->sequences; at++) {
        int count = mr_spans(call, at);
        for (int i = 0; i < call->lengths[at] * m->heads; i++, out += d, parts += (size_t)count * (d + 2))
            mr_join(parts, (call->past[at] + i / m->heads) / SPAN + 1, d, out);
    }
    return mine->row;
}

/* Attention of layer l by groups of heads, up to the product of its output, from the normed rows in mine->row: two stages. */
static const float *attend_heads(const mr_forward *s, int l, mr_own *mine, _Atomic int *next, int parts) {
    const mr_layer *layer = &s->model->layer[l];
    mr_prepare_for(s, &layer->qkv, mine->row, mine);
    mr_product(s, &layer->qkv, mine, next, parts, s->qkv);
    mr_barrier();
    attend(s, l, mine, next + 1);
    mr_barrier();
    return join(s, mine);
}

/* gate and up rows of the MLP, and silu(gate) * up of those where they can be had together. */
static void gate_up(const mr_forward *s, const mr_matrix *w, mr_own *mine, _Atomic int *next, int parts) {
    int n = s->call->rows, inner = s->model->inner, begin, end;
    if (inner % PANEL) {
        mr_product(s, w, mine, next, parts, s->gate_up);
        return;
    }
    while (mr_take(next, inner, parts, &begin, &end)) {
        mr_rows_of(s, w, mine, begin, end, s->gate_up);
        mr_rows_of(s, w, mine, inner + begin, inner + end, s->gate_up);
        for (int i = 0; i < n; i++) {
            const float *gate = s->gate_up + (size_t)i * 2 * inner + begin;
            s->with->swiglu(gate, gate + inner, end - begin, s->inner + (size_t)i * inner + begin);
        }
    }
}

static const float *inner_rows(const mr_forward *s, mr_own *mine) {
    int n = s->call->rows, inner = s->model->inner;
    if (inner % PANEL == 0) return s->inner;
    for (int i = 0; i < n; i++) {
        const float *gate = s->gate_up + (size_t)i * 2 * inner;
        s->with->swiglu(gate, gate + inner, inner, mine->row + (size_t)i * inner);
    }
    return mine->row;
}

/* The dense block of a layer: two stages. */
static void add_dense(const mr_forward *s, const mr_layer *layer, mr_own *mine, _Atomic int *next, int parts) {
    mr_prepare_for(s, &layer->gate_up, mine->row, mine);
    gate_up(s, &layer->gate_up, mine, next, parts);
    mr_barrier();
    mr_prepare_for(s, &layer->down, inner_rows(s, mine), mine);
    residual(s, &layer->down, mine, next + 1, parts, s->x);
}

static void run(void *context, int part, int parts) {
    const mr_forward *s = context;
    const mr_decoder *m = s->model;
    mr_own *mine = &s->own[part];
    _Atomic int *next = s->next;
    const float *x = s->first;
    for (int l = 0; l < m->layers; l++, next += STAGES) {
        const mr_layer *layer = &m->layer[l];
        norm_rows(s, x, layer->norm1, mine);
        const float *mixed = (layer->latent ? mr_attend_latents : attend_heads)(s, l, mine, next, parts);
        mr_prepare_for(s, &layer->out, mixed, mine);
        residual(s, &layer->out, mine, next + 6, parts, x);
        x = s->x;
        mr_barrier();
        norm_rows(s, x, layer->norm2, mine);
        if (layer->routed) mr_add_experts(s, layer->routed, mine, next + 7, parts);
        else add_dense(s, layer, mine, next + 7, parts);
        mr_barrier();
    }
    norm_rows(s, x, m->norm, mine);
    if (part == 0 && s->call->hidden) memcpy(s->call->hidden, mine->row, (size_t)s->call->rows * m->width * 4);
    if (!s->call->logits) return;
    mr_prepare_for(s, &m->head, mine->row, mine);
    mr_product(s, &m->head, mine, next, parts, s->call->logits);
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
    mr_forward made;
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
            made.cos[(size_t)r * half + i] = cosf(angle) * decoder->turn_scale;
            made.sin[(size_t)r * half + i] = sinf(angle) * decoder->turn_scale;
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
