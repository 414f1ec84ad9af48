// Copies keys and values into slots, out of blocks, and between blocks.

#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "abi.h"

namespace copies {

// Below this number of bytes a second thread does not pay off.
constexpr int64_t PARALLEL_BYTES = 1 << 17;

inline int threads_for(int64_t bytes, int64_t threads) {
    return int(bytes < PARALLEL_BYTES ? 1 : threads);
}

// -------------------------------------------------------------------- append

struct AppendArguments {
    const void* source[2];      // keys and values [tokens, kv_heads, dim]
    void* cache[2];             // [blocks, block_size, kv_heads, dim]
    float* scales[2];           // [blocks, block_size, kv_heads]; null unless quantised
    Integers slots;
    int64_t source_type, cache_type, element_size;
    int64_t tokens, kv_heads, num_blocks, block_size, threads;
    int64_t dim[2], source_token[2], source_head[2];
    int64_t cache_block[2], cache_token[2], cache_head[2];
    int64_t scale_block, scale_token, scale_head;
    int64_t* problem;
};

// One head of one token as int8 with its scale, bit for bit as `quantise` of quantisation.py.
template <class T> INLINE void quantise(const T* from, int8_t* to, float* scale, int64_t dim) {
    float largest = 0;
    bool nan = false;
    for (int64_t d = 0; d < dim; d++) {
        float x = std::fabs(to_float(from[d]));
        nan |= x != x;
        largest = x > largest ? x : largest;
    }
    // 0 times infinity or NaN reads back as NaN, so a fault upstream stays visible.
    *scale = nan ? NAN : largest / 127.0f;
    if (!(*scale > 0 && *scale <= 3.402823466e38f)) {
        memset(to, 0, dim);
        return;
    }
    for (int64_t d = 0; d < dim; d++) {
        float x = std::nearbyint(to_float(from[d]) / *scale);
        to[d] = int8_t(x > 127 ? 127 : x < -127 ? -127 : x);
    }
}

template <class T> void append_quantised(const AppendArguments& a, int64_t token, int64_t slot) {
    int64_t block = slot / a.block_size, offset = slot % a.block_size;
    for (int which = 0; which < 2; which++)
        for (int64_t head = 0; head < a.kv_heads; head++) {
            const T* from = (const T*)a.source[which] + token * a.source_token[which]
                + head * a.source_head[which];
            int8_t* to = (int8_t*)a.cache[which] + block * a.cache_block[which]
                + offset * a.cache_token[which] + head * a.cache_head[which];
            float* scale = a.scales[which] + block * a.scale_block + offset * a.scale_token
                + head * a.scale_head;
            quantise(from, to, scale, a.dim[which]);
        }
}

// `count` tokens with consecutive slots in one block.
inline void append_run(const AppendArguments& a, int64_t token, int64_t slot, int64_t count) {
    int64_t block = slot / a.block_size, offset = slot % a.block_size, size = a.element_size;
    for (int which = 0; which < 2; which++) {
        int64_t dim = a.dim[which], token_size = a.kv_heads * dim;
        int64_t from_token = a.source_token[which], to_token = a.cache_token[which];
        const char* from = (const char*)a.source[which] + token * from_token * size;
        char* to = (char*)a.cache[which]
            + (block * a.cache_block[which] + offset * to_token) * size;
        bool whole_tokens = a.source_head[which] == dim && a.cache_head[which] == dim;
        if (whole_tokens && from_token == token_size && to_token == token_size) {
            memcpy(to, from, count * token_size * size);
            continue;
        }
        for (int64_t i = 0; i < count; i++, from += from_token * size, to += to_token * size)
            for (int64_t head = 0; head < a.kv_heads; head++)
                memcpy(to + head * a.cache_head[which] * size,
                       from + head * a.source_head[which] * size, dim * size);
    }
}

inline void append_token_quantised(const AppendArguments& a, int64_t token, int64_t slot) {
    if (a.source_type == TYPE_BFLOAT16) append_quantised<bf16>(a, token, slot);
    else if (a.source_type == TYPE_FLOAT16) append_quantised<fp16>(a, token, slot);
    else append_quantised<float>(a, token, slot);
}

inline void append_tokens(const AppendArguments& a, int64_t first, int64_t last) {
    for (int64_t token = first; token < last;) {
        int64_t slot = a.slots.at(token), count = 1;
        if (slot < 0) {
            token++;
            continue;
        }
        // Prompts fill whole blocks, and one long copy is faster than many short ones.
        while (token + count < last && a.slots.at(token + count) == slot + count
               && (slot + count) % a.block_size != 0)
            count++;
        if (a.cache_type != TYPE_INT8) append_run(a, token, slot, count);
        else
            for (int64_t i = 0; i < count; i++) append_token_quantised(a, token + i, slot + i);
        token += count;
    }
}

inline int append(const AppendArguments& a) {
    for (int64_t token = 0; token < a.tokens; token++) {
        int64_t slot = a.slots.at(token);
        if (slot >= a.num_blocks * a.block_size) return failed(a.problem, 1, token, 0, slot);
    }
    int64_t bytes = a.tokens * a.kv_heads * (a.dim[0] + a.dim[1]) * a.element_size;
    int parts = threads_for(bytes, a.threads);
#pragma omp parallel for num_threads(parts) schedule(static) if (parts > 1)
    for (int part = 0; part < parts; part++)
        append_tokens(a, a.tokens * part / parts, a.tokens * (part + 1) / parts);
    return 0;
}

// -------------------------------------------------------------------- gather

struct GatherArguments {
    const void* cache;    // [blocks, block_size, kv_heads, dim]
    void* output;         // [rows, length, kv_heads, dim], contiguous
    const float* scales;  // null unless quantised, or if the cache has no blocks
    const int32_t* block_tables;
    Integers seq_lens;
    int64_t cache_type, output_type, element_size, output_size;
    int64_t rows, length, kv_heads, dim;
    int64_t num_blocks, block_size, table_columns, table_stride;
    int64_t cache_block, cache_token, cache_head;
    int64_t scale_block, scale_token, scale_head;
    int64_t threads;
    int64_t* problem;
};

template <class Out> void dequantise(const GatherArguments& a, int64_t block, int64_t offset,
                                     Out* to) {
    for (int64_t head = 0; head < a.kv_heads; head++, to += a.dim) {
        const int8_t* from = (const int8_t*)a.cache + block * a.cache_block
            + offset * a.cache_token + head * a.cache_head;
        float scale = a.scales[block * a.scale_block + offset * a.scale_token
                               + head * a.scale_head];
        for (int64_t d = 0; d < a.dim; d++) from_float(float(from[d]) * scale, to + d);
    }
}

// `count` tokens of one block, starting at `offset`.
inline void gather_run(const GatherArguments& a, int64_t block, int64_t offset, int64_t count,
                       char* to) {
    int64_t size = a.element_size, token_size = a.kv_heads * a.dim;
    if (a.scales) {
        for (int64_t i = 0; i < count; i++) {
            int64_t at = i * token_size;
            if (a.output_type == TYPE_BFLOAT16) dequantise(a, block, offset + i, (bf16*)to + at);
            else if (a.output_type == TYPE_FLOAT16) dequantise(a, block, offset + i, (fp16*)to + at);
            else dequantise(a, block, offset + i, (float*)to + at);
        }
        return;
    }
    const char* from = (const char*)a.cache + (block * a.cache_block + offset * a.cache_token) * size;
    if (a.cache_head == a.dim && a.cache_token == token_size) {
        memcpy(to, from, count * token_size * size);
        return;
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t head = 0; head < a.kv_heads; head++)
            memcpy(to + (i * token_size + head * a.dim) * size,
                   from + (i * a.cache_token + head * a.cache_head) * size, a.dim * size);
}

inline int gather(const GatherArguments& a) {
    // Columns are right-aligned: the last column is the row's newest token.
    for (int64_t row = 0; row < a.rows; row++) {
        int64_t seq_len = a.seq_lens.at(row);
        if (seq_len < 0 || seq_len > a.table_columns * a.block_size)
            return failed(a.problem, 1, row, 0, seq_len);
        int64_t first = std::max<int64_t>(0, seq_len - a.length) / a.block_size;
        int64_t last = std::min((seq_len + a.block_size - 1) / a.block_size, a.table_columns);
        for (int64_t column = first; column < last; column++) {
            int64_t block = a.block_tables[row * a.table_stride + column];
            if (block >= a.num_blocks) return failed(a.problem, 2, row, column, block);
        }
    }
    int64_t token_bytes = a.kv_heads * a.dim * a.output_size;
    int threads = threads_for(a.rows * a.length * token_bytes, a.threads);
    // Split rows into pieces, so that one long row keeps every thread busy.
    constexpr int64_t PIECE = 256;
    int64_t pieces = (a.length + PIECE - 1) / PIECE;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < a.rows * pieces; i++) {
        int64_t row = i / pieces, column = i % pieces * PIECE;
        int64_t end = std::min(column + PIECE, a.length);
        int64_t shift = a.seq_lens.at(row) - a.length;
        while (column < end) {
            char* to = (char*)a.output + (row * a.length + column) * token_bytes;
            int64_t position = column + shift, count = std::min(end - column, -position);
            int64_t block = -1, offset = 0;
            if (position >= 0) {
                offset = position % a.block_size;
                count = std::min(end - column, a.block_size - offset);
                int64_t at = position / a.block_size;
                if (at < a.table_columns) block = a.block_tables[row * a.table_stride + at];
            }
            if (block < 0) memset(to, 0, count * token_bytes);
            else gather_run(a, block, offset, count, to);
            column += count;
        }
    }
    return 0;
}

