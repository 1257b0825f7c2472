/* Shared by the kernels: how work is spread over threads, and rows as vectors of 16 floats.

   There are no threads of our own. torch's OpenMP runtime, if the caller found one in the process,
   lends its threads by GOMP_parallel: a second pool would fight with it for the processors. Without
   one the caller's thread does all.

   Parts of the work are taken one by one, so that a thread whose processor is taken away holds
   nobody up. No result depends on who takes which part, or on the number of threads. */
#ifndef TML_CREW_H
#define TML_CREW_H

#include <stdint.h>
#include <string.h>

/* On x86-64 the loops are compiled for three generations of processors, and the loader picks one:
   an image runs anywhere. Other compilers and processors get the plain code. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 \
    && defined(__GLIBC__)
#define FOR_EACH_PROCESSOR \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

typedef void (*team_t)(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
    team_t team; /* GOMP_parallel, or none */
    int64_t threads;
} crew_t;

typedef struct {
    void (*act)(void *, int64_t);
    void *work;
    int64_t count, taken;
} shift_t;

static void take_parts(void *given) {
    shift_t *shift = given;
    for (;;) {
        int64_t part = __atomic_fetch_add(&shift->taken, 1, __ATOMIC_RELAXED);
        if (part >= shift->count) return;
        shift->act(shift->work, part);
    }
}

/* act(work, part) for each part of 0 .. count - 1. */
static void spread(const crew_t *crew, int64_t count, void (*act)(void *, int64_t), void *work) {
    shift_t shift = {act, work, count, 0};
    int64_t threads = crew->threads < count ? crew->threads : count;
    if (crew->team && threads > 1)
        crew->team(take_parts, &shift, (unsigned)threads, 0);
    else
        take_parts(&shift);
}

#define LANES 16
typedef float floats __attribute__((vector_size(64)));
typedef floats unaligned __attribute__((aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(64)));

#define LOAD(p) (*(const unaligned *)(p))
#define STORE(p, v) (*(unaligned *)(p) = (v))

/* All lanes of v, in a fixed order. */
#define SUM_LANES(v, total) \
    do { \
        float sums_[LANES]; \
        STORE(sums_, v); \
        for (int step_ = LANES / 2; step_; step_ /= 2) \
            for (int lane_ = 0; lane_ < step_; lane_++) sums_[lane_] += sums_[lane_ + step_]; \
        (total) = sums_[0]; \
    } while (0)

#endif
