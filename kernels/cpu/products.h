// The two inner loops: dot products with keys, and weighted sums of values in floats.

#pragma once

#include <type_traits>

#include "simd.h"

namespace attention {

// Arithmetic of a kv head's dot products and sums: fp32; bf16 if CPU, query and cache have it;
// int16 for int8 caches and 16-bit queries.
enum Arithmetic { IN_FLOATS, BF16_DOTS, IN_INT16 };

// Prefetch into the L2 cache: L1 is full of the current tile, and prefetching into L1 halved the
// speed of the kernel.
template <class T> INLINE void prefetch(const T* from, int64_t elements) {
    for (int64_t byte = 0; byte < elements * int64_t(sizeof(T)); byte += 64)
        __builtin_prefetch((const char*)from + byte, 0, 2);
}

// -------------------------------------------------------------------- dot products
//
// Rows are read as 32-bit words: a float, or two bf16 or int16. A vector holds consecutive words of
// several queries, as many as fit. The same words of a key, repeated to fill a vector, multiply all
// queries at once. So only a few lanes remain to be added up.

// Words of a row per vector. Half a vector loads as fast as a whole vector, a smaller part does not.
template <int Q> constexpr int words_at_once() {
    return LANES == 16 && Q == 4 ? 8 : LANES / Q;
}

// Vectors that hold `words_at_once` words of all Q queries.
template <int Q> constexpr int query_vectors() { return words_at_once<Q>() * Q / LANES; }

// The position of a word of query q in the layout of `dots`.
template <int Q> INLINE int64_t place_of_word(int64_t q, int64_t word) {
    constexpr int WORDS = words_at_once<Q>(), VECTORS = query_vectors<Q>();
    return (word / WORDS * VECTORS + q % VECTORS) * LANES + q / VECTORS * WORDS + word % WORDS;
}

template <Arithmetic arithmetic> INLINE auto multiply_add(Floats sum, Words query, Words key) {
    static_assert(arithmetic != IN_INT16);
#if HAS_BF16_DOT
    if constexpr (arithmetic == BF16_DOTS)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)query, (__m512bh)key);
#endif
    if constexpr (arithmetic == IN_FLOATS) return sum + (Floats)query * (Floats)key;
}

#if HAS_INT16_DOT
template <Arithmetic arithmetic> INLINE Ints multiply_add(Ints sum, Words query, Words key) {
    return add_int16_products(sum, (Ints)query, (Ints)key);
}
#endif

// Vectors of scores computed together: eight sums hide the latency of a multiplication.
template <int Q> constexpr int scores_at_once() {
    constexpr int SUMS = LANES / Q * query_vectors<Q>();
    return SUMS < 8 ? 8 / SUMS : 1;
}

// scores[v], lane q * R + t, with R = LANES / Q: the product of query q and row v * R + t. `words`:
// words per row. T: the stored type, unless rows are stored as words.
template <class T, int Q, Arithmetic arithmetic>
INLINE void dots(const float* queries, const char* const* rows, int64_t words, Floats* scores) {
    constexpr int R = LANES / Q, WORDS = words_at_once<Q>(), VECTORS = query_vectors<Q>();
    constexpr int ROWS = R * scores_at_once<Q>();
    constexpr bool widen = arithmetic == IN_INT16 && sizeof(T) == 1;
    using Sum = std::conditional_t<arithmetic == IN_INT16, Ints, Floats>;
    Sum sums[ROWS][VECTORS] = {}, folded[ROWS];
    for (int64_t word = 0; word < words; word += WORDS) {
        Words query[VECTORS];
        for (int v = 0; v < VECTORS; v++) query[v] = load<Words>(queries + word * Q + v * LANES);
        for (int t = 0; t < ROWS; t++) {
            Words key;
#if HAS_INT16_DOT
            if constexpr (widen) key = repeat_widened<WORDS>((const int8_t*)rows[t] + word * 2);
#endif
            if constexpr (!widen) key = repeat<WORDS>(rows[t] + word * 4);
            for (int v = 0; v < VECTORS; v++)
                sums[t][v] = multiply_add<arithmetic>(sums[t][v], query[v], key);
        }
    }
    for (int t = 0; t < ROWS; t++) {
        folded[t] = sums[t][0];
        if constexpr (VECTORS == 2) folded[t] = fold<R>(sums[t][0], sums[t][1]);
    }
    for (int v = 0; v < ROWS / R; v++)
        scores[v] = __builtin_convertvector(run_sums<R>(folded + v * R), Floats);
}

