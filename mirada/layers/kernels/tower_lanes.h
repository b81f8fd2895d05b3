/* The arithmetic of a vision tower between its matrix products, W floats at a time. Included by tower.c as lanes.h says, with
 * GROUP too: the queries whose sums fit into the registers.
 */
#include "lanes.h"

/* x / (1 + e^(by x + cube x³)) where it lies, n numbers. */
static TARGET void FOR(gate)(float *x, int n, float by, float cube) {
    for (int i = 0; i < n; i += W) {
        float rest[W] = {0}, *at = i + W <= n ? x + i : rest;
        if (at == rest) memcpy(rest, x + i, (size_t)(n - i) * 4);
        vec v = FOR(load)(at), factor = FOR(all)(by);
        if (cube != 0.0f) factor = FMA(v * v, FOR(all)(cube), factor); /* the square may not be finite, and 0 times it no number */
        FOR(store)(at, v / (FOR(exp)(v * factor) + 1.0f));
        if (at == rest) memcpy(x + i, rest, (size_t)(n - i) * 4);
    }
}

/* Keys [count, d], rows `row` apart, as panels [d, 2 W] of 2 W keys, zeros beyond the last. */
static TARGET void FOR(turn_keys)(const float *keys, int64_t row, int count, int d, float *to) {
    for (int begin = 0; begin < count; begin += 2 * W, to += (size_t)d * 2 * W)
        for (int j = 0; j < 2 * W; j++)
            for (int i = 0; i < d; i++) to[(size_t)i * 2 * W + j] = begin + j < count ? keys[(begin + j) * row + i] : 0.0f;
}

/* y [GROUP, C W] = or += x [GROUP, depth] times a panel [depth, C W]; rows so far apart as the strides say. */
LANES void FOR(dot)(const int C, const int add, const float *x, int x_row, const float *panel, int width, int depth, float *y, int y_row) {
    vec made[GROUP][2];
#pragma GCC unroll 12
    for (int t = 0; t < GROUP; t++)
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) made[t][c] = add ? FOR(load)(y + t * y_row + c * W) : (vec){0};
    for (int k = 0; k < depth; k++) {
        vec a = FOR(load)(panel + (size_t)k * width), b = C > 1 ? FOR(load)(panel + (size_t)k * width + W) : a;
#pragma GCC unroll 12
        for (int t = 0; t < GROUP; t++) {
            vec value = FOR(all)(x[t * x_row + k]);
            made[t][0] = FMA(value, a, made[t][0]);
            if (C > 1) made[t][1] = FMA(value, b, made[t][1]);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < GROUP; t++)
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) FOR(store)(y + t * y_row + c * W, made[t][c]);
}

LANES float FOR(highest)(vec v) {
    float all[W], most;
    FOR(store)(all, v);
    most = all[0];
    for (int i = 1; i < W; i++) most = all[i] > most ? all[i] : most;
    return most;
}

/* One row of `count` scores becomes shares; returns what the sums so far are to be multiplied by. */
LANES float FOR(share_out)(float *s, int count, float *most, float *sum) {
    int whole = (count + W - 1) / W * W;
    float before = *most;
    for (int j = count; j < whole; j++) s[j] = before;
    vec high = FOR(all)(before), total = {0};
    for (int j = 0; j < whole; j += W) high = MAX(FOR(load)(s + j), high);
    float top = *most = FOR(highest)(high);
    for (int j = 0; j < whole; j += W) {
        vec made = FOR(exp)(FOR(load)(s + j) - top);
        if (j + W > count) {
            FOR(store)(s + j, made);
            for (int i = count; i < whole; i++) s[i] = 0.0f;
            made = FOR(load)(s + j);
        }
        total += made;
        FOR(store)(s + j, made);
    }
    float parts[W], added = 0.0f;
    FOR(store)(parts, total);
    for (int i = 0; i < W; i++) added += parts[i];
    float fade = 1.0f;
    if (top != before) {
        float made[W];
        FOR(store)(made, FOR(exp)(FOR(all)(before - top)));
        fade = made[0];
    }
    *sum = *sum * fade + added;
    return fade;
}

/* GROUP queries [GROUP, d] over KEYS keys at most: scores, shares, and the values [count, width] added to `mixed`. */
static TARGET void FOR(block)(
    const float *q, const float *keys, const float *values, int count, int d, int width, float *scores, float *mixed, float *most, float *sum
) {
    for (int at = 0; at < count; at += 2 * W) FOR(dot)(2, 0, q, d, keys + (size_t)at * d, 2 * W, d, scores + at, APART);
    for (int t = 0; t < GROUP; t++) {
        float fade = FOR(share_out)(scores + t * APART, count, most + t, sum + t);
        if (fade != 1.0f)
            for (int i = 0; i < width; i += W) FOR(store)(mixed + t * width + i, FOR(load)(mixed + t * width + i) * fade);
    }
    int i = 0;
    for (; i + 2 * W <= width; i += 2 * W) FOR(dot)(2, 1, scores, APART, values + i, width, count, mixed + i, width);
    for (; i < width; i += W) FOR(dot)(1, 1, scores, APART, values + i, width, count, mixed + i, width);
}

static const lanes FOR(lanes) = {W, GROUP, FOR(gate), FOR(turn_keys), FOR(block)};

#undef vec
#undef ivec
#undef uvec
#undef hvec
#undef bvec
#undef LANES
