// What a task is, and which kv tokens a query may see.

#pragma once

#include <algorithm>
#include <cstdint>

#include "abi.h"

namespace attention {

constexpr int TILE_MOST = 32;

// Tokens of a tile. Two tiles of keys and values are under way at once: with wider elements, fewer
// tokens fill the second cache (32 for float32 cost 5 to 8 %, 16 for the others as much).
template <class T> constexpr int tile_of() { return sizeof(T) >= 4 ? 16 : TILE_MOST; }

// Query vectors of one kv head that a task handles: their sums stay in the first caches.
constexpr int QUERIES = 16;
constexpr float LOWEST = -3.402823466e38f;
constexpr float INT16_MOST = 32767.0f;
// So that no sum of int16 products passes 2^31.
constexpr int64_t INT16_DIM_MOST = 512;

struct Task {
    int64_t row;
    int64_t first_query, num_queries;  // among the packed query tokens
    int64_t first_position;            // of the first query in its row
    int64_t start, stop;               // kv tokens
    int64_t partial;                   // slot of the partial result, -1: write the output
    bool with_sink;
};

// What of a row's kv some query may see: [first, last).
struct Range { int64_t first, last; };

INLINE Range visible(const AttentionArguments& a, int64_t row, int64_t position, int64_t seq_len) {
    int64_t first = std::max<int64_t>(0, a.kv_starts.at(row)), last = seq_len;
    if (a.window > 0) first = std::max(first, position - a.window + 1);
    if (a.mask) first = std::max(first, seq_len - a.mask_columns);
    if (a.causal) last = std::min(last, position + 1);
    return {first, std::max(first, last)};
}

}  // namespace attention
