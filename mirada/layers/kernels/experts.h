/* A block of experts for a few tokens. Structures mirror those of layers/experts.py.
 *
 * n tokens, D width, I inner width of an expert (they may differ), k experts per token.
 */
#ifndef MIRADA_EXPERTS_H
#define MIRADA_EXPERTS_H

#include "cpu.h"

typedef struct {
    mr_matrix gate, up, down; /* [I, D], [I, D], [D, I] */
} mr_expert;

/* y [n, D]: of each token the sum of share * down(silu(gate x) * up x) over its experts, in the order of their numbers, and
 * then what `shared` makes of it (NULL: nothing). Numbers that are not below `count`, or negative, are left out.
 *
 * The gate and the up of an expert are of one format and group. A token's result depends on no other token. Returns 0, or 1 if
 * there is no memory. */
int mr_experts(const mr_expert *experts, int count, const mr_expert *shared, const int64_t *chosen, const float *shares, int k,
               const float *x, int n, float *y);

/* out = silu(gate) * up, n numbers; out may be gate. (step.c) */
void mr_swiglu(const float *gate, const float *up, int n, float *out);
/* x [rows, 2 inner], gates then ups -> out [rows, inner]. */
void mr_swiglu_rows(const float *x, int rows, int inner, float *out);

#endif
