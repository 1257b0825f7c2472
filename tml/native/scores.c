/* Scores of pairs and of rows of candidates, and their derivatives. */

#include <math.h>
#include <stdlib.h>

#include "crew.h"

#define ROWS_A_PART 256 /* also known to kernels.py */
#define AHEAD 8

/* e^x of x from about -80 to 0, as the nearest power of 2 times a polynomial of the rest; some 1e-7
   off. What is not a number stays so. */
INLINE floats exponential(floats x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    floats n = (x * 1.44269504f + magic) - magic;
    floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    integers power = (__builtin_convertvector(n, integers) + 127) << 23;
    return p * (floats)power;
}

/* a where it is larger, else b. */
INLINE floats larger(floats a, floats b) {
    const integers is_a = a > b;
    return (floats)(((integers)a & is_a) | ((integers)b & ~is_a));
}

/* Where a candidate is the query's true entity, its score becomes -inf. */

typedef struct {
    float *scores;
    const int64_t *true_ids, *ids;
    int64_t rows, columns, chunk_size;
} hide_t;

FOR_EACH_PROCESSOR
static void hide_part(void *given, int64_t part) {
    const hide_t *w = given;
    int64_t start = part * ROWS_A_PART, stop = start + ROWS_A_PART;
    if (stop > w->rows) stop = w->rows;
    for (int64_t i = start; i < stop; i++) {
        const int64_t *ids = w->ids + i / w->chunk_size * w->columns, wanted = w->true_ids[i];
        int64_t found = 0;
        for (int64_t k = 0; k < w->columns; k++) found |= ids[k] == wanted;
        if (!found) continue;
        for (int64_t k = 0; k < w->columns; k++)
            if (ids[k] == wanted) w->scores[i * w->columns + k] = -INFINITY;
    }
}

void tml_hide(
    const crew_t *crew, float *scores, int64_t rows, int64_t columns, const int64_t *true_ids,
    const int64_t *ids, int64_t chunk_size
) {
    hide_t work = {scores, true_ids, ids, rows, columns, chunk_size};
    spread(crew, (rows + ROWS_A_PART - 1) / ROWS_A_PART, hide_part, &work);
}

/* The softmax loss of each row, log(e^p + sum e^x_k) - p; scores become its derivatives times
   share. */

typedef struct {
    float *scores;
    const float *positive, *share;
    float *loss, *d_positive;
    int64_t rows, columns;
    float least;
} softmax_t;

FOR_EACH_PROCESSOR
static void softmax_part(void *given, int64_t part) {
    const softmax_t *w = given;
    const int64_t columns = w->columns, whole = columns - columns % LANES, rest = columns - whole;
    int64_t start = part * ROWS_A_PART, stop = start + ROWS_A_PART;
    if (stop > w->rows) stop = w->rows;
    const floats zeros = {0};
    const floats least = zeros + w->least;
    for (int64_t i = start; i < stop; i++) {
        float *row = w->scores + i * columns;
        const float positive = w->positive[i];
        float last[LANES], top = positive, total, own;
        for (int64_t k = 0; k < LANES; k++) last[k] = k < rest ? row[whole + k] : -INFINITY;
        floats tops = zeros + positive;
        for (int64_t k = 0; k < whole; k += LANES) tops = larger(LOAD(row + k), tops);
        tops = larger(LOAD(last), tops);
        for (int k = 0; k < LANES; k++) top = tops[k] > top ? tops[k] : top;
        floats sums = zeros;
        for (int64_t k = 0; k < whole; k += LANES) {
            floats x = LOAD(row + k) - top;
            x = exponential(larger(least, x));
            STORE(row + k, x);
            sums += x;
        }
        if (rest) {
            floats x = LOAD(last) - top;
            STORE(last, exponential(larger(least, x)));
            for (int64_t k = rest; k < LANES; k++) last[k] = 0;
            sums += LOAD(last);
        }
        SUM_LANES(sums, total);
        own = expf(positive - top);
        total += own;
        w->loss[i] = logf(total) + top - positive;
        w->d_positive[i] = (own / total - 1) * w->share[i];
        const float factor = w->share[i] / total;
        for (int64_t k = 0; k < whole; k += LANES) STORE(row + k, LOAD(row + k) * factor);
        for (int64_t k = 0; k < rest; k++) row[whole + k] = last[k] * factor;
    }
}

void tml_softmax(
    const crew_t *crew, float *scores, int64_t rows, int64_t columns, const float *positive,
    const float *share, float least, float *loss, float *d_positive
) {
    softmax_t work = {scores, positive, share, loss, d_positive, rows, columns, least};
    spread(crew, (rows + ROWS_A_PART - 1) / ROWS_A_PART, softmax_part, &work);
}

