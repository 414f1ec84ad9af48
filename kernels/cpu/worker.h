// Runs one task tile by tile, with the online softmax between the two inner loops.

#pragma once

#include "masks.h"
#include "pairs.h"
#include "tile.h"

namespace attention {

// A group of query vectors of one kv head.
struct Group {
    int64_t kv_head;
    int64_t vector;  // number of the first vector among the task's query vectors of this kv head
};

template <class T, Arithmetic arithmetic> struct Worker {
    static constexpr int TILE = tile_of<T>();
    const AttentionArguments& a;
    const Task& task;
    Scratch& scratch;
    const T* zeros;
    const float* zero_scales;
    int64_t vectors = 0;        // query vectors per kv head: query token * group + head in the group
    int64_t heads_per_kv = 0;
    int64_t query_stride = 0, sum_stride = 0;
    int64_t seq_len = 0;
    float key_scales[TILE], value_scales[TILE];  // of the current tile and kv head
    Tile<T> tiles[2] = {};
    Tile<T> *tile = nullptr, *next = nullptr;
    enum { NOTHING, RANGES, BIAS } hiding = NOTHING;

    void run() {
        seq_len = a.seq_lens.at(task.row);
        heads_per_kv = a.query_heads / a.kv_heads;
        vectors = heads_per_kv * task.num_queries;
        query_stride = padded(a.head_dim);
        sum_stride = padded(a.value_dim);
        scratch.prepare(a, vectors);
        begin();
        tile = &tiles[0];
        next = &tiles[1];
        if (task.start < task.stop) tile->look_up(a, task, task.start, zeros, zero_scales);
        for (int64_t from = task.start; from < task.stop; from += TILE) {
            next->count = 0;
            if (from + TILE < task.stop) next->look_up(a, task, from + TILE, zeros, zero_scales);
            hide();
            for (int64_t head = 0; head < a.kv_heads; head++) {
                if (a.key_scales) read_scales(head);
                each_group(head, [&](auto size, Group group) { attend<size()>(group); });
            }
            std::swap(tile, next);
        }
        for (int64_t head = 0; head < a.kv_heads; head++)
            each_group(head, [&](auto size, Group group) { finish_group<size()>(group); });
    }

    // Query vectors of a kv head: four at a time, then two, then one.
    template <class Visit> void each_group(int64_t head, Visit visit) {
        int64_t vector = 0;
        for (; vector + 4 <= vectors; vector += 4)
            visit(std::integral_constant<int, 4>{}, Group{head, vector});
        for (; vector + 2 <= vectors; vector += 2)
            visit(std::integral_constant<int, 2>{}, Group{head, vector});
        if (vector < vectors) visit(std::integral_constant<int, 1>{}, Group{head, vector});
    }

    // ---------------------------------------------------------------- before and after

    float* query_of(int64_t kv_head, int64_t vector) {
        return scratch.queries + (kv_head * vectors + vector) * query_stride;
    }
    float* sums_of(int64_t kv_head, int64_t vector) {
        return scratch.sums + (kv_head * vectors + vector) * sum_stride;
    }

    // True if `dots` can read keys in place; otherwise they are staged.
    template <int Q> bool is_direct() const {
        constexpr bool readable = arithmetic != IN_FLOATS || std::is_same_v<T, float>;
        int64_t elements = words_at_once<Q>() * (arithmetic == IN_FLOATS ? 1 : 2);
        return readable && a.head_dim % elements == 0;
    }

    // 32-bit words of a row in `dots`.
    int64_t words(bool direct) const {
        int64_t elements = direct ? a.head_dim : padded(a.head_dim);
        return arithmetic == IN_FLOATS ? elements : elements / 2;
    }

    void begin() {
        memset(scratch.queries, 0, a.kv_heads * vectors * query_stride * sizeof(float));
        memset(scratch.sums, 0, a.kv_heads * vectors * sum_stride * sizeof(float));
        for (int64_t head = 0; head < a.kv_heads; head++)
            each_group(head, [&](auto size, Group group) { begin_group<size()>(group); });
    }

    // Queries of a group in the layout of `dots`; highest scores and sums of weights as vectors with
    // the lanes of scores.
    template <int Q> void begin_group(Group group) {
        constexpr int R = LANES / Q;
        float* queries = query_of(group.kv_head, group.vector);
        float* highest = state_of(scratch.highest, group);
        float* total = state_of(scratch.totals, group);
        int64_t query_words = words(is_direct<Q>());
        for (int q = 0; q < Q; q++) {
            int64_t vector = group.vector + q;
            int64_t token = task.first_query + vector / heads_per_kv;
            int64_t head = group.kv_head * heads_per_kv + vector % heads_per_kv;
            float* row = (float*)scratch.staged;
            float unit = begin_query(row, token * a.query_token + head * a.query_head);
            for (int64_t word = 0; word < query_words; word++)
                memcpy(queries + place_of_word<Q>(q, word), row + word, 4);
            for (int lane = q * R; lane < q * R + R; lane++) {
                state_of(scratch.units, group)[lane] = unit;
                highest[lane] = LOWEST;
                total[lane] = 0;
                if (!a.sinks || !task.with_sink) continue;
                highest[lane] = std::max(a.sinks[head], LOWEST);
                total[lane] = lane % R == 0;  // the lanes of a query are added up at the end
            }
        }
    }

    // Writes one query as a row of words; returns the factor of its scores. Floats are scaled here, as
    // in the reference kernel, because large products would overflow.
    float begin_query(float* row, int64_t offset) {
        memset(row, 0, query_stride * sizeof(float));
        if (arithmetic == IN_INT16) return begin_int16((int16_t*)row, offset) * a.softmax_scale;
        if (arithmetic == BF16_DOTS)
            memcpy(row, (const bf16*)a.query + offset, a.head_dim * sizeof(bf16));
        else
            for (int64_t d = 0; d < a.head_dim; d++)
                row[place_of<T>(d)] = a.element(a.query, offset + d) * a.softmax_scale;
        return arithmetic == IN_FLOATS ? 1 : a.softmax_scale;
    }

    float begin_int16(int16_t* to, int64_t offset) {
        float most = 0;
        for (int64_t d = 0; d < a.head_dim; d++)
            most = std::max(most, std::fabs(a.element(a.query, offset + d)));
        float unit = most / INT16_MOST;
        for (int64_t d = 0; d < a.head_dim; d++) {
            float x = a.element(a.query, offset + d);
            // An infinity or NaN has no integer and must result in NaN.
            if (!(std::fabs(x) <= -LOWEST)) unit = NAN;
            to[d] = unit >= 0x1p-126f ? int16_t(std::nearbyint(x / unit)) : 0;
        }
        return unit;
    }

    float* state_of(float* states, Group group) {
        return states + (group.kv_head * vectors + group.vector) * LANES;
    }

    template <int Q> void finish_group(Group group) {
        constexpr int R = LANES / Q;
        const float* highest = state_of(scratch.highest, group);
        Floats total = over_runs<R>(load<Floats>(state_of(scratch.totals, group)),
                                    [](Floats x, Floats y) { return x + y; });
        for (int q = 0; q < Q; q++) {
            int64_t vector = group.vector + q;
            int64_t token = task.first_query + vector / heads_per_kv;
            int64_t head = group.kv_head * heads_per_kv + vector % heads_per_kv;
            const float* sums = sums_of(group.kv_head, vector);
            if (task.partial < 0) {
                float share = total[q * R] == 0 ? 0 : 1 / total[q * R];
                int64_t at = (token * a.query_heads + head) * a.value_dim;
                for (int64_t d = 0; d < a.value_dim; d++)
                    a.put(at + d, sums[sum_place(d)] * share);
            } else {
                int64_t query = task.partial + token - task.first_query;
                float* to = a.partials + (query * a.query_heads + head) * (a.value_dim + 2);
                to[0] = highest[q * R];
                to[1] = total[q * R];
                for (int64_t d = 0; d < a.value_dim; d++) to[2 + d] = sums[sum_place(d)];
            }
        }
    }

    // The position of element `d` in the sums: pairs of tokens are interleaved in 128 bits.
    static int64_t sum_place(int64_t d) {
        if (arithmetic == IN_FLOATS) return place_of<T>(d);
        constexpr int64_t HALF = 8 / sizeof(T);
        int64_t within = d % STEP;
        return d - within + within / HALF % 2 * LANES + within / (2 * HALF) * HALF + within % HALF;
    }

    // ---------------------------------------------------------------- a tile

    // Chooses how to hide tokens of this tile from queries.
    void hide() {
        int64_t end = tile->start + tile->count;
        Range oldest = range_of(0), newest = range_of(task.num_queries - 1);
        if (a.mask || tile->holes)
            hide_by_bias();
        else if (tile->count == TILE && newest.first <= tile->start && oldest.last >= end)
            hiding = NOTHING;
        else hiding = RANGES;
    }

    Range range_of(int64_t query) {
        return visible(a, task.row, task.first_position + query, seq_len);
    }

    void hide_by_bias() {
        hiding = BIAS;
        int64_t lines = task.num_queries * (a.mask && a.mask_head ? a.query_heads : 1);
        if (a.mask) read_any_mask(a, task, seq_len, tile->start, tile->count, scratch.bias);
        else std::fill(scratch.bias, scratch.bias + lines * TILE_MOST, 0.0f);
        bool seen[TILE] = {};
        for (int64_t line = 0; line < lines; line++) {
            Range range = range_of(line % task.num_queries);
            float* bias = scratch.bias + line * TILE_MOST;
            for (int i = 0; i < TILE; i++) {
                int64_t token = tile->start + i;
                if (token < range.first || token >= range.last || tile->keys[i] == zeros)
                    bias[i] = -INFINITY;
                seen[i] |= bias[i] != -INFINITY;
            }
        }
        for (int i = 0; i < TILE; i++)
            if (!seen[i]) tile->fill(i, i + 1, zeros, zero_scales);
    }

    template <int Q> __attribute__((noinline)) void attend(Group group) {
        constexpr int R = LANES / Q, VECTORS = TILE / R;
        // The first group of a kv head prefetches that head of the next tile.
        bool first = group.vector == 0 && next->count;
        Floats scores[VECTORS];
        score<Q>(group, scores, first);

        float* highest = state_of(scratch.highest, group);
        float* totals = state_of(scratch.totals, group);
        Floats before = load<Floats>(highest), most = before;
        for (int v = 0; v < VECTORS; v++) most = larger(most, scores[v]);
        most = over_runs<R>(most, larger);
        Floats shrink = exp_nonpositive(before - most);
        Floats total = load<Floats>(totals) * shrink;
        for (int v = 0; v < VECTORS; v++) {
            scores[v] = exp_nonpositive(scores[v] - most);
            total += scores[v];
            if (a.value_scales) scores[v] *= (Floats)repeat<R>(value_scales + v * R);
        }
        store(highest, most);
        store(totals, total);
        sum<Q>(group, scores, shrink, first);
    }

    template <int Q> INLINE_MEMBER void score(Group group, Floats* scores, bool first) {
        constexpr int R = LANES / Q, VECTORS = TILE / R;
        if (is_direct<Q>()) score_rows<Q, true>(group, scores, first);
        else score_rows<Q, false>(group, scores, first);
        Floats units = load<Floats>(state_of(scratch.units, group));
        for (int v = 0; v < VECTORS; v++) {
            scores[v] *= units;
            if (a.key_scales) scores[v] *= (Floats)repeat<R>(key_scales + v * R);
        }
        if (a.softcap > 0)
            for (int v = 0; v < VECTORS; v++)
                scores[v] = tanh_of(scores[v] * (1 / a.softcap)) * a.softcap;
        if (hiding != NOTHING)
            for (int v = 0; v < VECTORS; v++) scores[v] = hidden<Q>(scores[v], group, v * R);
    }

    template <int Q, bool direct>
    INLINE_MEMBER void score_rows(Group group, Floats* scores, bool first) {
        constexpr int R = LANES / Q, ROWS = R * scores_at_once<Q>();
        const float* queries = query_of(group.kv_head, group.vector);
        int64_t offset = group.kv_head * a.key_head, length = words(direct);
        for (int from = 0; from < TILE; from += ROWS) {
            const char* rows[ROWS];
            if (first)
                for (int t = 0; t < ROWS; t++) prefetch(next->keys[from + t] + offset, a.head_dim);
            for (int t = 0; t < ROWS; t++) {
                const T* key = tile->keys[from + t] + offset;
                rows[t] = direct ? (const char*)key : scratch.staged + t * query_stride * 4;
                if (!direct) stage<T, arithmetic>(key, a.head_dim, (char*)rows[t]);
            }
            using Stored = std::conditional_t<direct, T, Words>;
            dots<Stored, Q, arithmetic>(queries, rows, length, scores + from / R);
        }
    }

    template <int Q>
    INLINE_MEMBER void sum(Group group, const Floats* weights, Floats shrink, bool first) {
        constexpr int R = LANES / Q, VECTORS = TILE / R;
        int64_t offset = group.kv_head * a.value_head;
        float* sums = sums_of(group.kv_head, group.vector);
        const T* const* ahead = first ? next->values : nullptr;
        alignas(64) float rescale[LANES], unit[LANES];
        store(rescale, shrink);
        if constexpr (arithmetic == IN_FLOATS) {
            accumulate<T, Q>((const float*)weights, rescale, tile->values, offset, tile->count,
                             sums, sum_stride, a.value_dim, ahead);
#if HAS_INT16_DOT
        } else {
            alignas(64) int16_t rounded[VECTORS * LANES];
            store(unit, round_weights<R, VECTORS>(weights, rounded));
            accumulate_pairs<T, Q>(rounded, unit, rescale, tile->values, offset, a.value_dim,
                                   tile->count, sums, sum_stride, ahead);
#endif
        }
    }

#if HAS_INT16_DOT
    // Rounds weights for products of pairs; returns the value of one unit for each query.
    template <int R, int VECTORS>
    INLINE_MEMBER Floats round_weights(const Floats* weights, int16_t* rounded) {
#if HAS_BF16_DOT
        if constexpr (arithmetic == BF16_DOTS) {
            for (int v = 0; v < VECTORS; v++)
                store(rounded + v * LANES, _mm512_cvtneps_pbh((__m512)weights[v]));
            return broadcast(1);
        }
#endif
        Floats most = broadcast(0), fault = broadcast(0);
        for (int v = 0; v < VECTORS; v++) {
            most = larger(most, weights[v]);
            fault += weights[v] * 0.0f;  // NaN if a weight is not finite, which `larger` drops
        }
        most = over_runs<R>(most, larger);
        fault = over_runs<R>(fault, [](Floats x, Floats y) { return x + y; });
        Floats inverse = INT16_MOST / most;  // infinite if all weights are tiny or zero
        inverse = inverse > -LOWEST ? broadcast(-LOWEST) : inverse;
        for (int v = 0; v < VECTORS; v++) store_int16(rounded + v * LANES, weights[v] * inverse);
        return 1.0f / inverse + fault;
    }
#endif

    // Gathers the tile's scales of one kv head.
    void read_scales(int64_t kv_head) {
        for (int i = 0; i < TILE; i++) {
            key_scales[i] = tile->key_scales[i][kv_head * a.scale_head];
            value_scales[i] = tile->value_scales[i][kv_head * a.scale_head];
        }
    }

    // Scores of tokens starting at `from`, with the mask's bias, and -inf for hidden tokens.
    template <int Q> Floats hidden(Floats scores, Group group, int from) {
        constexpr int R = LANES / Q;
        Floats lowest = broadcast(-INFINITY);
        if (hiding == RANGES) {
            Ints token{}, first{}, last{};
            for (int lane = 0; lane < LANES; lane++) {
                Range range = range_of((group.vector + lane / R) / heads_per_kv);
                token[lane] = from + lane % R;
                first[lane] = int32_t(std::min<int64_t>(range.first - tile->start, TILE));
                last[lane] = int32_t(std::min<int64_t>(range.last - tile->start, TILE));
            }
            return ((token >= first) & (token < last)) ? scores : lowest;
        }
        alignas(64) float bias[LANES];
        for (int q = 0; q < Q; q++) {
            int64_t vector = group.vector + q, line = vector / heads_per_kv;
            if (a.mask && a.mask_head)
                line += (group.kv_head * heads_per_kv + vector % heads_per_kv) * task.num_queries;
            memcpy(bias + q * R, scratch.bias + line * TILE_MOST + from, R * sizeof(float));
        }
        Floats added = load<Floats>(bias);
        return added == lowest ? lowest : scores + added;
    }
};

}  // namespace attention
