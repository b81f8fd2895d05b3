/* Heads of queries and keys, normalised and turned where they lie. */
#include "cpu.h"

#include <math.h>

#define STRANDS 8 /* of sums, which the compiler may keep side by side */
#define MOST_HEAD 1024
#define SERIAL_NUMBERS 65536 /* below which a second thread costs more than it brings */

/* [n, heads, d] of x, of which rows lie `row` numbers apart and heads `head`. */
typedef struct {
    float *x;
    int n, heads, d, pairs;
    int64_t row, head;
    const float *weight, *cos, *sin;
    float eps;
} heads;

static void norm_part(void *context, int part, int parts) {
    const heads *g = context;
    int end = (int)((int64_t)g->n * (part + 1) / parts);
    for (int t = (int)((int64_t)g->n * part / parts); t < end; t++) {
        for (int h = 0; h < g->heads; h++) {
            float *at = g->x + t * g->row + h * g->head, squares[STRANDS] = {0}, sum = 0;
            for (int i = 0; i < g->d; i++) squares[i % STRANDS] += at[i] * at[i];
            for (int i = 0; i < STRANDS; i++) sum += squares[i];
            float by = 1.0f / sqrtf(sum / (float)g->d + g->eps);
            for (int i = 0; i < g->d; i++) at[i] = at[i] * by * g->weight[i];
        }
    }
}

static void turn_part(void *context, int part, int parts) {
    const heads *g = context;
    float held[MOST_HEAD];
    int half = g->d / 2, end = (int)((int64_t)g->n * (part + 1) / parts);
    for (int t = (int)((int64_t)g->n * part / parts); t < end; t++) {
        const float *cos = g->cos + (size_t)t * g->d, *sin = g->sin + (size_t)t * g->d;
        for (int h = 0; h < g->heads; h++) {
            float *at = g->x + t * g->row + h * g->head;
            for (int i = 0; i < half; i++) held[i] = at[g->pairs ? 2 * i : i], held[half + i] = at[g->pairs ? 2 * i + 1 : half + i];
            for (int i = 0; i < half; i++) {
                at[i] = held[i] * cos[i] + held[half + i] * sin[i];
                at[half + i] = held[half + i] * cos[half + i] + held[i] * sin[half + i];
            }
        }
    }
}

static void share(mr_task task, heads *g) {
    mr_parallel_most((int64_t)g->n * g->heads * g->d < SERIAL_NUMBERS ? 1 : mr_threads(), task, g);
}

/* Each head divided by the root of its mean square + eps, times `weight` [d]. */
void mr_norm_heads(float *x, int n, int64_t row, int count, int64_t head, int d, const float *weight, float eps) {
    heads g = {.x = x, .n = n, .heads = count, .d = d, .row = row, .head = head, .weight = weight, .eps = eps};
    share(norm_part, &g);
}

/* Turned by `cos` and `sin` [n, d], of which sin carries the sign of the first half: channel i with channel i + d / 2. `pairs`:
 * channels 2 i and 2 i + 1 turn together, and leave as i and i + d / 2. Returns 1, and does nothing, for heads too wide. */
int mr_turn_heads(float *x, int n, int64_t row, int count, int64_t head, int d, const float *cos, const float *sin, int pairs) {
    heads g = {.x = x, .n = n, .heads = count, .d = d, .pairs = pairs, .row = row, .head = head, .cos = cos, .sin = sin};
    if (d > MOST_HEAD) return 1;
    share(turn_part, &g);
    return 0;
}
