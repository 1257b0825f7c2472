/* Rows of a table, changed by their gradients in one pass over these and over the rows.

   Ids lie within the table: looking them up has checked that. (Looking up itself was tried here too,
   and is as fast in torch.) */

#include <math.h>
#include <stdlib.h>

#include "crew.h"

enum { SGD, ADAGRAD, ROWWISE_ADAGRAD };

#define AHEAD 16 /* rows that are asked of memory before they are worked on */

INLINE void fetch(const float *row, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 16) __builtin_prefetch(row + i, 0);
}

INLINE void fetch_to_write(const float *row, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 16) __builtin_prefetch(row + i, 1);
}

/* Every row has an owner, by a hash of its id, who sums its gradients in the order of the batch and
   changes it: nothing is locked, and the sums are the same for any number of owners. */

typedef struct {
    int64_t count, stride; /* rows, and floats from one to the next; 0: all are the same */
    const int64_t *ids;
    const float *gradient;
} part_t;

typedef struct {
    const part_t *parts;
    float *weight, *squares;
    int64_t dim, num_parts, total, owners;
    int kind, failed;
    float rate, eps;
} update_t;

/* A row's place in the batch. */
typedef struct {
    int64_t id;
    const float *gradient;
    int32_t next, last; /* of the same id; `last` counts in the first place only */
} place_t;

INLINE uint64_t hash_of(int64_t id) { return (uint64_t)id * 0x9E3779B97F4A7C15u; }

INLINE int64_t owner_of(const update_t *w, uint64_t hash) {
    return (int64_t)(((hash >> 32) * (uint64_t)w->owners) >> 32);
}

INLINE void change_row(const update_t *w, int64_t id, const float *restrict g) {
    const int64_t dim = w->dim, whole = dim - dim % LANES;
    const float rate = -w->rate, eps = w->eps;
    float *restrict row = w->weight + id * dim;
    float factor = rate;
    int64_t i;
    if (w->kind == ADAGRAD) {
        float *restrict squares = w->squares + id * dim;
        for (i = 0; i < dim; i++) {
            squares[i] += g[i] * g[i];
            row[i] += rate * (g[i] / (sqrtf(squares[i]) + eps));
        }
        return;
    }
    if (w->kind == ROWWISE_ADAGRAD) {
        floats sums = {0};
        float square, tail = 0;
        for (i = 0; i < whole; i += LANES) sums += LOAD(g + i) * LOAD(g + i);
        for (; i < dim; i++) tail += g[i] * g[i];
        SUM_LANES(sums, square);
        w->squares[id] += (square + tail) / dim; /* the mean square */
        factor = rate / (sqrtf(w->squares[id]) + eps);
    }
    for (i = 0; i < whole; i += LANES) STORE(row + i, LOAD(row + i) + factor * LOAD(g + i));
    for (; i < dim; i++) row[i] += factor * g[i];
}

INLINE const float *sum_of(
    const place_t *places, const place_t *first, int64_t dim, float *sum
) {
    if (first->next < 0) return first->gradient;
    memcpy(sum, first->gradient, dim * sizeof(float));
    for (int32_t at = first->next; at >= 0; at = places[at].next) {
        const float *g = places[at].gradient;
        if (places[at].next >= 0) fetch(places[places[at].next].gradient, dim);
        for (int64_t i = 0; i < dim; i++) sum[i] += g[i];
    }
    return sum;
}

INLINE void ask_for(const update_t *w, const place_t *place) {
    fetch(place->gradient, w->dim);
    fetch_to_write(w->weight + place->id * w->dim, w->dim);
    if (w->kind == ADAGRAD) fetch_to_write(w->squares + place->id * w->dim, w->dim);
    if (w->kind == ROWWISE_ADAGRAD) __builtin_prefetch(w->squares + place->id, 1);
}

FOR_EACH_PROCESSOR
static void update_owned(void *given, int64_t owner) {
    update_t *w = given;
    const int64_t dim = w->dim;
    int64_t own = 0, num_places = 0, num_rows = 0, mask = 15;
    for (int64_t p = 0; p < w->num_parts; p++)
        for (int64_t i = 0; i < w->parts[p].count; i++)
            own += owner_of(w, hash_of(w->parts[p].ids[i])) == owner;
    while (mask + 1 < 2 * own) mask = 2 * mask + 1;
    int32_t *slots = malloc((mask + 1) * sizeof(int32_t)); /* first place of an id, or -1 */
    int32_t *rows = malloc((own + 1) * sizeof(int32_t));   /* first places, in the batch's order */
    place_t *places = malloc((own + 1) * sizeof(place_t));
    float *sum = malloc(dim * sizeof(float));
    if (!slots || !rows || !places || !sum) {
        w->failed = 1;
        goto done;
    }
    memset(slots, 0xff, (mask + 1) * sizeof(int32_t));
    for (int64_t p = 0; p < w->num_parts; p++) {
        const part_t *part = w->parts + p;
        for (int64_t i = 0; i < part->count; i++) {
            const int64_t id = part->ids[i];
            const uint64_t hash = hash_of(id);
            if (owner_of(w, hash) != owner) continue;
            const int32_t here = (int32_t)num_places++;
            places[here] = (place_t){id, part->gradient + i * part->stride, -1, here};
            uint64_t slot = (hash >> 16) & mask;
            while (slots[slot] >= 0 && places[slots[slot]].id != id) slot = (slot + 1) & mask;
            if (slots[slot] < 0) {
                slots[slot] = here;
                rows[num_rows++] = here;
            } else {
                place_t *first = places + slots[slot];
                places[first->last].next = here;
                first->last = here;
            }
        }
    }
    for (int64_t k = 0; k < num_rows; k++) {
        if (k + AHEAD < num_rows) ask_for(w, places + rows[k + AHEAD]);
        const place_t *first = places + rows[k];
        change_row(w, first->id, sum_of(places, first, dim, sum));
    }
done:
    free(slots);
    free(rows);
    free(places);
    free(sum);
}

/* 0; 1 where there is no memory; 2 where there are more places than an int32 counts. */
int tml_update_rows(
    const crew_t *crew, int kind, float *weight, float *squares, int64_t dim, int64_t num_parts,
    const part_t *parts, float rate, float eps
) {
    update_t work = {parts, weight, squares, dim, num_parts, 0, crew->threads, kind, 0, rate, eps};
    for (int64_t p = 0; p < num_parts; p++) work.total += parts[p].count;
    if (work.total > INT32_MAX) return 2;
    spread(crew, work.owners, update_owned, &work);
    return work.failed;
}
