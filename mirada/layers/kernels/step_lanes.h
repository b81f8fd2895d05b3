/* The arithmetic of a step between its matrix products, W floats at a time. Included by step_lanes.c once for each instruction set
 * as lanes.h says.
 *
 * Every sum runs in an order that is set by W and the position alone.
 */
#include "lanes.h"

/* W elements of a slab from element i on; int8 without its scale. */
LANES vec FOR(load_kv)(const void *p, ptrdiff_t i, const int kv) {
    if (kv == MR_KV_F32) return FOR(load)((const float *)p + i);
    if (kv == MR_KV_INT8) {
        bvec b;
        memcpy(&b, (const int8_t *)p + i, sizeof b);
        return __builtin_convertvector(b, vec);
    }
    hvec h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    uvec wide = __builtin_convertvector(h, uvec) << 16;
    return (vec)wide;
}

/* The sums of strands i, i + 4, i + 8 .. */
LANES fours FOR(quarter)(vec v) {
    fours x[W / 4], sum;
    memcpy(x, &v, sizeof v);
    sum = x[0];
    if (W == 8) sum = x[0] + x[W / 8];
    if (W == 16) sum = (x[0] + x[W / 8]) + (x[W / 16] + x[W / 4 - 1]);
    return sum;
}

LANES float FOR(total)(vec v) { return total_of_four(FOR(quarter)(v)); }

/* out = x / sqrt(mean(x²) + eps) * weight, n numbers. */
static TARGET void FOR(norm)(const float *x, const float *weight, int n, float eps, float *out) {
    vec squares = {0};
    int i = 0;
    for (; i + W <= n; i += W) {
        vec v = FOR(load)(x + i);
        squares = FMA(v, v, squares);
    }
    float sum = FOR(total)(squares);
    for (; i < n; i++) sum += x[i] * x[i];
    float by = 1.0f / sqrtf(sum / (float)n + eps);
    for (i = 0; i < n; i++) out[i] = x[i] * by * weight[i];
}

/* out = silu(gate) * up, n numbers. */
static TARGET void FOR(swiglu)(const float *gate, const float *up, int n, float *out) {
    for (int i = 0; i < n; i += W) {
        float rest[3][W] = {{0}};
        int whole = i + W <= n;
        if (!whole) {
            memcpy(rest[0], gate + i, (size_t)(n - i) * 4);
            memcpy(rest[1], up + i, (size_t)(n - i) * 4);
        }
        vec g = FOR(load)(whole ? gate + i : rest[0]);
        vec made = g / (FOR(exp)(-g) + 1.0f) * FOR(load)(whole ? up + i : rest[1]);
        FOR(store)(whole ? out + i : rest[2], made);
        if (!whole) memcpy(out + i, rest[2], (size_t)(n - i) * 4);
    }
}

/* Scores of `count` keys [d], `apart` numbers from one to the next, for one query. */
LANES void FOR(score)(const float *q, const void *keys, int count, int d, ptrdiff_t apart, float *scores, const int kv) {
    int j = 0;
    for (; j + 4 <= count; j += 4) {
        vec a = {0}, b = {0}, c = {0}, e = {0};
        ptrdiff_t at = j * apart;
        for (int i = 0; i < d; i += W) {
            vec x = FOR(load)(q + i);
            a = FMA(x, FOR(load_kv)(keys, at + i, kv), a);
            b = FMA(x, FOR(load_kv)(keys, at + apart + i, kv), b);
            c = FMA(x, FOR(load_kv)(keys, at + 2 * apart + i, kv), c);
            e = FMA(x, FOR(load_kv)(keys, at + 3 * apart + i, kv), e);
        }
        fours made = totals_of_four(FOR(quarter)(a), FOR(quarter)(b), FOR(quarter)(c), FOR(quarter)(e));
        memcpy(scores + j, &made, sizeof made);
    }
    for (; j < count; j++) {
        vec a = {0};
        for (int i = 0; i < d; i += W) a = FMA(FOR(load)(q + i), FOR(load_kv)(keys, j * apart + i, kv), a);
        scores[j] = FOR(total)(a);
    }
}

