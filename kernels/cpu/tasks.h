// Tasks, and the kv tokens that a query sees.

#pragma once

#include <algorithm>
#include <cstdint>

#include "abi.h"

namespace attention {

constexpr int TILE_MOST = 32;

// Tokens of a tile. Two tiles of keys and values are in use at once, and wider elements fill the L2
// cache with fewer tokens. 32 tokens for float32 cost 5 to 8 %, and so do 16 for other types.
template <class T> constexpr int tile_of() { return sizeof(T) >= 4 ? 16 : TILE_MOST; }

// Query vectors of one kv head per task: their sums stay in the L1 and L2 caches.
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

}  // namespace attention
