// Tasks and the kv tokens that a query sees, scratch memory of a thread, and addresses of a tile.

#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "abi.h"

namespace attention {

constexpr int TILE_MOST = 32;

// Tokens of a tile. Two tiles of keys and values are in use at once, and wider elements fill the L2
// cache with fewer tokens. 32 tokens for float32 cost 5 to 8 %, and so do 16 for other types.
template <class T> constexpr int tile_of() { return sizeof(T) >= 4 ? 16 : TILE_MOST; }

// Query vectors of one kv head per task of few queries: their sums stay in the L1 and L2 caches.
constexpr int QUERIES = 16;
constexpr float LOWEST = -3.402823466e38f;
constexpr float INT16_MOST = 32767.0f;
// Keeps sums of int16 products below 2^31.
constexpr int64_t INT16_DIM_MOST = 512;

struct Task {
    int64_t row;
    int64_t first_query, num_queries;  // among the packed query tokens
    int64_t first_position;            // of the first query in its row
    int64_t start, stop;               // kv tokens
    int64_t partial;                   // slot of the partial result; -1: write the output
    bool with_sink;
    int64_t kv_head;                   // of a task of many queries (`prefill.h`); -1: all heads
};

// The kv tokens [first, last) that the query at `position` of a row sees.
struct Range { int64_t first, last; };

INLINE Range visible(const AttentionArguments& a, int64_t row, int64_t position, int64_t seq_len) {
    int64_t first = std::max<int64_t>(0, a.kv_starts.at(row)), last = seq_len;
    if (a.window > 0) first = std::max(first, position - a.window + 1);
    if (a.mask) first = std::max(first, seq_len - a.mask_columns);
    if (a.causal) last = std::min(last, position + 1);
    return {first, std::max(first, last)};
}

inline int64_t padded(int64_t dim) { return (dim + STEP - 1) / STEP * STEP; }

// Most rows that `dots` takes at once.
constexpr int ROWS_STAGED = LANES < 8 ? 8 : LANES;

// Memory of one thread, grown as needed and kept for its next call.
class Memory {
    std::vector<float> floats;

public:
    struct Part { float** start; int64_t size; };

    // Gives each part whole cache lines.
    void divide(std::initializer_list<Part> parts) {
        int64_t total = 16;
        for (const Part& part : parts) total += (part.size + 15) / 16 * 16;
        if (int64_t(floats.size()) < total) floats.resize(total);
        float* next = (float*)((uintptr_t(floats.data()) + 63) / 64 * 64);
        for (const Part& part : parts) {
            *part.start = next;
            next += (part.size + 15) / 16 * 16;
        }
    }
};

struct Scratch {
    Memory memory;
    float *queries, *sums, *highest, *totals, *bias, *units;
    char* staged;  // rows for `dots`

    void prepare(const AttentionArguments& a, int64_t vectors) {
        int64_t heads = a.kv_heads * vectors, bias_rows = a.query_heads * vectors;
        float* rows;
        memory.divide({{&queries, heads * padded(a.head_dim)},
                       {&sums, heads * padded(a.value_dim)},
                       {&highest, heads * LANES},
                       {&totals, heads * LANES},
                       {&bias, bias_rows * TILE_MOST},
                       {&units, heads * LANES},
                       {&rows, ROWS_STAGED * padded(a.head_dim)}});
        staged = (char*)rows;
    }
};

// Addresses of a tile's tokens. Hidden tokens and padding point to zeros: 0 * NaN is NaN, so stale
// bytes must not be multiplied even by a weight of zero.
template <class T, int TILE = tile_of<T>()> struct Tile {
    const T *keys[TILE], *values[TILE];
    const float *key_scales[TILE], *value_scales[TILE];
    int64_t start = 0;
    int count = 0;      // tokens
    bool holes = false;  // a token has no block

    void look_up(const AttentionArguments& a, const Task& task, int64_t from, const T* zeros,
                 const float* zero_scales) {
        start = from;
        count = int(std::min<int64_t>(TILE, task.stop - from));
        holes = false;
        const int32_t* table = a.block_tables + task.row * a.table_stride;
        for (int i = 0; i < count;) {
            int64_t block = table[(from + i) / a.block_size], offset = (from + i) % a.block_size;
            int run = int(std::min<int64_t>(count - i, a.block_size - offset));
            if (block < 0) {
                fill(i, i + run, zeros, zero_scales);
                holes = true;
            } else {
                const T* key = (const T*)a.key + block * a.key_block + offset * a.key_token;
                const T* value = (const T*)a.value + block * a.value_block + offset * a.value_token;
                for (int j = i; j < i + run; j++, key += a.key_token, value += a.value_token) {
                    keys[j] = key;
                    values[j] = value;
                }
                if (a.key_scales) {
                    int64_t at = block * a.scale_block + offset * a.scale_token;
                    for (int j = i; j < i + run; j++, at += a.scale_token) {
                        key_scales[j] = a.key_scales + at;
                        value_scales[j] = a.value_scales + at;
                    }
                }
            }
            i += run;
        }
        fill(count, TILE, zeros, zero_scales);
    }

    void fill(int from, int to, const T* zeros, const float* zero_scales) {
        for (int i = from; i < to; i++) {
            keys[i] = values[i] = zeros;
            key_scales[i] = value_scales[i] = zero_scales;
        }
    }
};

}  // namespace attention
