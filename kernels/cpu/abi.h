// Arguments from Python: structs of 8-byte fields, in the order in which `library.py` packs them.
// Strides count elements. Types are values of `Type`.

#pragma once

#include <cstdint>

#include "simd.h"

enum Type : int64_t { TYPE_FLOAT32 = 0, TYPE_BFLOAT16 = 1, TYPE_FLOAT16 = 2, TYPE_INT8 = 3, TYPE_BOOL = 4 };

// An array of int32 or int64. If it is absent, every element is `otherwise`.
struct Integers {
    const void* data;
    int64_t wide;

    int64_t at(int64_t index, int64_t otherwise = 0) const {
        if (!data) return otherwise;
        return wide ? ((const int64_t*)data)[index] : ((const int32_t*)data)[index];
    }
};

// Notes the place and the value of an error for Python; returns its code.
inline int failed(int64_t* problem, int code, int64_t row, int64_t column, int64_t value) {
    problem[0] = row;
    problem[1] = column;
    problem[2] = value;
    return code;
}

struct AttentionArguments {
    const void *query, *key, *value;
    void* output;
    const float *key_scales, *value_scales;  // null unless the cache is quantised
    const int32_t* block_tables;
    Integers seq_lens, kv_starts, cu_seqlens_q;
    const void* mask;
    const float* sinks;
    int64_t query_type, cache_type, mask_type;
    int64_t rows, tokens, query_heads, kv_heads, head_dim, value_dim;
    int64_t num_blocks, block_size, table_columns, table_stride;
    int64_t query_token, query_head;
    int64_t key_block, key_token, key_head;
    int64_t value_block, value_token, value_head;
    int64_t scale_block, scale_token, scale_head;
    int64_t mask_queries, mask_columns;
    int64_t mask_row, mask_head, mask_query, mask_column;
    int64_t causal, window;  // window 0: none
    int64_t threads;
    double softmax_scale_, softcap_;  // softcap 0: none
    int64_t* problem;        // row, column and value of an error
    float* partials;         // set by the kernel
    float softmax_scale, softcap;

    int64_t first_query(int64_t row) const { return cu_seqlens_q.at(row, row); }
    int64_t queries_of(int64_t row) const { return first_query(row + 1) - first_query(row); }

    float element(const void* from, int64_t at) const {
        switch (query_type) {
            case TYPE_BFLOAT16: return to_float(((const bf16*)from)[at]);
            case TYPE_FLOAT16: return to_float(((const fp16*)from)[at]);
            default: return ((const float*)from)[at];
        }
    }

    void put(int64_t at, float x) const {
        switch (query_type) {
            case TYPE_BFLOAT16: return from_float(x, (bf16*)output + at);
            case TYPE_FLOAT16: return from_float(x, (fp16*)output + at);
            default: ((float*)output)[at] = x;
        }
    }
};
