// Attention of packed queries over paged keys and values, read in place.
//
// Rows of many queries have tasks of their own, see `prefill.h` and `matrix.h`. For all others:
//
//   a task      = one row (sequence), a few of its queries, one range of kv tokens
//   its loop    = tiles of TILE kv tokens; in each tile all kv heads, one after the other
//   per kv head = its query vectors (GQA: several heads; prefill: several tokens),
//                 in groups of 4, 2 or 1
//
//   for each tile
//     row pointers: token -> address, through the block table, once for all heads
//     for each kv head, for each group of query vectors
//       scores     [tokens, queries] = K q            dot products, see `dots`
//       weights    = exp(scores - running maximum)    online softmax, lane by lane
//       sums       = sums * rescale + weights V       see `accumulate`
//
// A task streams whole slots [kv_heads, head_dim], so it reads memory in order within each block.
// During the arithmetic of a tile it prefetches the next tile, a few rows at a time. Without
// prefetching, memory is idle during the arithmetic, and a call takes twice the time. If there are
// fewer rows than threads, long rows are cut into ranges. A merge at the end combines their partial
// results (maximum, sum of weights, weighted sum).
//
// The online softmax is that of Milakov & Gimelshein (2018), "Online normalizer calculation for
// softmax". Tiles follow FlashAttention (Dao et al., 2022), block tables PagedAttention (Kwon et
// al., 2023), and ranges of long rows Flash-Decoding (Dao et al., 2023).
//
// Layout of scores: a group of Q query vectors takes R = LANES / Q kv tokens at a time. Lane q * R + t
// holds the score of query q and token t, so maxima, rescaling and sums of weights need no work across
// lanes before the end of the tile.

#pragma once

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "matrix.h"
#include "prefill.h"
#include "worker.h"