/* mixed [R W] = mixed * fade + the sum of shares times values, `apart` numbers from one to the next. */
LANES void FOR(mix)(
    const float *shares, const void *values, int count, ptrdiff_t apart, float fade, float *mixed, const int R, const int kv
) {
    vec sums[8];
    for (int r = 0; r < R; r++) sums[r] = FOR(load)(mixed + r * W) * fade;
    for (int j = 0; j < count; j++) {
        vec share = FOR(all)(shares[j]);
        for (int r = 0; r < R; r++) sums[r] = FMA(share, FOR(load_kv)(values, j * apart + r * W, kv), sums[r]);
    }
    for (int r = 0; r < R; r++) FOR(store)(mixed + r * W, sums[r]);
}

/* The same for values of d channels. */
LANES void FOR(mix_all)(
    const float *shares, const char *values, int count, int d, ptrdiff_t apart, float fade, float *mixed, const int kv
) {
    for (int i = 0; i < d;) {
        const char *from = values + (size_t)i * mr_kv_size(kv);
        int left = (d - i) / W;
        if (left >= 8) FOR(mix)(shares, from, count, apart, fade, mixed + i, 8, kv), i += 8 * W;
        else if (left >= 4) FOR(mix)(shares, from, count, apart, fade, mixed + i, 4, kv), i += 4 * W;
        else FOR(mix)(shares, from, count, apart, fade, mixed + i, 1, kv), i += W;
    }
}

/* Scores s [count] of a tile (with room for whole vectors) become shares; the part [d + 2] takes note of their sum and of the
 * largest. Returns what the part's sums are to be multiplied by. */
LANES float FOR(share)(float *s, int count, int d, float *part) {
    int whole = (count + W - 1) / W * W;
    for (int j = count; j < whole; j++) s[j] = -INFINITY;
    vec highest = FOR(all)(part[d]), sum = {0};
    for (int j = 0; j < whole; j += W) highest = MAX(FOR(load)(s + j), highest);
    float tops[W], most;
    FOR(store)(tops, highest);
    most = tops[0];
    for (int j = 1; j < W; j++) most = tops[j] > most ? tops[j] : most;
    for (int j = 0; j < whole; j += W) FOR(store)(s + j, FOR(exp)(FOR(load)(s + j) - most));
    for (int j = count; j < whole; j++) s[j] = 0;
    for (int j = 0; j < whole; j += W) sum += FOR(load)(s + j);
    float fade[W];
    FOR(store)(fade, FOR(exp)(FOR(all)(part[d] - most)));
    part[d + 1] = part[d + 1] * fade[0] + FOR(total)(sum);
    part[d] = most;
    return fade[0];
}

/* One query over `count` <= TILE keys and values more: part is mixed [d], the largest score, the sum of shares. */
LANES void FOR(tile)(const float *q, const mr_head_slab *slab, int at, int count, int d, float *part, const int kv) {
    const size_t from = (size_t)at * d * mr_kv_size(kv);
    float s[TILE];
    FOR(score)(q, slab->keys + from, count, d, d, s, kv);
    if (kv == MR_KV_INT8)
        for (int j = 0; j < count; j++) s[j] *= slab->key_scales[at + j];
    float fade = FOR(share)(s, count, d, part);
    if (kv == MR_KV_INT8)
        for (int j = 0; j < count; j++) s[j] *= slab->value_scales[at + j];
    FOR(mix_all)(s, slab->values + from, count, d, d, fade, part, kv);
}

