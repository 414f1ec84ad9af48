// One task: a tile after the other, the online softmax between the two inner loops.

#pragma once

#include <type_traits>

#include "masks.h"
#include "products.h"
#include "products_int16.h"
#include "tile.h"

namespace attention {

// What one group of query vectors of one kv head needs to know about a tile.
struct Group {
    int64_t kv_head;
    int64_t vector;  // the first of the group, among the task's query vectors of this kv head
};

// How a kv head's dot products and sums are computed.
enum Arithmetic { IN_FLOATS, BF16_DOTS, IN_INT16 };

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
    int64_t kv_len = 0;
    // Of the tile and the kv head at hand; a vector may be read from any token on.
    float key_scales[TILE + LANES] = {}, value_scales[TILE + LANES] = {};
    Tile<T> tiles[2] = {};
    Tile<T> *tile = nullptr, *next = nullptr;
    enum { NOTHING, RANGES, BIAS } hiding = NOTHING;

    void run() {
        kv_len = a.kv_lens.at(task.row);
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

    // The query vectors of a kv head, four at a time, then two, then one.
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

    void begin() {
        for (int64_t head = 0; head < a.kv_heads; head++)
            for (int64_t vector = 0; vector < vectors; vector++) {
                int64_t token = task.first_query + vector / heads_per_kv;
                int64_t query_head = head * heads_per_kv + vector % heads_per_kv;
                int64_t offset = token * a.query_token + query_head * a.query_head;
                float* to = query_of(head, vector);
                memset(to, 0, query_stride * sizeof(float));
                if (arithmetic == BF16_DOTS) {
                    memcpy(to, (const bf16*)a.query + offset, a.head_dim * sizeof(bf16));
                } else if (arithmetic == IN_INT16) {
                    scratch.units[head * vectors + vector] = begin_int16((int16_t*)to, offset);
                } else {
                    for (int64_t d = 0; d < a.head_dim; d++)
                        to[place_of<T>(d)] = a.element(a.query, offset + d);
                }
                memset(sums_of(head, vector), 0, sum_stride * sizeof(float));
            }
        // Highest scores and sums of weights are kept as vectors, one per group, lanes as in scores.
        for (int64_t head = 0; head < a.kv_heads; head++)
            each_group(head, [&](auto size, Group group) { begin_group<size()>(group); });
    }

    // The query as int16; returns what 1 stands for.
    float begin_int16(int16_t* to, int64_t offset) {
        float most = 0;
        for (int64_t d = 0; d < a.head_dim; d++)
            most = std::max(most, std::fabs(a.element(a.query, offset + d)));
        float unit = most / INT16_MOST;
        for (int64_t d = 0; d < a.head_dim; d++) {
            float x = a.element(a.query, offset + d);
            // What is not finite has no integers, and has to come out as NaN.
            if (!(std::fabs(x) <= -LOWEST)) unit = NAN;
            to[d] = unit >= 0x1p-126f ? int16_t(std::nearbyint(x / unit)) : 0;
        }
        return unit;
    }

    template <int Q> void begin_group(Group group) {
        constexpr int R = LANES / Q;
        float* highest = state_of(scratch.highest, group);
        float* total = state_of(scratch.totals, group);
        for (int lane = 0; lane < LANES; lane++) {
            highest[lane] = LOWEST;
            total[lane] = 0;
            if (!a.sinks || !task.with_sink) continue;
            int64_t vector = group.vector + lane / R;
            int64_t head = group.kv_head * heads_per_kv + vector % heads_per_kv;
            highest[lane] = std::max(a.sinks[head], LOWEST);
            total[lane] = lane % R == 0;  // lanes of a query are added up at the end
        }
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
                    a.put(at + d, sums[place_of<T>(d)] * share);
            } else {
                int64_t query = task.partial + token - task.first_query;
                float* to = a.partials + (query * a.query_heads + head) * (a.value_dim + 2);
                to[0] = highest[q * R];
                to[1] = total[q * R];
                for (int64_t d = 0; d < a.value_dim; d++) to[2 + d] = sums[place_of<T>(d)];
            }
        }
    }

    // ---------------------------------------------------------------- a tile

    // What hides tokens of this tile from queries, if anything does.
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
        return visible(a, task.row, task.first_position + query, kv_len);
    }

    void hide_by_bias() {
        hiding = BIAS;
        int64_t lines = task.num_queries * (a.mask && a.mask_head ? a.query_heads : 1);
        if (a.mask) read_any_mask(a, task, kv_len, tile->start, tile->count, scratch.bias);
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
        alignas(64) float weights[VECTORS * LANES];
        alignas(64) float rescale[LANES];
        int64_t key_offset = group.kv_head * a.key_head;
        int64_t value_offset = group.kv_head * a.value_head;
        bool whole = a.head_dim % STEP == 0;
        float* highest = state_of(scratch.highest, group);
        float* totals = state_of(scratch.totals, group);

        Floats units = broadcast(1);
        if constexpr (arithmetic == IN_INT16)
            for (int lane = 0; lane < LANES; lane++)
                units[lane] = scratch.units[group.kv_head * vectors + group.vector + lane / R];
        // The first group of a kv head asks memory for the next tile's part of that head.
        bool first = group.vector == 0 && next->count;

        Floats scores[VECTORS], most = load<Floats>(highest);
        for (int v = 0; v < VECTORS; v++) {
            if (first) prefetch_keys<R>(v * R, key_offset);
            scores[v] = whole ? dot_products<Q, true>(group, v * R) : dot_products<Q, false>(group, v * R);
            if constexpr (arithmetic == IN_INT16) scores[v] *= units;
            scores[v] *= a.scale;
            if (a.key_scales) scores[v] *= repeated<R>(key_scales + v * R);
            if (a.softcap > 0) scores[v] = tanh_of(scores[v] * (1 / a.softcap)) * a.softcap;
            if (hiding != NOTHING) scores[v] = hidden<Q>(scores[v], group, v * R);
            most = larger(most, scores[v]);
        }
        most = over_runs<R>(most, larger);
        Floats shrink = exp_nonpositive(load<Floats>(highest) - most);
        Floats total = load<Floats>(totals) * shrink;
        for (int v = 0; v < VECTORS; v++) {
            Floats weight = exp_nonpositive(scores[v] - most);
            total += weight;
            if (a.value_scales) weight *= repeated<R>(value_scales + v * R);
            store(weights + v * LANES, weight);
        }
        store(highest, most);
        store(totals, total);
        store(rescale, shrink);
#if HAS_INT16_DOT
        if constexpr (arithmetic == IN_INT16) {
            sum_int16<Q>(group, weights, rescale, value_offset, first);
            return;
        }
#endif
        accumulate<T, Q>(weights, rescale, tile->values, value_offset, tile->count,
                         sums_of(group.kv_head, group.vector), sum_stride, a.value_dim,
                         first ? next->values : nullptr);
    }

    template <int Q, bool whole> INLINE_MEMBER Floats dot_products(Group group, int from) {
        const float* query = query_of(group.kv_head, group.vector);
        int64_t offset = group.kv_head * a.key_head;
        const T* const* rows = tile->keys + from;
#if HAS_BF16_DOT
        if constexpr (arithmetic == BF16_DOTS)
            return dots_bf16<Q>(query, query_stride, rows, offset, a.head_dim);
#endif
#if HAS_INT16_DOT
        if constexpr (arithmetic == IN_INT16)
            return dots_int16<Q, whole>((const int16_t*)query, 2 * query_stride, rows, offset,
                                        a.head_dim);
#endif
        if constexpr (arithmetic == IN_FLOATS)
            return dots<T, Q, whole>(query, query_stride, rows, offset, a.head_dim);
    }