namespace attention {

// Merge the partial results of a query into the output.
inline void merge(const AttentionArguments& a, int64_t token, int64_t head, int64_t first,
                  int64_t parts, int64_t part_stride) {
    float* base = a.partials + (first * a.query_heads + head) * (a.value_dim + 2);
    int64_t stride = part_stride * a.query_heads * (a.value_dim + 2);
    float highest = LOWEST, total = 0;
    for (int64_t part = 0; part < parts; part++)
        highest = std::max(highest, base[part * stride]);
    for (int64_t part = 0; part < parts; part++)
        total += base[part * stride + 1] * std::exp(base[part * stride] - highest);
    int64_t at = (token * a.query_heads + head) * a.value_dim;
    float* sums = base + 2;  // the sums of the first part, added up in place to avoid allocating in a thread
    for (int64_t part = 0; part < parts; part++) {
        const float* from = base + part * stride;
        float share = total == 0 ? 0 : std::exp(from[0] - highest) / total;
        for (int64_t d = 0; d < a.value_dim; d++)
            sums[d] = (part ? sums[d] : 0) + from[2 + d] * share;
    }
    for (int64_t d = 0; d < a.value_dim; d++) a.put(at + d, sums[d]);
}

struct Merge { int64_t first_query, num_queries, first_partial, parts; };

struct Plan {
    std::vector<Task> tasks;
    std::vector<Merge> merges;
    int64_t partial_queries = 0;
};

template <Arithmetic arithmetic> Share share_of_row() {
    return arithmetic == BF16_DOTS && has_matrix_units() ? MATRIX_SHARE : PREFILL_SHARE;
}

// True if the row's queries are attended by tasks of one kv head: `matrix.h`, or else `prefill.h`.
template <class T, Arithmetic arithmetic>
bool has_own_tasks(const AttentionArguments& a, int64_t row) {
    if (arithmetic == IN_INT16 || sizeof(T) == 1 || a.mask) return false;
    return a.queries_of(row) * (a.query_heads / a.kv_heads) >= share_of_row<arithmetic>().least;
}

template <class T, Arithmetic arithmetic> Plan plan(const AttentionArguments& a) {
    Plan plan;
    int64_t heads_per_kv = a.query_heads / a.kv_heads;
    int64_t few = std::max<int64_t>(1, QUERIES / heads_per_kv), total = 0;
    auto chunk_of = [&](int64_t row, bool own) {
        return own ? queries_per_task(a, share_of_row<arithmetic>(), a.queries_of(row)) : few;
    };
    for (int64_t row = 0; row < a.rows; row++) {
        int64_t chunk = chunk_of(row, has_own_tasks<T, arithmetic>(a, row));
        total += a.seq_lens.at(row) * ((a.queries_of(row) + chunk - 1) / chunk);
    }
    // Four ranges per thread balance rows of different lengths.
    int64_t range = std::max<int64_t>(8 * TILE_MOST, total / (4 * a.threads) / TILE_MOST * TILE_MOST + TILE_MOST);
    if (a.threads == 1) range = INT64_MAX / 2;
    for (int64_t row = 0; row < a.rows; row++) {
        int64_t seq_len = a.seq_lens.at(row), queries = a.queries_of(row);
        bool own = has_own_tasks<T, arithmetic>(a, row);
        int64_t chunk = chunk_of(row, own), tasks = own ? a.kv_heads : 1;  // per range
        for (int64_t query = 0; query < queries; query += chunk) {
            int64_t count = std::min(chunk, queries - query), position = seq_len - queries + query;
            int64_t first = a.first_query(row) + query;
            int64_t start = visible(a, row, position, seq_len).first;
            int64_t stop = visible(a, row, position + count - 1, seq_len).last;
            int64_t parts = std::max<int64_t>(1, (stop - start - 1) / tasks / range + 1);
            int64_t part_range = ((stop - start + parts - 1) / parts + TILE_MOST - 1) / TILE_MOST * TILE_MOST;
            if (parts > 1)
                plan.merges.push_back({first, count, plan.partial_queries, parts});
            for (int64_t part = 0; part < parts; part++) {
                int64_t from = std::min(stop, start + part * part_range);
                int64_t to = std::min(stop, from + part_range);
                int64_t partial = parts > 1 ? plan.partial_queries + part * count : -1;
                Task task{row, first, count, position, from, to, partial, part == 0, -1};
                for (int64_t head = 0; head < tasks; head++) {
                    if (own) task.kv_head = head;
                    plan.tasks.push_back(task);
                }
            }
            if (parts > 1) plan.partial_queries += parts * count;
        }
    }
    return plan;
}

// Attends the queries of a task with one kv head.
template <class T, Arithmetic arithmetic>
void attend_one_head(const AttentionArguments& a, const Task& task, const T* zeros) {
#if HAS_MATRIX_UNITS
    if constexpr (arithmetic == BF16_DOTS)
        if (has_matrix_units()) {
            static thread_local MatrixScratch scratch;
            return MatrixWorker{a, task, scratch, zeros}.run();
        }
#endif
    if constexpr (sizeof(T) > 1) {
        static thread_local PrefillScratch scratch;
        PrefillWorker<T>{a, task, scratch, zeros}.run();
    }
}

template <class T, Arithmetic arithmetic> void run(AttentionArguments& a) {
    Plan todo = plan<T, arithmetic>(a);
    static thread_local std::vector<float> partials;
    size_t needed = todo.partial_queries * a.query_heads * (a.value_dim + 2);
    if (partials.size() < needed) partials.resize(needed);
    a.partials = partials.data();
    int64_t zeros_size = std::max((a.kv_heads - 1) * a.key_head + a.head_dim,
                                  (a.kv_heads - 1) * a.value_head + a.value_dim);
    static thread_local std::vector<uint64_t> zeros;
    size_t words = (zeros_size * sizeof(T) + 7) / 8 + 1;
    size_t scale_words = a.key_scales ? ((a.kv_heads - 1) * a.scale_head + 2) / 2 : 0;
    if (zeros.size() < words + scale_words) zeros.assign(words + scale_words, 0);
    const T* zero_row = (const T*)zeros.data();
    const float* zero_scales = (const float*)(zeros.data() + words);
    int64_t tasks = todo.tasks.size(), merges = todo.merges.size();
    int threads = int(std::min<int64_t>(a.threads, std::max<int64_t>(tasks, 1)));
    (void)threads;
    std::atomic<bool> without_memory{false};
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {
            // An exception that leaves a thread ends the process.
            try {
                const Task& task = todo.tasks[i];
                if (task.kv_head >= 0) attend_one_head<T, arithmetic>(a, task, zero_row);
                else Worker<T, arithmetic>{a, task, scratch, zero_row, zero_scales}.run();
            } catch (const std::bad_alloc&) { without_memory = true; }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < merges; i++) {
            const Merge& m = todo.merges[i];
            for (int64_t query = 0; query < m.num_queries; query++)
                for (int64_t head = 0; head < a.query_heads; head++)
                    merge(a, m.first_query + query, head, m.first_partial + query, m.parts,
                          m.num_queries);
        }
    }
    if (without_memory) throw std::bad_alloc();
}

}  // namespace attention