// -------------------------------------------------------------------- copies

struct CopyArguments {
    void* storage;
    Integers pairs;  // [count, 2]
    int64_t count, num_blocks, block_stride, block_bytes, threads;
    int64_t* problem;
};

// Whole blocks, as bytes of any dtype.
inline int copy(const CopyArguments& a) {
    std::vector<std::pair<int64_t, int64_t>> kept;
    for (int64_t i = 0; i < a.count; i++) {
        int64_t source = a.pairs.at(2 * i), destination = a.pairs.at(2 * i + 1);
        if (source < 0 || destination < 0) continue;
        int64_t largest = std::max(source, destination);
        if (largest >= a.num_blocks) return failed(a.problem, 1, i, 0, largest);
        kept.push_back({source, destination});
    }
    // Save blocks that are both read and written: all reads come before all writes.
    std::vector<bool> written(a.num_blocks);
    for (auto& pair : kept) written[pair.second] = true;
    std::vector<std::vector<char>> saved;
    std::vector<const char*> sources;
    char* base = (char*)a.storage;
    for (auto& pair : kept) {
        const char* from = base + pair.first * a.block_stride;
        if (written[pair.first]) {
            saved.emplace_back(from, from + a.block_bytes);
            from = saved.back().data();
        }
        sources.push_back(from);
    }
    int64_t count = kept.size();
    int threads = threads_for(count * a.block_bytes, a.threads);
    // Split blocks into pieces, so that a single block keeps every thread busy.
    int64_t pieces = threads, piece = (a.block_bytes + pieces - 1) / pieces;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < count * pieces; i++) {
        int64_t pair = i / pieces, from = i % pieces * piece;
        int64_t size = std::min(piece, a.block_bytes - from);
        if (size > 0)
            memcpy(base + kept[pair].second * a.block_stride + from, sources[pair] + from, size);
    }
    return 0;
}

}  // namespace copies
