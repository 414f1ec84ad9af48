// Reads additive and boolean masks as the biases of a tile.

#pragma once

#include "tile.h"

namespace attention {

// Libraries mask with -inf or with the lowest number of the type.
INLINE float bias_of(uint8_t value) { return value ? 0.0f : -INFINITY; }
INLINE float bias_of(float value) { return value > LOWEST ? value : -INFINITY; }
INLINE float bias_of(bf16 value) {
    return to_float(value) > -3.3895314e38f ? to_float(value) : -INFINITY;
}
INLINE float bias_of(fp16 value) {
    return to_float(value) > -65504.0f ? to_float(value) : -INFINITY;
}

// The mask of a tile as bias[head or 0][query][token], -inf for hidden tokens.
template <class M>
void read_mask(const AttentionArguments& a, const Task& task, int64_t seq_len, int64_t start,
               int count, float* bias) {
    int64_t heads = a.mask_head ? a.query_heads : 1;
    int64_t row_queries = a.queries_of(task.row);
    int64_t from_end = row_queries - (task.first_query - a.first_query(task.row));
    const M* base = (const M*)a.mask + task.row * a.mask_row;
    for (int64_t head = 0; head < heads; head++)
        for (int64_t query = 0; query < task.num_queries; query++) {
            const M* line = base + head * a.mask_head
                + (a.mask_queries - from_end + query) * a.mask_query
                + (start - seq_len + a.mask_columns) * a.mask_column;
            float* out = bias + (head * task.num_queries + query) * TILE_MOST;
            for (int i = 0; i < count; i++) out[i] = bias_of(line[i * a.mask_column]);
        }
}

inline void read_any_mask(const AttentionArguments& a, const Task& task, int64_t seq_len,
                          int64_t start, int count, float* bias) {
    switch (a.mask_type) {
        case TYPE_FLOAT32: return read_mask<float>(a, task, seq_len, start, count, bias);
        case TYPE_BFLOAT16: return read_mask<bf16>(a, task, seq_len, start, count, bias);
        case TYPE_FLOAT16: return read_mask<fp16>(a, task, seq_len, start, count, bias);
        default: return read_mask<uint8_t>(a, task, seq_len, start, count, bias);
    }
}

}  // namespace attention