#if HAS_INT16_DOT
    template <int Q> void sum_int16(Group group, const float* weights, const float* rescale,
                                    int64_t value_offset, bool first) {
        constexpr int R = LANES / Q, VECTORS = TILE / R;
        alignas(64) int16_t rounded[VECTORS * LANES];
        alignas(64) float unit[LANES];
        Floats most = broadcast(0), fault = broadcast(0);
        for (int v = 0; v < VECTORS; v++) {
            Floats weight = load<Floats>(weights + v * LANES);
            most = larger(most, weight);
            fault += weight * 0.0f;  // NaN as soon as one is not finite, which `larger` forgets
        }
        most = over_runs<R>(most, larger);
        fault = over_runs<R>(fault, [](Floats x, Floats y) { return x + y; });
        Floats inverse = INT16_MOST / most;  // infinite where all weights are tiny or none
        inverse = inverse > -LOWEST ? broadcast(-LOWEST) : inverse;
        for (int v = 0; v < VECTORS; v++)
            store_int16(rounded + v * LANES, load<Floats>(weights + v * LANES) * inverse);
        store(unit, 1.0f / inverse + fault);
        accumulate_int16<Q>(rounded, unit, rescale, tile->values, value_offset, tile->count,
                            sums_of(group.kv_head, group.vector), sum_stride, a.value_dim,
                            first ? next->values : nullptr);
    }
#endif

    // Bring the tile's scales of one kv head together.
    void read_scales(int64_t kv_head) {
        for (int i = 0; i < TILE; i++) {
            key_scales[i] = tile->key_scales[i][kv_head * a.scale_head];
            value_scales[i] = tile->value_scales[i][kv_head * a.scale_head];
        }
    }

    // The scales of the R tokens from `scales` on, repeated for each query of the group.
    template <int R> Floats repeated(const float* scales) {
        Ints token;
        for (int lane = 0; lane < LANES; lane++) token[lane] = lane % R;
        Floats vector = load<Floats>(scales);
        return PERMUTE(vector, vector, token);
    }

    // Scores of tokens `from` on with the mask's bias added, and -inf where a query may not look.
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

    template <int R> void prefetch_keys(int from, int64_t offset) {
        for (int t = from; t < from + R; t++) prefetch(next->keys[t] + offset, a.head_dim);
    }
};

}  // namespace attention
