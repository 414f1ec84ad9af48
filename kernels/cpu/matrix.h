// Attention of bfloat16 with matrix units (Intel AMX): 16 kv tokens times 16 query vectors at once.
//
//   a task      = as in `prefill.h`: one row, one kv head, a chunk of its queries, a range of tokens
//   a tile      = MATRIX_TILE kv tokens
//   a group     = 16 query vectors, one per lane; products take two groups at a time
//
//   scores  [token][query] = keys [token][dim]     times queries [dim][query]
//   weights                = online softmax, lane by lane, rounded to bf16
//   sums    [dim][query]  += values [dim][token]   times weights [token][query]
//
// So the left operand is a matrix of plain rows, and the right operand has pairs of rows in one word:
// `Right` of the code. Keys are plain rows in memory. Values are transposed once per tile for all
// queries of the task.

#pragma once

#include "lanes.h"

#if HAS_MATRIX_UNITS
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace attention {

// Queries and sums of a task stay in the L2 cache.
constexpr Share MATRIX_SHARE{16, 512, 512 * 128, 2 * LANES};

#if HAS_MATRIX_UNITS

constexpr int MATRIX_TILE = 128;
constexpr int64_t STEP_BYTES = 64 * 16;  // of a right operand: 32 rows, 16 columns

// True if Linux lets this process use the registers of matrix units: 8 KiB more per thread.
inline bool has_matrix_units() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
}

// Uses all eight registers of a thread as 16 rows of 64 bytes.
class MatrixUnits {
public:
    MatrixUnits() {
        struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shapes{};
        shapes.palette = 1;
        for (int i = 0; i < 8; i++) {
            shapes.bytes[i] = 64;
            shapes.rows[i] = 16;
        }
        _tile_loadconfig(&shapes);
    }
    ~MatrixUnits() { _tile_release(); }
};