// Converts a row to the layout of `dots`: widened and padded with zeros.
template <class T, Arithmetic arithmetic> INLINE void stage(const T* row, int64_t dim, char* to) {
    constexpr int SIZE = arithmetic == IN_FLOATS ? 4 : 2;
    for (int64_t d = 0; d < dim; d += STEP, to += STEP * SIZE) {
        T padded[STEP] = {};
        const T* from = row + d;
        if (dim - d < STEP) {
            memcpy(padded, from, (dim - d) * sizeof(T));
            from = padded;
        }
        if constexpr (arithmetic == IN_FLOATS) {
            Pair pair = Element<T>::load_step(from);
            store(to, pair.first);
            store(to + sizeof(Floats), pair.second);
        }
        if constexpr (arithmetic == BF16_DOTS) store(to, load<Words>(from));
#if HAS_INT16_DOT
        if constexpr (arithmetic == IN_INT16) store(to, widen_int8(from));
#endif
    }
}

// -------------------------------------------------------------------- weighted sums

// sums[q] = sums[q] * rescale[q] + (weights of q) * values, for `STEPS` steps of the value's dim.
template <class T, int Q, int STEPS, bool whole>
INLINE void accumulate_steps(const float* weights, const float* rescale, const T* const* rows,
                             int64_t offset, int count, float* sums, int64_t stride, int64_t dim,
                             const T* const* ahead) {
    constexpr int R = LANES / Q;
    Pair sum[Q][STEPS];
    for (int q = 0; q < Q; q++)
        for (int s = 0; s < STEPS; s++) {
            const float* at = sums + q * stride + s * STEP;
            sum[q][s] = {load<Floats>(at) * rescale[q * R],
                         load<Floats>(at + LANES) * rescale[q * R]};
        }
    for (int t = 0; t < count; t++) {
        const T* row = rows[t] + offset;
        if (ahead) prefetch(ahead[t] + offset, whole ? STEPS * STEP : dim);
        const float* weight = weights + t / R * LANES + t % R;
        Pair value[STEPS];
        for (int s = 0; s < STEPS; s++)
            value[s] = whole ? Element<T>::load_step(row + s * STEP) : load_part(row, dim);
        for (int q = 0; q < Q; q++) {
            Floats w = broadcast(weight[q * R]);
            for (int s = 0; s < STEPS; s++) {
                sum[q][s].first += w * value[s].first;
                sum[q][s].second += w * value[s].second;
            }
        }
    }
    for (int q = 0; q < Q; q++)
        for (int s = 0; s < STEPS; s++) {
            float* at = sums + q * stride + s * STEP;
            store(at, sum[q][s].first);
            store(at + LANES, sum[q][s].second);
        }
}

template <class T, int Q>
INLINE void accumulate(const float* weights, const float* rescale, const T* const* rows,
                       int64_t offset, int count, float* sums, int64_t stride, int64_t dim,
                       const T* const* ahead) {
    // As many sums at once as fit the registers.
    constexpr int MOST = LANES == 16 ? (Q == 4 ? 2 : 4) : (Q == 4 ? 1 : 2);
    int64_t d = 0;
    for (; d + MOST * STEP <= dim; d += MOST * STEP)
        accumulate_steps<T, Q, MOST, true>(weights, rescale, rows, offset + d, count, sums + d,
                                           stride, 0, ahead);
    for (; d + STEP <= dim; d += STEP)
        accumulate_steps<T, Q, 1, true>(weights, rescale, rows, offset + d, count, sums + d, stride,
                                        0, ahead);
    if (d < dim)
        accumulate_steps<T, Q, 1, false>(weights, rescale, rows, offset + d, count, sums + d,
                                         stride, dim - d, ahead);
}

}  // namespace attention
