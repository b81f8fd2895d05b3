/* What the CPU kernels share. Plain C11, no torch and no Python headers: Python calls them through ctypes.
 *
 * A matrix has R rows (outputs) and C columns (inputs); y = x W^T + bias. Activations are always float32.
 */
#ifndef MIRADA_CPU_H
#define MIRADA_CPU_H

#include <stddef.h>
#include <stdint.h>

enum mr_format { MR_F32 = 0, MR_BF16 = 1, MR_INT8 = 2, MR_INT4 = 3, MR_STORED8 = 4, MR_STORED4 = 5, MR_E4M3 = 6 };

typedef struct {
    int32_t format;      /* enum mr_format */
    int32_t rows, cols;
    int32_t group;       /* columns that share a scale, a multiple of 32 (as stored: any number); 0: the whole row; of floats 0 */
    int32_t wide;        /* scales are float32, else float16 */
    const void *values;  /* INT8, INT4: in the interleaved form that mr_pack makes; else row by row, see stored.c */
    const void *scales;  /* INT8, INT4: in the form that mr_pack makes; as stored: row by row; else NULL */
    const void *zeros;   /* INT4 with zero points: in the form that mr_pack makes; as stored: row by row; else NULL */
    const float *bias;   /* [R] or NULL */
} mr_matrix;

/* A share of work for one thread: called with part = 0 .. parts - 1, all at once on different threads. */
typedef void (*mr_task)(void *context, int part, int parts);

/* pool.c: run `task` on `mr_threads()` threads, the caller's included, and return when all are through. */
int mr_threads(void);
void mr_set_threads(int threads);
void mr_parallel(mr_task task, void *context);
/* The same on `most` threads at most. */
void mr_parallel_most(int most, mr_task task, void *context);
/* Inside a task: wait until every part of it has come here. */
void mr_barrier(void);

/* Bytes of scratch that mr_prepare needs for n rows of x of `cols` columns in front of matrices of `format` and `group`. */
size_t mr_prepared_bytes(int format, int cols, int group, int n);
/* Brings x [n, cols] into the form that mr_rows reads (integers: quantised once for all rows of the matrix; else a copy-free view). */
void mr_prepare(int format, int group, const float *x, int n, int cols, void *prepared);
/* Rows [begin, end) of y [n, R]; begin is a multiple of 16. No threads of its own: it is called inside a task. */
void mr_rows(const mr_matrix *w, const void *prepared, int n, int begin, int end, float *y);
/* Rows [begin, begin + count) of a matrix as float32 [count, cols]. */
void mr_widen(const mr_matrix *w, int begin, int count, float *to);
/* All of it, on all threads of the pool: y [n, R]. 0, or 1 if there is no memory for the prepared x. `many`: rows of a matrix of
 * floats are turned first, if there are kernels for that, which many rows of x are worth; sums run in another order then. */
int mr_linear(const mr_matrix *w, const float *x, int n, int many, float *y);

#endif