// to[column group][row][16 columns] (+)= left [rows, 32 * steps] times right [column group][step].
// Rows come in multiples of 32. `left_row`: bytes; `right_group`, `to_group`: bytes per column group.
template <int GROUPS, bool adds>
INLINE void multiply(const char* left, int64_t left_row, int64_t rows, const char* right,
                     int64_t right_group, int64_t steps, char* to, int64_t to_group) {
    for (int64_t row = 0; row < rows; row += 32, left += 32 * left_row, to += 32 * 64) {
        if constexpr (adds) {
            _tile_loadd(0, to, 64);
            _tile_loadd(1, to + 16 * 64, 64);
            if constexpr (GROUPS == 2) {
                _tile_loadd(2, to + to_group, 64);
                _tile_loadd(3, to + to_group + 16 * 64, 64);
            }
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t step = 0; step < steps; step++) {
            _tile_loadd(4, left + step * 64, left_row);
            _tile_loadd(5, left + step * 64 + 16 * left_row, left_row);
            _tile_loadd(6, right + step * STEP_BYTES, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if constexpr (GROUPS == 2) {
                _tile_loadd(7, right + right_group + step * STEP_BYTES, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, to, 64);
        _tile_stored(1, to + 16 * 64, 64);
        if constexpr (GROUPS == 2) {
            _tile_stored(2, to + to_group, 64);
            _tile_stored(3, to + to_group + 16 * 64, 64);
        }
    }
}

struct MatrixScratch {
    Memory memory;
    float *queries, *sums, *lanes, *scores, *weights, *keys, *values;

    void prepare(int64_t count, int64_t key_dim, int64_t value_dim) {
        memory.divide({{&queries, count * key_dim / 2},
                       {&sums, count * value_dim},
                       {&lanes, count * QueryLanes::FLOATS},
                       {&scores, 2 * LANES * MATRIX_TILE},
                       {&weights, 2 * LANES * MATRIX_TILE / 2},
                       {&keys, MATRIX_TILE * key_dim / 2},
                       {&values, MATRIX_TILE * value_dim / 2}});
    }
};

struct MatrixWorker {
    static constexpr int TILE = MATRIX_TILE;
    const AttentionArguments& a;
    const Task& task;
    MatrixScratch& scratch;
    const bf16* zeros;
    QueryLanes queries{a, task};
    int64_t key_dim = 0, value_dim = 0;  // padded to whole steps
    Tile<bf16, TILE> tile = {};

    void run() {
        key_dim = padded(a.head_dim);
        value_dim = padded(a.value_dim);
        scratch.prepare(queries.lanes, key_dim, value_dim);
        begin();
        MatrixUnits units;
        for (int64_t from = task.start; from < task.stop; from += TILE) {
            tile.look_up(a, task, from, zeros, nullptr);
            stage_keys();
            transpose_values();
            int64_t first = 0;
            for (; first + 2 * LANES <= queries.lanes; first += 2 * LANES) attend<2>(first);
            if (first < queries.lanes) attend<1>(first);
        }
        finish();
    }

    // The `count` first of 16 words, the others 0.
    INLINE_MEMBER static Words words_of(const void* from, int64_t bytes) {
        if (bytes >= 64) return load<Words>(from);
        Words words{};
        memcpy(&words, from, std::max<int64_t>(bytes, 0));
        return words;
    }

    // Queries as right operands: [group][step][pair of elements][query].
    void begin() {
        memset(scratch.sums, 0, queries.lanes * value_dim * sizeof(float));
        queries.begin(scratch.lanes, LOG2_E);
        char* to = (char*)scratch.queries;
        for (int64_t first = 0; first < queries.lanes; first += LANES)
            for (int64_t d = 0; d < key_dim; d += STEP, to += STEP_BYTES) {
                Words rows[LANES] = {};
                for (int64_t i = 0; i < std::min<int64_t>(LANES, queries.vectors - first); i++) {
                    const bf16* query = (const bf16*)a.query + queries.place_of_query(first + i);
                    rows[i] = words_of(query + d, (a.head_dim - d) * 2);
                }
                transpose(rows);
                memcpy(to, rows, STEP_BYTES);
            }
    }

    void stage_keys() {
        auto* to = (bf16*)scratch.keys;
        for (int i = 0; i < TILE; i++, to += key_dim) {
            const bf16* key = tile.keys[i] + task.kv_head * a.key_head;
            for (int64_t d = 0; d < key_dim; d += STEP)
                store(to + d, words_of(key + d, (a.head_dim - d) * 2));
        }
    }

    // [dim][token]: words of two tokens are transposed.
    void transpose_values() {
        int64_t offset = task.kv_head * a.value_head;
        for (int first = 0; first < TILE; first += 32)
            for (int64_t d = 0; d < value_dim; d += STEP) {
                Words low[LANES], high[LANES];
                int64_t bytes = (a.value_dim - d) * 2;
                for (int i = 0; i < LANES; i++) {
                    const bf16 *one = tile.values[first + 2 * i] + offset + d,
                               *other = tile.values[first + 2 * i + 1] + offset + d;
                    Words even = words_of(one, bytes), odd = words_of(other, bytes);
                    low[i] = (even & 0xffffu) | odd << 16;
                    high[i] = even >> 16 | (odd & 0xffff0000u);
                }
                transpose(low);
                transpose(high);
                auto* to = (bf16*)scratch.values + d * TILE + first;
                for (int i = 0; i < LANES; i++) {
                    store(to + 2 * i * TILE, low[i]);
                    store(to + (2 * i + 1) * TILE, high[i]);
                }
            }
    }

    template <int GROUPS> __attribute__((noinline)) void attend(int64_t first) {
        Range part = queries.part_of(tile, first, first + GROUPS * LANES, STEP);
        int from = int(part.first), to = int(part.last);
        if (from >= to) return;
        auto* scores = (Floats*)scratch.scores;
        multiply<GROUPS, false>((char*)scratch.keys + from * key_dim * 2, key_dim * 2, to - from,
                                (char*)scratch.queries + first * key_dim * 2, LANES * key_dim * 2,
                                key_dim / STEP, (char*)(scores + from), TILE * 64);
        for (int group = 0; group < GROUPS; group++)
            weigh(first + group * LANES, from, to, scores + group * TILE,
                  (Words*)scratch.weights + group * TILE / 2);
        multiply<GROUPS, true>((char*)scratch.values + from * 2, TILE * 2, value_dim,
                               (char*)scratch.weights + from * 32, TILE * 32, (to - from) / STEP,
                               (char*)(scratch.sums + first * value_dim), LANES * value_dim * 4);
    }

    // Scores become weights, as a right operand; rescales the earlier sums. Maxima are exponents of 2.
    INLINE_MEMBER void weigh(int64_t vector, int from, int to, Floats* scores, Words* weights) {
        queries.hide<1>(tile, zeros, vector, from, to, scores);
        float unit = a.softmax_scale * LOG2_E;
        if (a.softcap > 0 || !(unit > 0)) {
            for (int t = from; t < to; t++) scores[t] = capped(scores[t]);
            unit = 1;
        }
        Floats before = load<Floats>(queries.highest + vector);
        Floats most = larger(queries.highest_of<1>(scores, from, to) * unit, before);
        Floats rescale = exp2_nonpositive(before - most), total = {};
        for (int t = from; t < to; t += 2) {
            Floats one = exp2_nonpositive(scores[t] * unit - most);
            Floats other = exp2_nonpositive(scores[t + 1] * unit - most);
            total += one + other;
            weights[t / 2] = rounded_pair(one, other);
        }
        store(queries.highest + vector, most);
        float* totals = queries.totals + vector;
        store(totals, load<Floats>(totals) * rescale + total);
        if (!_mm512_cmpneq_ps_mask((__m512)rescale, (__m512)broadcast(1))) return;
        auto* sums = (Floats*)(scratch.sums + vector * value_dim);
        for (int64_t d = 0; d < value_dim; d++) sums[d] *= rescale;
    }

    INLINE_MEMBER Floats capped(Floats score) const {
        Floats scaled = score * a.softmax_scale;
        if (a.softcap > 0) scaled = tanh_of(scaled * (1 / a.softcap)) * a.softcap;
        // A scale that is not positive must not turn hidden scores into others.
        return (score == -INFINITY ? score : scaled) * LOG2_E;
    }

    void finish() {
        for (int64_t first = 0; first < queries.lanes; first += LANES) {
            int64_t count = std::min<int64_t>(LANES, queries.vectors - first);
            float *partials[LANES], shares[LANES] = {};
            bf16* outputs[LANES];
            for (int64_t i = 0; i < count; i++) {
                bool is_partial = task.partial >= 0;
                if (is_partial) partials[i] = queries.partial_of(first + i);
                else outputs[i] = (bf16*)a.output + queries.place_of_output(first + i);
                shares[i] = is_partial ? 1 : queries.share_of(first + i);
            }
            for (int64_t d = 0; d < a.value_dim; d += LANES) {
                Words rows[LANES];
                auto* sums = (Floats*)(scratch.sums + first * value_dim) + d;
                for (int i = 0; i < LANES; i++) rows[i] = (Words)(sums[i] * load<Floats>(shares));
                transpose(rows);
                int64_t dims = std::min<int64_t>(LANES, a.value_dim - d);
                for (int64_t i = 0; i < count; i++) {
                    auto rounded = _mm512_cvtneps_pbh((__m512)rows[i]);
                    if (task.partial >= 0) memcpy(partials[i] + d, &rows[i], dims * sizeof(float));
                    else if (dims == LANES) store(outputs[i] + d, rounded);
                    else memcpy(outputs[i] + d, &rounded, dims * sizeof(bf16));
                }
            }
        }
    }
};

#else

inline bool has_matrix_units() { return false; }

#endif

}  // namespace attention