/* Pairs of vectors l, r, of which l is moved by its relation's offset b:
   moved = l + b, <moved, r> and <l, r>. */

typedef struct {
    const float *lhs, *rhs, *offsets;
    const int64_t *relation, *first_run;
    const float *d_moved_pair, *d_pair;
    float *moved, *moved_pair, *pair, *d_lhs, *d_rhs, *d_offsets;
    int64_t rows, dim;
} pairs_t;

FOR_EACH_PROCESSOR
static void pairs_part(void *given, int64_t part) {
    const pairs_t *w = given;
    const int64_t dim = w->dim, whole = dim - dim % LANES;
    int64_t start = part * ROWS_A_PART, stop = start + ROWS_A_PART;
    if (stop > w->rows) stop = w->rows;
    for (int64_t n = start; n < stop; n++) {
        const float *lhs = w->lhs + n * dim, *rhs = w->rhs + n * dim;
        const float *offset = w->offsets + w->relation[n] * dim;
        float *moved = w->moved + n * dim;
        floats with = {0}, without = {0};
        float moved_pair, pair;
        int64_t i;
        for (i = 0; i < whole; i += LANES) {
            const floats l = LOAD(lhs + i), r = LOAD(rhs + i), m = l + LOAD(offset + i);
            STORE(moved + i, m);
            with += m * r;
            without += l * r;
        }
        SUM_LANES(with, moved_pair);
        SUM_LANES(without, pair);
        for (; i < dim; i++) {
            moved[i] = lhs[i] + offset[i];
            moved_pair += moved[i] * rhs[i];
            pair += lhs[i] * rhs[i];
        }
        w->moved_pair[n] = moved_pair;
        w->pair[n] = pair;
    }
}

void tml_pairs(
    const crew_t *crew, int64_t rows, int64_t dim, const float *lhs, const float *rhs,
    const float *offsets, const int64_t *relation, float *moved, float *moved_pair, float *pair
) {
    pairs_t work = {
        .lhs = lhs, .rhs = rhs, .offsets = offsets, .relation = relation, .moved = moved,
        .moved_pair = moved_pair, .pair = pair, .rows = rows, .dim = dim,
    };
    spread(crew, (rows + ROWS_A_PART - 1) / ROWS_A_PART, pairs_part, &work);
}

/* Going backward: d_lhs holds the gradient of moved and d_rhs that of r, of all but the pairs; they
   become the whole gradients of l and r. d_offsets has a row for each run of equal relations inside
   a part, the first of part p being first_run[p]. */

FOR_EACH_PROCESSOR
static void derive_part(void *given, int64_t part) {
    const pairs_t *w = given;
    const int64_t dim = w->dim;
    int64_t start = part * ROWS_A_PART, stop = start + ROWS_A_PART, run = w->first_run[part];
    if (stop > w->rows) stop = w->rows;
    for (int64_t n = start; n < stop; n++) {
        if (n > start && w->relation[n] != w->relation[n - 1]) run++;
        const int is_first = n == start || w->relation[n] != w->relation[n - 1];
        const float *restrict lhs = w->lhs + n * dim, *restrict rhs = w->rhs + n * dim;
        const float *restrict offset = w->offsets + w->relation[n] * dim;
        float *restrict d_lhs = w->d_lhs + n * dim, *restrict d_rhs = w->d_rhs + n * dim;
        float *restrict sum = w->d_offsets + run * dim;
        const float with = w->d_moved_pair[n], without = w->d_pair[n];
        if (is_first) memset(sum, 0, dim * sizeof(float));
        for (int64_t i = 0; i < dim; i++) {
            const float d_moved = d_lhs[i] + with * rhs[i];
            sum[i] += d_moved;
            d_lhs[i] = d_moved + without * rhs[i];
            d_rhs[i] += with * (lhs[i] + offset[i]) + without * lhs[i];
        }
    }
}

void tml_derive_pairs(
    const crew_t *crew, int64_t rows, int64_t dim, const float *lhs, const float *rhs,
    const float *offsets, const int64_t *relation, const float *d_moved_pair, const float *d_pair,
    const int64_t *first_run, float *d_lhs, float *d_rhs, float *d_offsets
) {
    pairs_t work = {
        .lhs = lhs, .rhs = rhs, .offsets = offsets, .relation = relation,
        .first_run = first_run, .d_moved_pair = d_moved_pair, .d_pair = d_pair, .d_lhs = d_lhs,
        .d_rhs = d_rhs, .d_offsets = d_offsets, .rows = rows, .dim = dim,
    };
    spread(crew, (rows + ROWS_A_PART - 1) / ROWS_A_PART, derive_part, &work);
}
