/* A few threads that wait for work, and the one that brings it works with them.
 *
 * Waiting is a short spin, then sleep. How short is learnt: a spin that was in vain halves the next one, so a process that
 * shares its cores with another one soon sleeps at once instead of burning what the other needs.
 */
#include "cpu.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>

#define MOST_THREADS 256
#define LEAST_SPIN 16
#define MOST_SPIN 2048 /* rounds of ten to fifty nanoseconds, by processor */

/* Something that moves on in whole numbers, and that threads wait for. */
typedef struct {
    _Atomic uint32_t at;
    _Atomic int sleepers;
    pthread_mutex_t lock;
    pthread_cond_t moved;
} turn;

#define TURN {0, 0, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER}

typedef struct {
    pthread_t id;
    int part;
} worker;

/* Threads that meet. */
typedef struct {
    turn passed;
    _Atomic int arrived;
} meeting;

static turn posted = TURN;
static meeting within = {TURN, 0}, after = {TURN, 0}; /* a task's barriers; the end of each task */
static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER; /* who brings work now */
static worker workers[MOST_THREADS];
static int started;  /* workers that live; under `owner`, as the next two */
static int asked;    /* how many were wanted when they were made */
static bool closed;  /* the process ends */
static _Atomic int wanted = 1;
static _Thread_local int parts_here = 1; /* of the task that this thread is in */

/* The work that is posted: written before `posted` moves, read after. */
static struct {
    mr_task task;
    void *context;
    int parts;
    bool end;
} job;

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void move(turn *t) {
    atomic_fetch_add(&t->at, 1);
    if (atomic_load(&t->sleepers) > 0) {
        pthread_mutex_lock(&t->lock);
        pthread_cond_broadcast(&t->moved);
        pthread_mutex_unlock(&t->lock);
    }
}

static void wait_past(turn *t, uint32_t seen) {
    static _Thread_local int spin = MOST_SPIN;
    for (int i = 0; i < spin; i++) {
        if (atomic_load_explicit(&t->at, memory_order_acquire) != seen) {
            spin = spin * 2 < MOST_SPIN ? spin * 2 : MOST_SPIN;
            return;
        }
        pause_briefly();
    }
    spin = spin / 2 > LEAST_SPIN ? spin / 2 : LEAST_SPIN;
    pthread_mutex_lock(&t->lock);
    /* Whoever moves it either sees this sleeper, or has moved it before the test below. */
    atomic_fetch_add(&t->sleepers, 1);
    while (atomic_load(&t->at) == seen) pthread_cond_wait(&t->moved, &t->lock);
    atomic_fetch_sub(&t->sleepers, 1);
    pthread_mutex_unlock(&t->lock);
}

static void meet(meeting *m, int parts) {
    uint32_t seen = atomic_load(&m->passed.at);
    if (atomic_fetch_add(&m->arrived, 1) + 1 == parts) {
        atomic_store(&m->arrived, 0);
        move(&m->passed);
    } else {
        wait_past(&m->passed, seen);
    }
}

void mr_barrier(void) {
    if (parts_here > 1) meet(&within, parts_here);
}

static void *serve(void *given) {
    int part = ((worker *)given)->part;
    for (uint32_t seen = 0;; seen++) {
        wait_past(&posted, seen);
        if (job.end) return NULL;
        if (part < job.parts) {
            parts_here = job.parts;
            job.task(job.context, part, job.parts);
        }
        meet(&after, started + 1);
    }
}

/* Ends all workers. Under `owner`. */
static void dismiss(void) {
    if (!started) return;
    job.end = true;
    move(&posted);
    for (int i = 0; i < started; i++) pthread_join(workers[i].id, NULL);
    job.end = false;
    atomic_store(&posted.at, 0);
    started = asked = 0;
}

/* `count` workers, or as many as the system gives. They take no signals: those are Python's. Under `owner`. */
static void hire(int count) {
    if (count == asked) return;
    dismiss();
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (asked = count; started < count; started++) {
        workers[started].part = started + 1;
        if (pthread_create(&workers[started].id, NULL, serve, &workers[started])) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

int mr_threads(void) { return atomic_load(&wanted); }

void mr_set_threads(int threads) {
    atomic_store(&wanted, threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads);
}

static void alone(mr_task task, void *context) {
    int before = parts_here;
    parts_here = 1;
    task(context, 0, 1);
    parts_here = before;
}

void mr_parallel_most(int most, mr_task task, void *context) {
    /* Inside a task, or beside another thread's. */
    if (most < 2 || mr_threads() < 2 || parts_here > 1 || pthread_mutex_trylock(&owner)) {
        alone(task, context);
        return;
    }
    hire(closed ? 0 : mr_threads() - 1);
    if (started) {
        job.task = task, job.context = context;
        job.parts = parts_here = started + 1 < most ? started + 1 : most;
        move(&posted);
        task(context, 0, parts_here);
        parts_here = 1;
        meet(&after, started + 1);
    } else {
        alone(task, context);
    }
    pthread_mutex_unlock(&owner);
}

void mr_parallel(mr_task task, void *context) { mr_parallel_most(MOST_THREADS, task, context); }

/* A fork takes along only the thread that called it: the child begins without workers. */
static void before_fork(void) { pthread_mutex_lock(&owner); }

static void after_fork_in_parent(void) { pthread_mutex_unlock(&owner); }

static void after_fork_in_child(void) {
    static const turn still = TURN;
    static const meeting nobody = {TURN, 0};
    static const pthread_mutex_t unlocked = PTHREAD_MUTEX_INITIALIZER;
    posted = still, within = nobody, after = nobody, owner = unlocked;
    started = asked = 0, parts_here = 1;
}

__attribute__((constructor)) static void open_pool(void) {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

__attribute__((destructor)) static void close_pool(void) {
    pthread_mutex_lock(&owner);
    closed = true;
    dismiss();
    pthread_mutex_unlock(&owner);
}
