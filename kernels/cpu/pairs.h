// Weighted sums of values, two tokens at a time, with instructions that add two products at once.
// Weights of bf16 values are rounded to bf16, as in FlashAttention, and sums are fp32. Weights of int8
// values are rounded to 15 bits of the largest weight, 1/128 of the error of bf16, and sums are exact.
// Widening int8 to int16 takes half the instructions of widening to fp32.

#pragma once

#include "products.h"

namespace attention {

#if HAS_INT16_DOT
// Interleaves two rows of STEP elements.
INLINE IntPair interleaved(const int8_t* a, const int8_t* b) { return interleave(a, b); }
#if HAS_BF16_DOT
INLINE IntPair interleaved(const bf16* a, const bf16* b) {
    auto x = load<__m512i>(a), y = load<__m512i>(b);
    return {(Ints)_mm512_unpacklo_epi16(x, y), (Ints)_mm512_unpackhi_epi16(x, y)};
}
#endif

template <class T, int Q, int STEPS>
INLINE void accumulate_pairs_steps(const int16_t* weights, const float* unit, const float* rescale,
                                   const T* const* rows, int64_t offset, int64_t dim, int count,
                                   float* sums, int64_t stride, const T* const* ahead) {
    constexpr int R = LANES / Q;
    constexpr auto arithmetic = sizeof(T) == 1 ? IN_INT16 : BF16_DOTS;
    using Sum = std::conditional_t<arithmetic == IN_INT16, Ints, Floats>;
    struct { Sum first, second; } sum[Q][STEPS] = {};
    for (int t = 0; t < count; t += 2) {  // a row past the last row is zero
        const T *a = rows[t] + offset, *b = rows[t + 1] + offset;
        if (ahead) {
            prefetch(ahead[t] + offset, dim);
            prefetch(ahead[t + 1] + offset, dim);
        }
        IntPair value[STEPS];
        if (dim < STEP) {
            T padded[2][STEP] = {};
            memcpy(padded[0], a, dim * sizeof(T));
            memcpy(padded[1], b, dim * sizeof(T));
            value[0] = interleaved(padded[0], padded[1]);
        } else {
            for (int s = 0; s < STEPS; s++) value[s] = interleaved(a + s * STEP, b + s * STEP);
        }
        const int16_t* weight = weights + t / R * LANES + t % R;
        for (int q = 0; q < Q; q++) {
            uint32_t two;
            memcpy(&two, weight + q * R, 4);
            Words w = two - Words{};
            for (int s = 0; s < STEPS; s++) {
                auto& at = sum[q][s];
                at.first = multiply_add<arithmetic>(at.first, (Words)value[s].first, w);
                at.second = multiply_add<arithmetic>(at.second, (Words)value[s].second, w);
            }
        }
    }
    for (int q = 0; q < Q; q++)
        for (int s = 0; s < STEPS; s++) {
            float* at = sums + q * stride + s * STEP;
            Floats first = __builtin_convertvector(sum[q][s].first, Floats);
            Floats second = __builtin_convertvector(sum[q][s].second, Floats);
            store(at, load<Floats>(at) * rescale[q * R] + first * unit[q * R]);
            store(at + LANES, load<Floats>(at + LANES) * rescale[q * R] + second * unit[q * R]);
        }
}

// sums[q] = sums[q] * rescale[q] + unit[q] * (weights of q) * values.
template <class T, int Q>
INLINE void accumulate_pairs(const int16_t* weights, const float* unit, const float* rescale,
                             const T* const* rows, int64_t offset, int64_t dim, int count,
                             float* sums, int64_t stride, const T* const* ahead) {
    constexpr int MOST = LANES == 16 ? 2 : 1;
    int64_t d = 0;
    for (; d + MOST * STEP <= dim; d += MOST * STEP)
        accumulate_pairs_steps<T, Q, MOST>(weights, unit, rescale, rows, offset + d, MOST * STEP,
                                           count, sums + d, stride, ahead);
    for (; d + STEP <= dim; d += STEP)
        accumulate_pairs_steps<T, Q, 1>(weights, unit, rescale, rows, offset + d, STEP, count,
                                        sums + d, stride, ahead);
    if (d < dim)
        accumulate_pairs_steps<T, Q, 1>(weights, unit, rescale, rows, offset + d, dim - d, count,
                                        sums + d, stride, ahead);
}
#endif

}  // namespace attention
