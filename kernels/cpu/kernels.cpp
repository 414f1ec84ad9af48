// The functions that Python calls. Each checks values that the argument checks in Python cannot see,
// then runs. It returns 0, or an error code with its place, before writing anything.

#include <new>

#include "attention.h"
#include "copies.h"

namespace {

enum Problem : int { FINE = 0, NO_MEMORY = 100 };
enum AttentionProblem : int { SEQ_LEN = 1, TABLE_ENTRY = 2, CU_SEQLENS_Q = 3, MASK_QUERIES = 4 };

constexpr auto BF16_ARITHMETIC = HAS_BF16_DOT ? attention::BF16_DOTS : attention::IN_FLOATS;
constexpr auto INT8_ARITHMETIC = HAS_INT16_DOT ? attention::IN_INT16 : attention::IN_FLOATS;

int checked(const AttentionArguments& a) {
    auto wrong = [&](int code, int64_t row, int64_t column, int64_t value) {
        return failed(a.problem, code, row, column, value);
    };
    if (a.cu_seqlens_q.data && a.first_query(0) != 0)
        return wrong(CU_SEQLENS_Q, 0, 0, a.first_query(0));
    if (a.cu_seqlens_q.data && a.first_query(a.rows) != a.tokens)
        return wrong(CU_SEQLENS_Q, a.rows, 0, a.first_query(a.rows));
    for (int64_t row = 0; row < a.rows; row++) {
        int64_t seq_len = a.seq_lens.at(row), queries = a.queries_of(row);
        if (seq_len < 0 || seq_len > a.table_columns * a.block_size)
            return wrong(SEQ_LEN, row, 0, seq_len);
        if (queries < 0 || a.first_query(row) + queries > a.tokens)
            return wrong(CU_SEQLENS_Q, row, 0, a.first_query(row + 1));
        if (a.mask && queries > a.mask_queries) return wrong(MASK_QUERIES, row, 0, queries);
        if (queries == 0) continue;
        int64_t oldest = seq_len - queries;
        int64_t start = attention::visible(a, row, oldest, seq_len).first;
        int64_t stop = attention::visible(a, row, seq_len - 1, seq_len).last;
        if (start >= stop) continue;  // for example, kv_starts past the row's end
        int64_t first = start / a.block_size, last = (stop - 1) / a.block_size + 1;
        const int32_t* table = a.block_tables + row * a.table_stride;
        for (int64_t column = first; column < last; column++)
            if (table[column] >= a.num_blocks) return wrong(TABLE_ENTRY, row, column, table[column]);
    }
    return FINE;
}

}  // namespace

// All other symbols are hidden: otherwise two variants in one process share scratch memory.
#pragma GCC visibility push(default)
extern "C" {

// Properties of this variant, for the log and for tests.
int kvpager_lanes() { return LANES; }
int kvpager_bf16_dots() { return HAS_BF16_DOT; }
int kvpager_matrix_units() { return attention::has_matrix_units(); }
int kvpager_threaded() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

int kvpager_paged_attention(AttentionArguments* arguments) try {
    AttentionArguments& a = *arguments;
    a.softmax_scale = float(a.softmax_scale_);
    a.softcap = float(a.softcap_);
    if (int code = checked(a)) return code;
    switch (a.cache_type) {
        case TYPE_FLOAT32: attention::run<float, attention::IN_FLOATS>(a); break;
        case TYPE_BFLOAT16: attention::run<bf16, BF16_ARITHMETIC>(a); break;
        case TYPE_FLOAT16: attention::run<fp16, attention::IN_FLOATS>(a); break;
        default:
            // 15 bits are not enough for a 32-bit query.
            if (HAS_INT16_DOT && a.query_type != TYPE_FLOAT32
                && a.head_dim <= attention::INT16_DIM_MOST)
                attention::run<int8_t, INT8_ARITHMETIC>(a);
            else
                attention::run<int8_t, attention::IN_FLOATS>(a);
    }
    return FINE;
} catch (const std::bad_alloc&) { return NO_MEMORY; }

int kvpager_append_kv(const copies::AppendArguments* arguments) { return copies::append(*arguments); }

int kvpager_gather_kv(const copies::GatherArguments* arguments) { return copies::gather(*arguments); }

int kvpager_copy_blocks(const copies::CopyArguments* arguments) try {
    return copies::copy(*arguments);
} catch (const std::bad_alloc&) { return NO_MEMORY; }

}
#pragma GCC visibility pop
