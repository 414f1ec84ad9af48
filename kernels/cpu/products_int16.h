// The two inner loops for int8 caches and 16-bit queries, in integers: int8 widens to int16 in half
// the instructions that it takes to become floats. Queries and weights are rounded to 15 bits of
// their largest, 1/128 of what bfloat16 rounds off.

#pragma once

#include "products.h"

namespace attention {

#if HAS_INT16_DOT
template <int Q, bool whole>
INLINE Floats dots_int16(const int16_t* queries, int64_t stride, const int8_t* const* rows,
                         int64_t offset, int64_t dim) {
    constexpr int R = LANES / Q;
    Ints sums[LANES] = {};
    int64_t d = 0;
    auto step = [&](auto load_row) {
        Ints query[Q];
        for (int q = 0; q < Q; q++) query[q] = load<Ints>(queries + q * stride + d);
        for (int t = 0; t < R; t++) {
            Ints key = load_row(rows[t] + offset + d);
            for (int q = 0; q < Q; q++)
                sums[q * R + t] = add_int16_products(sums[q * R + t], query[q], key);
        }
    };
    for (; d + STEP <= dim; d += STEP) step([](const int8_t* p) { return widen_int8(p); });
    if constexpr (!whole)
        step([&](const int8_t* p) {
            int8_t padded[STEP] = {};
            memcpy(padded, p, dim - d);
            return widen_int8(padded);
        });
    return __builtin_convertvector(lane_sums(sums), Floats);
}

template <int Q, int STEPS, bool whole>
INLINE void accumulate_int16_steps(const int16_t* weights, const float* unit, const float* rescale,
                                   const int8_t* const* rows, int64_t offset, int count,
                                   float* sums, int64_t stride, int64_t dim,
                                   const int8_t* const* ahead) {
    constexpr int R = LANES / Q;
    IntPair sum[Q][STEPS] = {};
    for (int t = 0; t < count; t += 2) {  // a row past the last one is zeros
        const int8_t *a = rows[t] + offset, *b = rows[t + 1] + offset;
        if (ahead) {
            prefetch(ahead[t] + offset, whole ? STEPS * STEP : dim);
            prefetch(ahead[t + 1] + offset, whole ? STEPS * STEP : dim);
        }
        IntPair value[STEPS];
        for (int s = 0; s < STEPS; s++) {
            if (whole) {
                value[s] = interleave_int8(a + s * STEP, b + s * STEP);
            } else {
                int8_t padded[2][STEP] = {};
                memcpy(padded[0], a, dim);
                memcpy(padded[1], b, dim);
                value[s] = interleave_int8(padded[0], padded[1]);
            }
        }
        const int16_t* weight = weights + t / R * LANES + t % R;
        for (int q = 0; q < Q; q++) {
            int32_t two;
            memcpy(&two, weight + q * R, 4);
            Ints w = two - Ints{};
            for (int s = 0; s < STEPS; s++) {
                sum[q][s].first = add_int16_products(sum[q][s].first, value[s].first, w);
                sum[q][s].second = add_int16_products(sum[q][s].second, value[s].second, w);
            }
        }
    }
    for (int q = 0; q < Q; q++)
        for (int s = 0; s < STEPS; s++) {
            float* at = sums + q * stride + s * STEP;
            Pair added = in_order(__builtin_convertvector(sum[q][s].first, Floats),
                                  __builtin_convertvector(sum[q][s].second, Floats));
            float share = rescale[q * R], one = unit[q * R];
            store(at, load<Floats>(at) * share + added.first * one);
            store(at + LANES, load<Floats>(at + LANES) * share + added.second * one);
        }
}

template <int Q>
INLINE void accumulate_int16(const int16_t* weights, const float* unit, const float* rescale,
                             const int8_t* const* rows, int64_t offset, int count, float* sums,
                             int64_t stride, int64_t dim, const int8_t* const* ahead) {
    constexpr int MOST = LANES == 16 ? 2 : 1;
    int64_t d = 0;
    for (; d + MOST * STEP <= dim; d += MOST * STEP)
        accumulate_int16_steps<Q, MOST, true>(weights, unit, rescale, rows, offset + d, count,
                                              sums + d, stride, 0, ahead);
    for (; d + STEP <= dim; d += STEP)
        accumulate_int16_steps<Q, 1, true>(weights, unit, rescale, rows, offset + d, count,
                                           sums + d, stride, 0, ahead);
    if (d < dim)
        accumulate_int16_steps<Q, 1, false>(weights, unit, rescale, rows, offset + d, count,
                                            sums + d, stride, dim - d, ahead);
}
#endif

}  // namespace attention
