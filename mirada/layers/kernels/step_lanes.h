/* The arithmetic of a step between its matrix products, W floats at a time. Included by step.c once for each instruction set
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

/* Scores of `count` keys [count, d] for one query. */
LANES void FOR(score)(const float *q, const void *keys, int count, int d, float *scores, const int kv) {
    int j = 0;
    for (; j + 4 <= count; j += 4) {
        vec a = {0}, b = {0}, c = {0}, e = {0};
        ptrdiff_t at = (ptrdiff_t)j * d;
        for (int i = 0; i < d; i += W) {
            vec x = FOR(load)(q + i);
            a = FMA(x, FOR(load_kv)(keys, at + i, kv), a);
            b = FMA(x, FOR(load_kv)(keys, at + d + i, kv), b);
            c = FMA(x, FOR(load_kv)(keys, at + 2 * d + i, kv), c);
            e = FMA(x, FOR(load_kv)(keys, at + 3 * d + i, kv), e);
        }
        fours made = totals_of_four(FOR(quarter)(a), FOR(quarter)(b), FOR(quarter)(c), FOR(quarter)(e));
        memcpy(scores + j, &made, sizeof made);
    }
    for (; j < count; j++) {
        vec a = {0};
        for (int i = 0; i < d; i += W) a = FMA(FOR(load)(q + i), FOR(load_kv)(keys, (ptrdiff_t)j * d + i, kv), a);
        scores[j] = FOR(total)(a);
    }
}

/* mixed [R W] of [d] = mixed * fade + the sum of shares times values. */
LANES void FOR(mix)(
    const float *shares, const void *values, int count, int d, float fade, float *mixed, const int R, const int kv
) {
    vec sums[8];
    for (int r = 0; r < R; r++) sums[r] = FOR(load)(mixed + r * W) * fade;
    for (int j = 0; j < count; j++) {
        vec share = FOR(all)(shares[j]);
        for (int r = 0; r < R; r++) sums[r] = FMA(share, FOR(load_kv)(values, (ptrdiff_t)j * d + r * W, kv), sums[r]);
    }
    for (int r = 0; r < R; r++) FOR(store)(mixed + r * W, sums[r]);
}

/* One query over `count` <= TILE keys and values more: part is mixed [d], the largest score, the sum of shares. */
LANES void FOR(tile)(const float *q, const head_slab *slab, int at, int count, int d, float *part, const int kv) {
    const size_t size = kv_size(kv), from = (size_t)at * d * size;
    float s[TILE];
    FOR(score)(q, slab->keys + from, count, d, s, kv);
    if (kv == MR_KV_INT8)
        for (int j = 0; j < count; j++) s[j] *= slab->key_scales[at + j];
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
    if (kv == MR_KV_INT8)
        for (int j = 0; j < count; j++) s[j] *= slab->value_scales[at + j];
    for (int i = 0; i < d;) {
        const char *values = slab->values + from + (size_t)i * size;
        int left = (d - i) / W;
        if (left >= 8) FOR(mix)(s, values, count, d, fade[0], part + i, 8, kv), i += 8 * W;
        else if (left >= 4) FOR(mix)(s, values, count, d, fade[0], part + i, 4, kv), i += 4 * W;
        else FOR(mix)(s, values, count, d, fade[0], part + i, 1, kv), i += W;
    }
}

/* Queries [queries, d], of which the i-th sees keys up to limits[i] (exclusive), over the keys [begin, end) of one head. */
LANES void FOR(attend_kind)(
    const float *q, const int *limits, int queries, const head_slab *slab, int begin, int end, int d, float *const *parts,
    const int kv
) {
    for (int i = 0; i < queries; i++) {
        memset(parts[i], 0, (size_t)(d + 2) * 4);
        parts[i][d] = -INFINITY;
    }
    for (int at = begin; at < end; at += TILE) {
        for (int i = 0; i < queries; i++) {
            int count = (limits[i] < end ? limits[i] : end) - at;
            if (count > 0) FOR(tile)(q + (size_t)i * d, slab, at, count < TILE ? count : TILE, d, parts[i], kv);
        }
    }
}

static TARGET void FOR(attend)(
    const float *q, const int *limits, int queries, const head_slab *slab, int begin, int end, int d, float *const *parts, int kv
) {
    if (kv == MR_KV_F32) FOR(attend_kind)(q, limits, queries, slab, begin, end, d, parts, MR_KV_F32);
    else if (kv == MR_KV_BF16) FOR(attend_kind)(q, limits, queries, slab, begin, end, d, parts, MR_KV_BF16);
    else FOR(attend_kind)(q, limits, queries, slab, begin, end, d, parts, MR_KV_INT8);
}

static const lanes FOR(lanes) = {W, FOR(norm), FOR(swiglu), FOR(attend)};

#undef vec
#undef ivec
#undef uvec
#undef hvec
#undef bvec
#undef LANES
