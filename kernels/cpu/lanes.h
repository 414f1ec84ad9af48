// Query vectors of a task with one kv head, one vector per lane: the tokens that each sees, and their
// online softmax. It needs no work across lanes.

#pragma once

#include "tile.h"

namespace attention {

// How many query vectors of a row and a kv head make a task of its own.
struct Share { int64_t least, most, most_elements, step; };

// Queries (tokens) per task of a row with `queries` queries.
inline int64_t queries_per_task(const AttentionArguments& a, Share share, int64_t queries) {
    int64_t most = share.most_elements / std::max(padded(a.head_dim), padded(a.value_dim));
    most = std::min(share.most, std::max<int64_t>(most / share.step, 1) * share.step);
    most = std::max<int64_t>(1, most / (a.query_heads / a.kv_heads));
    int64_t chunks = (queries + most - 1) / most;
    return (queries + chunks - 1) / chunks;
}

struct QueryLanes {
    const AttentionArguments& a;
    const Task& task;
    int64_t heads_per_kv, vectors, lanes, seq_len;  // lanes: vectors and padding
    float *highest, *totals;   // [lanes]
    int32_t *begins, *ends;    // [lanes]: the tokens that the vector sees, from `task.start` on

    float unit = 1;

    static constexpr int64_t FLOATS = 4;  // of memory per lane

    QueryLanes(const AttentionArguments& arguments, const Task& work) : a(arguments), task(work) {
        heads_per_kv = a.query_heads / a.kv_heads;
        vectors = heads_per_kv * task.num_queries;
        lanes = (vectors + LANES - 1) / LANES * LANES;
        seq_len = a.seq_lens.at(task.row);
    }

    int64_t query_of(int64_t vector) const { return vector / heads_per_kv; }
    int64_t head_of(int64_t vector) const {
        return task.kv_head * heads_per_kv + vector % heads_per_kv;
    }

    // The place of the vector's first element in `query`.
    int64_t place_of_query(int64_t vector) const {
        return head_of(vector) * a.query_head
            + (task.first_query + query_of(vector)) * a.query_token;
    }

    // `scale`: of the maxima; 1 for `weigh`.
    void begin(float* memory, float scale = 1) {
        unit = scale;
        highest = memory;
        totals = memory + lanes;
        begins = (int32_t*)(memory + 2 * lanes);
        ends = begins + lanes;
        for (int64_t vector = 0; vector < lanes; vector++) {
            bool has_sink = a.sinks && task.with_sink && vector < vectors;
            highest[vector] = has_sink ? std::max(a.sinks[head_of(vector)] * unit, LOWEST) : LOWEST;
            totals[vector] = has_sink;
            int64_t position = task.first_position + query_of(std::min(vector, vectors - 1));
            Range range = visible(a, task.row, position, seq_len);
            begins[vector] = int32_t(std::max<int64_t>(range.first - task.start, 0));
            ends[vector] = int32_t(std::max<int64_t>(std::min(range.last, task.stop) - task.start, 0));
        }
    }

    // The tokens of a tile that a vector of [first, last) sees, in whole blocks of `step` tokens.
    template <class Tile> Range part_of(const Tile& tile, int64_t first, int64_t last, int step) const {
        int64_t start = tile.start - task.start;
        int64_t from = std::max<int64_t>(begins[first] - start, 0);
        int64_t to = std::min<int64_t>(ends[last - 1] - start, tile.count);
        if (from >= to) return {0, 0};
        return {from / step * step, (to + step - 1) / step * step};
    }

    // Sets hidden scores of the vectors from `vector` on to -inf. Tokens are STRIDE vectors apart.
    template <int STRIDE, class Tile>
    INLINE_MEMBER void hide(const Tile& tile, const void* zeros, int64_t vector, int from, int to,
                            Floats* scores) const {
        Floats lowest = broadcast(-INFINITY);
        int start = int(tile.start - task.start);
        Ints first = load<Ints>(begins + vector) - start, last = load<Ints>(ends + vector) - start;
        auto hide_part = [&](int part_from, int part_to) {
            for (int t = part_from; t < part_to; t++) {
                Ints token = t - Ints{};
                Floats& score = scores[t * STRIDE];
                score = ((token >= first) & (token < last)) ? score : lowest;
            }
        };
        // Later vectors see later tokens, and all vectors see the tokens in the middle.
        int middle = std::min(to, std::max(from, first[LANES - 1]));
        hide_part(from, middle);
        hide_part(std::min(to, std::max(middle, last[0])), to);
        if (!tile.holes) return;
        for (int t = from; t < to; t++)
            if (tile.keys[t] == zeros) scores[t * STRIDE] = lowest;
    }

    // The highest score of each lane, at least -inf; `to - from` is a multiple of 4. Four maxima at once
    // hide the latency of an instruction.
    template <int STRIDE>
    INLINE_MEMBER static Floats highest_of(const Floats* scores, int from, int to) {
        Floats most[4] = {broadcast(-INFINITY), most[0], most[0], most[0]};
        for (int t = from; t < to; t += 4)
            for (int i = 0; i < 4; i++) most[i] = larger(most[i], scores[(t + i) * STRIDE]);
        return larger(larger(most[0], most[1]), larger(most[2], most[3]));
    }

    // Scores become weights. Returns the factor of the earlier sums.
    template <int STRIDE>
    INLINE_MEMBER Floats weigh(int64_t vector, int from, int to, Floats* scores) {
        Floats before = load<Floats>(highest + vector);
        Floats most = larger(highest_of<STRIDE>(scores, from, to), before);
        Floats shrink = exp_nonpositive(before - most);
        Floats total = load<Floats>(totals + vector) * shrink;
        for (int t = from; t < to; t++) {
            Floats weight = exp_nonpositive(scores[t * STRIDE] - most);
            scores[t * STRIDE] = weight;
            total += weight;
        }
        store(highest + vector, most);
        store(totals + vector, total);
        return shrink;
    }

    // Where the vector's partial result goes: maximum, sum of weights, weighted sum.
    float* partial_of(int64_t vector) const {
        int64_t query = task.partial + query_of(vector);
        float* to = a.partials + (query * a.query_heads + head_of(vector)) * (a.value_dim + 2);
        to[0] = highest[vector] / unit;
        to[1] = totals[vector];
        return to + 2;
    }

    // The place of the vector's first element in the output.
    int64_t place_of_output(int64_t vector) const {
        int64_t token = task.first_query + query_of(vector);
        return (token * a.query_heads + head_of(vector)) * a.value_dim;
    }

    float share_of(int64_t vector) const { return totals[vector] == 0 ? 0 : 1 / totals[vector]; }
};

}  // namespace attention
