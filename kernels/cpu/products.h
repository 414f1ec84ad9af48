// The two inner loops, in floats: dot products with keys, and weighted sums of values.

#pragma once

#include "simd.h"

namespace attention {

// Into the second cache: the first one is full of the tile at hand, and asking for it there made
// the whole kernel half as fast.
template <class T> INLINE void prefetch(const T* from, int64_t elements) {
    for (int64_t byte = 0; byte < elements * int64_t(sizeof(T)); byte += 64)
        __builtin_prefetch((const char*)from + byte, 0, 2);
}

// The dot products of Q query vectors with R = LANES / Q key rows, each lane its own.
// `whole`: the dim is a multiple of STEP. A case of its own, so that sums can stay in registers.
template <class T, int Q, bool whole>
INLINE Floats dots(const float* queries, int64_t stride, const T* const* rows, int64_t offset,
                   int64_t dim) {
    constexpr int R = LANES / Q;
    Floats sums[LANES] = {};
    int64_t d = 0;
    auto step = [&](auto load_row) {
        Pair query[Q];
        for (int q = 0; q < Q; q++)
            query[q] = {load<Floats>(queries + q * stride + d),
                        load<Floats>(queries + q * stride + d + LANES)};
        for (int t = 0; t < R; t++) {
            Pair key = load_row(rows[t] + offset + d);
            for (int q = 0; q < Q; q++) {
                sums[q * R + t] += query[q].first * key.first;
                sums[q * R + t] += query[q].second * key.second;
            }
        }
    };
    for (; d + STEP <= dim; d += STEP) step([](const T* p) { return Element<T>::load_step(p); });
    if constexpr (!whole) step([&](const T* p) { return load_part(p, dim - d); });
    return lane_sums(sums);
}

#if HAS_BF16_DOT
// The same by the CPU's own bf16 dot product, where the query is bf16 as well: its products are
// exact and its sums fp32. `queries` hold the query's own 16-bit elements.
template <int Q>
INLINE Floats dots_bf16(const float* queries, int64_t stride, const bf16* const* rows,
                        int64_t offset, int64_t dim) {
    constexpr int R = LANES / Q;
    __m512 sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += STEP) {
        __m512bh query[Q];
        for (int q = 0; q < Q; q++)
            query[q] = (__m512bh)load<Words>((const bf16*)(queries + q * stride) + d);
        __mmask32 real = dim - d >= STEP ? ~0u : (1u << (dim - d)) - 1;
        for (int t = 0; t < R; t++) {
            __m512bh key = (__m512bh)_mm512_maskz_loadu_epi16(real, rows[t] + offset + d);
            for (int q = 0; q < Q; q++)
                sums[q * R + t] = _mm512_dpbf16_ps(sums[q * R + t], query[q], key);
        }
    }
    return lane_sums((Floats*)sums);
}
#endif

// sums[q] = sums[q] * rescale[q] + weights of q times values, for `STEPS` steps of the value's dim.
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
    // As many sums at once as registers hold.
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
