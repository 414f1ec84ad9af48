// Vectors of LANES floats, and conversions of stored elements to them.
//
// Uses the vector extensions of GCC and Clang, so one source serves AVX-512 (16 lanes), AVX2 (8) and
// everything else (4: SSE2, NEON). Only conversions use intrinsics.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#else
#define LANES 4
#endif

#if LANES == 16 && defined(__AVX512BF16__)
#define HAS_BF16_DOT 1
#else
#define HAS_BF16_DOT 0
#endif

#if HAS_BF16_DOT && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_MATRIX_UNITS 1
#else
#define HAS_MATRIX_UNITS 0
#endif

#if LANES > 4
#define HAS_INT16_DOT 1
#else
#define HAS_INT16_DOT 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int64_t Longs __attribute__((vector_size(4 * LANES)));

// Storage types that C++ lacks.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

INLINE Floats broadcast(float x) { return x - Floats{}; }

template <class Vector> INLINE Vector load(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class Vector> INLINE void store(void* to, Vector vector) {
    memcpy(to, &vector, sizeof vector);
}

// R words from memory, repeated until the vector is full.
template <int R> INLINE Words repeat(const void* from) {
    if constexpr (R == LANES) return load<Words>(from);
#if LANES == 16
    else if constexpr (R == 8)
        return (Words)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)from));
    else if constexpr (R == 4)
        return (Words)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from));
#elif LANES == 8
    else if constexpr (R == 4)
        return (Words)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
#endif
#if LANES < 16
    else if constexpr (R == 2) {
        int64_t two;
        memcpy(&two, from, 8);
        return (Words)(two - Longs{});
    } else {
        uint32_t one;
        memcpy(&one, from, 4);
        return one - Words{};
    }
#endif
}

// b if one of them is NaN.
INLINE Floats larger(Floats a, Floats b) {
#if LANES == 16
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

#if defined(__clang__)
#define PERMUTE(a, b, indices) permute_pair(a, b, indices)
template <class Vector, class Indices>
INLINE Vector permute_pair(Vector a, Vector b, Indices indices) {
    constexpr int count = sizeof(Indices) / sizeof(indices[0]);
    Vector result;
    for (int lane = 0; lane < count; lane++)
        result[lane] = indices[lane] < count ? a[indices[lane]] : b[indices[lane] - count];
    return result;
}
#else
#define PERMUTE(a, b, indices) __builtin_shuffle(a, b, indices)
#endif

// -------------------------------------------------------------------- scalars

INLINE float to_float(float x) { return x; }

INLINE float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

INLINE float to_float(fp16 x) {
    uint32_t magnitude = (x.bits & 0x7fffu) << 13;
    float result;
    memcpy(&result, &magnitude, 4);
    result *= 0x1p112f;  // fp16 has a smaller exponent bias; exact for subnormal numbers too
    memcpy(&magnitude, &result, 4);
    if ((x.bits & 0x7c00u) == 0x7c00u) magnitude |= 0x7f800000u;  // infinities and NaNs
    magnitude |= uint32_t(x.bits & 0x8000u) << 16;
    memcpy(&result, &magnitude, 4);
    return result;
}

INLINE void from_float(float x, float* to) { *to = x; }

INLINE void from_float(float x, bf16* to) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) to->bits = uint16_t((bits >> 16) | 0x40);
    else to->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // nearest, ties to even
}

INLINE void from_float(float x, fp16* to) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) { to->bits = uint16_t(sign | 0x7e00u); return; }
    if (magnitude >= 0x477ff000u) { to->bits = uint16_t(sign | 0x7c00u); return; }  // from 65520 on
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at the right bit
        float shifted;
        memcpy(&shifted, &magnitude, 4);
        shifted += 0.5f;
        memcpy(&magnitude, &shifted, 4);
        to->bits = uint16_t(sign | (magnitude - 0x3f000000u));
        return;
    }
    magnitude += 0xc8000fffu + ((magnitude >> 13) & 1);
    to->bits = uint16_t(sign | (magnitude >> 13));
}

