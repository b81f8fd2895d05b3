/* A decode step on a CPU: what Python hands over. Structures mirror those of layers/step_plan.py.
 *
 * n new tokens of all sequences end to end; D width; H query heads, K key-value heads, G = H / K; d head width (over latents: the
 * channels that turn, r); I inner width of the MLP; V vocabulary; E experts. Latents (layers/mla.py): c = `rank` of each, rq of
 * queries, `nope` channels of a query that do not turn, v = `value` of a value.
 */
#ifndef MIRADA_STEP_H
#define MIRADA_STEP_H

#include "cpu.h"
#include "experts.h"

enum mr_kv { MR_KV_F32 = 0, MR_KV_BF16 = 1, MR_KV_INT8 = 2 };

/* What attention over latents multiplies by, its output apart. */
typedef struct {
    mr_matrix low, q, latent;     /* [rq, D], or no rows: q takes the input; [H (nope + r), rq or D]; [c + r, D] */
    mr_matrix heads;              /* [H (nope + v), c]: of each head to keys, then to values; F32 or BF16 */
    const float *q_norm, *norm;   /* [rq] or NULL, [c] */
} mr_latent;

/* A block of experts. Which ones a token goes to is said by layers/moe.py. */
typedef struct {
    const mr_expert *experts, *shared; /* [E]; one that every token passes, or NULL */
    mr_matrix router;                  /* [E, D] */
    const float *bias;                 /* [E] */
    int32_t count, top, groups, kept, normalise;
    float scale;
    size_t pair_bytes;                 /* what mr_block_pair_bytes says */
} mr_routed;

typedef struct {
    mr_matrix qkv, out, gate_up, down; /* [(H + 2K) d, D], [D, H d or H v], [2I, D] (gate's rows first), [D, I] */
    const float *norm1, *norm2;        /* [D] */
    const float *q_norm, *k_norm;      /* [d], or NULL: heads are not normalised */
    const mr_latent *latent;           /* in the place of qkv, or NULL */
    const mr_routed *routed;           /* in the place of gate_up and down, or NULL */
} mr_layer;

/* A vector that is stored as bfloat16 and read as float32: brought up to date before each step. */
typedef struct {
    const uint16_t *from;
    float *to;
    int64_t count;
} mr_wide;

typedef struct {
    int32_t layers, width, heads, kv_heads, head_width, inner;
    int32_t rank, low_rank, nope, value; /* of latents; rank 0: keys and values of heads are kept */
    float eps, head_eps, scale; /* of the norms of width D, of those of heads or latents, of the scores */
    float turn_scale;           /* what cosines and sines are multiplied by */
    const mr_layer *layer;      /* [layers] */
    const float *norm;          /* [D] */
    const float *frequency;     /* [d / 2] */
    const int32_t *axis;        /* [d / 2]: which row of the positions turns a channel */
    mr_matrix head;             /* [V, D]; no rows: there is none */
    mr_matrix table;            /* [V, D] embeddings, F32 or BF16; no rows: there is none */
    const mr_wide *wide;        /* [wides] */
    int32_t wides;
} mr_decoder;

typedef struct {
    int32_t sequences, rows;        /* rows: n, the sum of lengths */
    const int32_t *lengths, *past;  /* [sequences]: new tokens, tokens that the slabs hold already */
    /* Per sequence [layers, 3] numbers: the addresses of keys and of values [K, room, d], and room, at least past + length;
     * int8: [layers, 5], where behind either address stands that of its float32 scales [K, room]. Latents: [layers, 2], the
     * address of [room, c + r], and room; int8: [layers, 3], with that of scales [room, 2] between. */
    const int64_t *const *slabs;
    int32_t kv;                     /* enum mr_kv */
    int32_t threads;                /* at most so many work */
    const int64_t *positions;       /* [3, n] */
    int64_t position_strides[2];
    const float *x;                 /* [n, D] embeddings, or NULL: those of the tokens */
    const int64_t *tokens;          /* [n] rows of the table; read without x */
    float *hidden;                  /* [n, D] after the final norm, or NULL */
    float *logits;                  /* [n, V], or NULL */
    void *scratch;                  /* aligned to 64 */
    size_t room;                    /* bytes of it */
} mr_call;

#define MR_NO_SUCH_TOKEN SIZE_MAX

/* All layers, the final norm and, where wanted, the head. Writes the new keys and values into the slabs. Returns 0; with nothing
 * done the bytes of scratch that it needs, if there are fewer, or MR_NO_SUCH_TOKEN for one that is not in the table.
 *
 * Up to 31 rows of all sequences a row's result depends on nothing but its own sequence: not on its batch mates, on how many
 * tokens of the sequence come at once, or on the number of threads, as long as mr_rows computes each row by itself. With more
 * rows products with matrices of floats sum in another order. */
size_t mr_step(const mr_decoder *decoder, const mr_call *call);

/* Asks the system to put what lies in [from, from + size) into large pages, where it can; nothing is moved for the reader. */
void mr_large_pages(const void *from, size_t size);

/* The place of the largest of each row of x [n, width], of equal ones the first; -1 where it is not finite or one is no number. */
void mr_largest(const float *x, int n, int64_t width, int64_t *places);

#endif
