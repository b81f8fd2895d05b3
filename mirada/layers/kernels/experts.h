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

/* The same in parts, for a task that does more: the threads of one share the work of each part, and none begins the next before
 * all are through with the one before. */
typedef struct mr_block mr_block;

/* Bytes that a token and one of its experts take at most in the memory of a block. */
size_t mr_block_pair_bytes(const mr_expert *experts, int count, const mr_expert *shared);
/* By one thread: a block in `memory` (aligned to 64) of `pairs` <= n (k + 1) times pair_bytes and mr_block_base_bytes(pairs). x must
 * stay as it is while the block is at work. The result is added to y. */
mr_block *mr_block_open(void *memory, const mr_expert *experts, int count, const mr_expert *shared, const int64_t *chosen,
                        const float *shares, int k, const float *x, int n, float *y);
size_t mr_block_base_bytes(int pairs);
/* The parts, one after another; each takes its pieces from a counter that begins at 0. */
void mr_block_inner(const mr_block *block, _Atomic int *next);
void mr_block_prepare(const mr_block *block, _Atomic int *next);
void mr_block_out(const mr_block *block, _Atomic int *next);

/* out = silu(gate) * up, n numbers; out may be gate. (step_lanes.c) */
void mr_swiglu(const float *gate, const float *up, int n, float *out);
/* x [rows, 2 inner], gates then ups -> out [rows, inner]. */
void mr_swiglu_rows(const float *x, int rows, int inner, float *out);

#endif