// -------------------------------------------------------------------- elements

// 2 * LANES consecutive elements as floats. If `interleaved`, `first` holds the even elements and
// `second` the odd ones: for 16-bit types this takes one instruction instead of two.
struct Pair { Floats first, second; };

constexpr int STEP = 2 * LANES;

template <class T> struct Element;

template <> struct Element<float> {
    static constexpr bool interleaved = false;
    INLINE Pair load_step(const float* p) { return {load<Floats>(p), load<Floats>(p + LANES)}; }
};

template <> struct Element<bf16> {
    static constexpr bool interleaved = true;
    INLINE Pair load_step(const bf16* p) {
        Words words = load<Words>(p);
        return {(Floats)(words << 16), (Floats)(words & 0xffff0000u)};
    }
};

#if LANES == 16
template <> struct Element<fp16> {
    static constexpr bool interleaved = false;
    INLINE Pair load_step(const fp16* p) {
        return {(Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)),
                (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + LANES)))};
    }
};
template <> struct Element<int8_t> {
    static constexpr bool interleaved = false;
    INLINE Pair load_step(const int8_t* p) { return {one(p), one(p + LANES)}; }
    INLINE Floats one(const int8_t* p) {
        return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
};
#elif LANES == 8
template <> struct Element<fp16> {
    static constexpr bool interleaved = false;
    INLINE Pair load_step(const fp16* p) {
        return {(Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + LANES)))};
    }
};
template <> struct Element<int8_t> {
    static constexpr bool interleaved = false;
    INLINE Pair load_step(const int8_t* p) { return {one(p), one(p + LANES)}; }
    INLINE Floats one(const int8_t* p) {
        return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    }
};
#else
template <> struct Element<fp16> {
    static constexpr bool interleaved = true;
    INLINE Pair load_step(const fp16* p) {
        Words words = load<Words>(p);
        return {widen(words & 0xffffu), widen(words >> 16)};
    }
    INLINE Floats widen(Words half) {  // as the scalar `to_float`
        Floats scaled = (Floats)((half & 0x7fffu) << 13) * 0x1p112f;
        Words special = (Words)((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
        return (Floats)((Words)scaled | special | (half & 0x8000u) << 16);
    }
};
template <> struct Element<int8_t> {
    static constexpr bool interleaved = false;
    INLINE Pair load_step(const int8_t* p) { return {one(p), one(p + LANES)}; }
    INLINE Floats one(const int8_t* p) {
        // Move each byte to the top of its lane; an arithmetic shift back extends the sign.
        uint32_t bytes;
        memcpy(&bytes, p, 4);
        Words words = {bytes << 24, bytes << 16, bytes << 8, bytes};
        return __builtin_convertvector((Ints)words >> 24, Floats);
    }
};
#endif

// The first `count` of 2 * LANES elements; the others are zero and not read.
template <class T> INLINE Pair load_part(const T* p, int64_t count) {
    T padded[STEP];
    memset(padded, 0, sizeof padded);
    memcpy(padded, p, count * sizeof(T));
    return Element<T>::load_step(padded);
}

// The position of element `index` of a row after `load_step` has split its steps.
template <class T> INLINE int64_t place_of(int64_t index) {
    if (!Element<T>::interleaved) return index;
    int64_t within = index % STEP;
    return index - within + within / 2 + within % 2 * LANES;
}

// -------------------------------------------------------------------- arithmetic

constexpr float LOG2_E = 1.44269504f;

// 2^whole * x for a whole number `whole`; 0 if the result is below the normal numbers: computing with
// smaller ones takes a hundred cycles.
INLINE Floats times_power_of_two(Floats x, Floats whole) {
#if LANES == 16
    // True for NaN, too.
    auto stays = _mm512_cmp_ps_mask((__m512)whole, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return (Floats)_mm512_maskz_scalef_ps(stays, (__m512)x, (__m512)whole);
#else
    Ints vanishes = whole < -126.0f;
    Ints power = __builtin_convertvector(vanishes ? Floats{} : whole, Ints);
    return x * (vanishes ? Floats{} : (Floats)((power + 127) << 23));  // NaN stays NaN
#endif
}

INLINE Floats nearest_whole(Floats x) {
#if LANES == 16
    return (Floats)_mm512_roundscale_ps((__m512)x, 0);
#else
    return __builtin_convertvector(__builtin_convertvector(x - 0.5f, Ints), Floats);
#endif
}

// exp(x) for x <= 0 to about 2 ulp. Results below 1e-37 may become 0. NaN stays NaN. Range reduction
// by powers of two as in Cody & Waite, polynomial from Cephes (S. Moshier).
INLINE Floats exp_nonpositive(Floats x) {
#if LANES < 16
    x = larger(broadcast(-104.0f), x);  // powers of two must be finite
#endif
    Floats n = nearest_whole(x * LOG2_E);
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats y = broadcast(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    return times_power_of_two(y * r * r + r + 1.0f, n);
}

// tanh to about 4 ulp. Uses the series near 0, where 1 - exp(-2 x) has few digits.
INLINE Floats tanh_of(Floats x) {
    Floats size = x < Floats{} ? -x : x, square = x * x;
    Floats e = exp_nonpositive(size * -2.0f);
    Floats t = (1.0f - e) / (1.0f + e);
    Floats y = square * (62.0f / 2835) - 17.0f / 315;
    y = y * square + 2.0f / 15;
    y = y * square - 1.0f / 3;
    return size < 0.25f ? x + x * square * y : x < Floats{} ? -t : t;
}

// One level of a tree of sums. Lane i is lane i of `a` plus lane i + `distance` of `a`, or, if bit
// `distance` of i is set, lane i of `b` plus lane i - `distance` of `b`. One instruction permutes
// lanes, and a cheaper one merges.
template <int distance, class Vector> INLINE Vector fold(Vector a, Vector b) {
    Ints stays, comes;
    for (int lane = 0; lane < LANES; lane++) {
        bool of_b = lane & distance;
        stays[lane] = of_b ? lane + LANES : lane;
        comes[lane] = (of_b ? lane + LANES : lane) ^ distance;
    }
    return PERMUTE(a, b, stays) + PERMUTE(a, b, comes);
}

// A transposing tree: lane i of each run of R lanes is the sum of the same run in vectors[i].
template <int R, class Vector> INLINE Vector run_sums(const Vector* vectors) {
    Vector v[R];  // a copy, so that the caller's sums stay in registers
    for (int i = 0; i < R; i++) v[i] = vectors[i];
    if constexpr (R > 1) for (int i = 0; i < R / 2; i++) v[i] = fold<1>(v[2 * i], v[2 * i + 1]);
    if constexpr (R > 2) for (int i = 0; i < R / 4; i++) v[i] = fold<2>(v[2 * i], v[2 * i + 1]);
    if constexpr (R > 4) for (int i = 0; i < R / 8; i++) v[i] = fold<4>(v[2 * i], v[2 * i + 1]);
    if constexpr (R > 8) v[0] = fold<8>(v[0], v[1]);
    return v[0];
}

// The maximum (or sum) of each run of `width` lanes, in all lanes of the run.
template <int width, int distance = 1, class Combine>
INLINE Floats over_runs(Floats x, Combine combine) {
    if constexpr (distance < width) {
        Ints partner;
        for (int lane = 0; lane < LANES; lane++) partner[lane] = lane ^ distance;
        return over_runs<width, 2 * distance>(combine(x, PERMUTE(x, x, partner)), combine);
    }
    return x;
}

#if LANES == 16
// Exchanges rows and columns: blocks of half the size are exchanged, then blocks inside them.
INLINE void transpose(Words (&rows)[LANES]) {
    auto exchange = [&](auto distance_) {
        constexpr int distance = distance_();
        Ints upper, lower;
        for (int lane = 0; lane < LANES; lane++) {
            bool moves = lane & distance;
            upper[lane] = moves ? lane - distance + LANES : lane;
            lower[lane] = moves ? lane + LANES : lane + distance;
        }
        for (int i = 0; i < LANES; i++) {
            if (i & distance) continue;
            Words one = rows[i], other = rows[i + distance];
            rows[i] = PERMUTE(one, other, upper);
            rows[i + distance] = PERMUTE(one, other, lower);
        }
    };
    exchange(std::integral_constant<int, 8>{});
    exchange(std::integral_constant<int, 4>{});
    exchange(std::integral_constant<int, 2>{});
    exchange(std::integral_constant<int, 1>{});
}
#endif

#if HAS_BF16_DOT
// 2^x for x <= 0 to 3e-6, enough for bf16. NaN stays NaN.
INLINE Floats exp2_nonpositive(Floats x) {
    Floats n = nearest_whole(x), r = x - n;
    Floats y = r * 9.570101276e-3f + 5.591786653e-2f;
    y = y * r + 2.402474433e-1f;
    y = y * r + 6.931217909e-1f;
    return times_power_of_two(y * r + 9.999992847e-1f, n);
}

// Rounds both to bf16: words with `low` in the lower half.
INLINE Words rounded_pair(Floats low, Floats high) {
    auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    alignas(64) static constexpr uint16_t order[32] = {
        0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (Words)_mm512_permutexvar_epi16(load<__m512i>(order), halves);
}
#endif

#if HAS_INT16_DOT
// sums + a * b for vectors of 2 * LANES int16: each lane of `sums` adds two products.
INLINE Ints add_int16_products(Ints sums, Ints a, Ints b) {
#if LANES == 16 && defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif LANES == 16
    return sums + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
    return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

// Widens 2 * LANES int8 to int16.
INLINE Ints widen_int8(const int8_t* p) {
#if LANES == 16
    return (Ints)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#else
    return (Ints)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#endif
}

// As `repeat`, for R words of two int16 that are stored as int8.
template <int R> INLINE Words repeat_widened(const int8_t* from) {
#if LANES == 16
    __m256i bytes;
    if constexpr (R == 16) bytes = _mm256_loadu_si256((const __m256i*)from);
    else if constexpr (R == 8)
        bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
    else bytes = _mm256_set1_epi64x(load<int64_t>(from));
    return (Words)_mm512_cvtepi8_epi16(bytes);
#else
    __m128i bytes;
    if constexpr (R == 8) bytes = _mm_loadu_si128((const __m128i*)from);
    else if constexpr (R == 4) bytes = _mm_set1_epi64x(load<int64_t>(from));
    else bytes = _mm_set1_epi32(load<int32_t>(from));
    return (Words)_mm256_cvtepi8_epi16(bytes);
#endif
}

// Interleaves two rows of 2 * LANES elements: `first` gets the first half of the elements in each 128
// stored bits of a row, `second` the other half.
struct IntPair { Ints first, second; };

INLINE IntPair interleave(const int8_t* a, const int8_t* b) {
#if LANES == 16
    __m256i x = _mm256_loadu_si256((const __m256i*)a), y = _mm256_loadu_si256((const __m256i*)b);
    return {(Ints)_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(x, y)),
            (Ints)_mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(x, y))};
#else
    __m128i x = _mm_loadu_si128((const __m128i*)a), y = _mm_loadu_si128((const __m128i*)b);
    return {(Ints)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y)),
            (Ints)_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, y))};
#endif
}

// Rounds non-negative lanes to consecutive int16.
INLINE void store_int16(int16_t* to, Floats x) {
    Ints rounded = __builtin_convertvector(x + 0.5f, Ints);
#if LANES == 16
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)rounded));
#else
    __m256i packed = _mm256_packs_epi32((__m256i)rounded, (__m256i)rounded);
    packed = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(packed));
#endif
}
#endif
