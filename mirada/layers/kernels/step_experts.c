/* The experts of a layer within a step: which ones each token goes to (layers/moe.py, Router), and what they make of it. */
#include "step_own.h"

#include <math.h>

/* The first largest of ranks that is not taken; -1 where all are. What is no number is below nothing. */
static int largest(const float *ranks, const bool *taken, int count) {
    int best = -1;
    for (int i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || ranks[i] > ranks[best])) best = i;
    return best;
}

/* Groups are ranked by their best two experts; those of groups that are not kept are taken out of reach. `kept` [E] is room. */
static void close_groups(const mr_routed *r, const float *ranks, bool *taken, float *sums, bool *kept) {
    int size = r->count / r->groups;
    for (int g = 0; g < r->groups; g++) {
        const float *of = ranks + g * size;
        int first = largest(of, taken + g * size, size), second = first == 0;
        for (int i = 0; i < size; i++)
            if (i != first && of[i] > of[second]) second = i;
        sums[g] = of[first] + of[second];
    }
    memset(kept, 0, r->groups);
    for (int i = 0; i < r->kept; i++) kept[largest(sums, kept, r->groups)] = true;
    for (int g = 0; g < r->groups; g++) memset(taken + g * size, !kept[g], size);
}

/* Of one token: its experts [k] and how much each weighs, from the products of the router [E], which become scores. */
static void choose(const mr_routed *r, float *scores, int64_t *chosen, float *shares, float *room, bool *taken) {
    float *ranks = room, *sums = room + r->count, total = 0;
    for (int e = 0; e < r->count; e++) {
        scores[e] = 1.0f / (1.0f + expf(-scores[e]));
        ranks[e] = scores[e] + r->bias[e];
    }
    memset(taken, 0, r->count);
    if (r->groups != r->kept) close_groups(r, ranks, taken, sums, taken + r->count);
    for (int i = 0; i < r->top; i++) {
        int best = largest(ranks, taken, r->count);
        taken[best] = true;
        chosen[i] = best;
        shares[i] = scores[best];
        total += shares[i];
    }
    for (int i = 0; i < r->top; i++) shares[i] = (r->normalise ? shares[i] / (total + 1e-20f) : shares[i]) * r->scale;
}

/* What is laid out in mr_forward's `experts`, in this order: numbers and shares of the chosen, room to choose, a block. */
typedef struct {
    int64_t *chosen;
    float *shares, *room;
    bool *taken;
    char *block;
    size_t bytes;
} laid;

static laid lay_out(const mr_routed *r, int n, char *memory) {
    size_t k = (size_t)n * r->top, pairs = k + n;
    laid made = {.chosen = (int64_t *)memory};
    made.shares = (float *)(memory + ALIGN(k * sizeof(int64_t), 64));
    made.room = made.shares + ALIGN(k * sizeof(float), 64) / sizeof(float);
    made.taken = (bool *)(made.room + 2 * (size_t)r->count);
    size_t before = ALIGN(k * sizeof(int64_t), 64) + ALIGN(k * sizeof(float), 64) + ALIGN(2 * r->count * (sizeof(float) + sizeof(bool)), 64);
    made.block = memory + before;
    made.bytes = before + mr_block_base_bytes((int)pairs) + pairs * r->pair_bytes;
    return made;
}

size_t mr_experts_bytes(const mr_decoder *m, int n) {
    size_t most = 0;
    for (int l = 0; l < m->layers; l++) {
        const mr_routed *r = m->layer[l].routed;
        size_t bytes = r ? lay_out(r, n, (char *)64).bytes : 0;
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* By one thread. Its rows in mine->row stay as they are until all have left mr_add_experts. */
static void open_block(const mr_forward *s, const mr_routed *r, mr_own *mine) {
    int n = s->call->rows;
    laid at = lay_out(r, n, s->experts);
    for (int t = 0; t < n; t++)
        choose(r, s->scores + (size_t)t * r->count, at.chosen + (size_t)t * r->top, at.shares + (size_t)t * r->top, at.room, at.taken);
    *s->block = mr_block_open(at.block, r->experts, r->count, r->shared, at.chosen, at.shares, r->top, mine->row, n, s->x);
}

void mr_add_experts(const mr_forward *s, const mr_routed *r, mr_own *mine, _Atomic int *next, int parts) {
    mr_prepare_for(s, &r->router, mine->row, mine);
    mr_product(s, &r->router, mine, next, parts, s->scores);
    mr_barrier();
    if (atomic_fetch_add_explicit(next + 1, 1, memory_order_relaxed) == 0) open_block(s, r, mine);
    mr_barrier();
    mr_block_inner(*s->block, next + 2);
    mr_barrier();
    mr_block_prepare(*s->block, next + 3);
    mr_barrier();
    mr_block_out(*s->block, next + 4);
}