/* One query [rank + turned] over `count` <= TILE latents more. */
LANES void FOR(latent_tile)(
    const float *q, const mr_latent_slab *slab, int at, int count, int rank, int turned, float *part, const int kv
) {
    const int apart = rank + turned;
    const char *rows = slab->rows + (size_t)at * apart * mr_kv_size(kv);
    const float *scales = kv == MR_KV_INT8 ? slab->scales + 2 * (size_t)at : NULL;
    float s[TILE], keys[TILE];
    if (kv == MR_KV_INT8) {
        FOR(score)(q, rows, count, rank, apart, s, kv);
        FOR(score)(q + rank, rows + rank, count, turned, apart, keys, kv);
        for (int j = 0; j < count; j++) s[j] = s[j] * scales[2 * j] + keys[j] * scales[2 * j + 1];
    } else {
        FOR(score)(q, rows, count, apart, apart, s, kv);
    }
    float fade = FOR(share)(s, count, rank, part);
    if (kv == MR_KV_INT8)
        for (int j = 0; j < count; j++) s[j] *= scales[2 * j];
    FOR(mix_all)(s, rows, count, rank, apart, fade, part, kv);
}

/* Nothing mixed yet: parts [d + 2]. */
LANES void FOR(begin)(float *const *parts, int queries, int d) {
    for (int i = 0; i < queries; i++) {
        memset(parts[i], 0, (size_t)(d + 2) * 4);
        parts[i][d] = -INFINITY;
    }
}

LANES void FOR(attend_kind)(
    const float *q, const int *limits, int queries, const mr_head_slab *slab, int begin, int end, int d, float *const *parts,
    const int kv
) {
    FOR(begin)(parts, queries, d);
    for (int at = begin; at < end; at += TILE) {
        for (int i = 0; i < queries; i++) {
            int count = (limits[i] < end ? limits[i] : end) - at;
            if (count > 0) FOR(tile)(q + (size_t)i * d, slab, at, count < TILE ? count : TILE, d, parts[i], kv);
        }
    }
}

static TARGET void FOR(attend)(
    const float *q, const int *limits, int queries, const mr_head_slab *slab, int begin, int end, int d, float *const *parts, int kv
) {
    if (kv == MR_KV_F32) FOR(attend_kind)(q, limits, queries, slab, begin, end, d, parts, MR_KV_F32);
    else if (kv == MR_KV_BF16) FOR(attend_kind)(q, limits, queries, slab, begin, end, d, parts, MR_KV_BF16);
    else FOR(attend_kind)(q, limits, queries, slab, begin, end, d, parts, MR_KV_INT8);
}

LANES void FOR(attend_latents_kind)(
    const float *const *q, const int *limits, int queries, const mr_latent_slab *slab, int begin, int end, int rank, int turned,
    float *const *parts, const int kv
) {
    FOR(begin)(parts, queries, rank);
    for (int at = begin; at < end; at += TILE) {
        for (int i = 0; i < queries; i++) {
            int count = (limits[i] < end ? limits[i] : end) - at;
            if (count > 0) FOR(latent_tile)(q[i], slab, at, count < TILE ? count : TILE, rank, turned, parts[i], kv);
        }
    }
}

static TARGET void FOR(attend_latents)(
    const float *const *q, const int *limits, int queries, const mr_latent_slab *slab, int begin, int end, int rank, int turned,
    float *const *parts, int kv
) {
    if (kv == MR_KV_F32) FOR(attend_latents_kind)(q, limits, queries, slab, begin, end, rank, turned, parts, MR_KV_F32);
    else if (kv == MR_KV_BF16) FOR(attend_latents_kind)(q, limits, queries, slab, begin, end, rank, turned, parts, MR_KV_BF16);
    else FOR(attend_latents_kind)(q, limits, queries, slab, begin, end, rank, turned, parts, MR_KV_INT8);
}

static TARGET void FOR(by_rows)(const float *x, const void *rows, int count, int width, int format, float *out) {
    memset(out, 0, (size_t)width * 4);
    if (format == MR_F32) FOR(mix_all)(x, rows, count, width, width, 1.0f, out, MR_KV_F32);
    else FOR(mix_all)(x, rows, count, width, width, 1.0f, out, MR_KV_BF16);
}

static const mr_lanes FOR(lanes) = {W, FOR(norm), FOR(swiglu), FOR(attend), FOR(attend_latents), FOR(by_rows)};

#undef vec
#undef ivec
#undef uvec
#undef hvec
#undef bvec
#undef LANES
