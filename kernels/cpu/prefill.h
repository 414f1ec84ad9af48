// Attention of many query vectors: prefill. A kv token is read once for up to 120 query vectors.
//
//   a task      = one row, one kv head, a chunk of its queries, one range of kv tokens
//   its loop    = tiles of PREFILL_TILE kv tokens; in each tile all groups of query vectors
//   a group     = 3, 2 or 1 vectors of LANES queries: one query per lane
//
//   scores  [token][query]   sums over head_dim: a vector of queries times one element of a key
//   weights                  online softmax, lane by lane: nothing to do across lanes
//   sums    [query][dim]     sums over tokens: one weight times a vector of a value
//
// Both products keep a block of results in registers, after Goto & van de Geijn (2008), "Anatomy of
// High-Performance Matrix Multiplication". Only queries are transposed, once per task. Keys and
// values are read where they are, unless they must be converted to floats.

#pragma once

#include "lanes.h"
#include "products.h"

namespace attention {

constexpr int PREFILL_TILE = 64;
// Queries and sums of a task stay in the L2 cache. Rows with fewer query vectors per kv head stay with
// `attention.h`, which reads memory in order.
constexpr Share PREFILL_SHARE{LANES == 16 ? 48 : 24, 120, 120 * 128, 3 * LANES};
constexpr int PREFILL_KEYS = LANES == 16 ? 8 : 4;  // keys of a block of scores

// scores[key][v]: the products of `V` vectors of queries [dim][V] with KEYS keys.
template <int V, int KEYS>
INLINE void block_of_scores(const float* queries, const float* const* keys, int64_t dim,
                            Floats* scores) {
    Floats sums[KEYS][V] = {};
    for (int64_t d = 0; d < dim; d++, queries += V * LANES) {
        Floats query[V];
        for (int v = 0; v < V; v++) query[v] = load<Floats>(queries + v * LANES);
        for (int k = 0; k < KEYS; k++) {
            Floats element = broadcast(keys[k][d]);
            for (int v = 0; v < V; v++) sums[k][v] += query[v] * element;
        }
    }
    for (int k = 0; k < KEYS; k++)
        for (int v = 0; v < V; v++) scores[k * V + v] = sums[k][v];
}

// sums[q][s] = sums[q][s] * rescale[q] + weights [token][q] * values, for Q queries, S vectors.
template <int Q, int S>
INLINE void block_of_sums(const float* weights, int64_t stride, const float* rescale,
                          const float* const* values, int64_t offset, int count, float* sums,
                          int64_t sum_stride) {
    Floats sum[Q][S];
    for (int q = 0; q < Q; q++)
        for (int s = 0; s < S; s++)
            sum[q][s] = load<Floats>(sums + q * sum_stride + s * LANES) * rescale[q];
    for (int t = 0; t < count; t++, weights += stride) {
        const float* row = values[t] + offset;
        Floats value[S];
        for (int s = 0; s < S; s++) value[s] = load<Floats>(row + s * LANES);
        for (int q = 0; q < Q; q++) {
            Floats weight = broadcast(weights[q]);
            for (int s = 0; s < S; s++) sum[q][s] += value[s] * weight;
        }
    }
    for (int q = 0; q < Q; q++)
        for (int s = 0; s < S; s++) store(sums + q * sum_stride + s * LANES, sum[q][s]);
}

struct PrefillScratch {
    Memory memory;
    float *queries, *sums, *lanes, *scores, *keys, *values;

    void prepare(int64_t count, int64_t key_dim, int64_t value_dim) {
        memory.divide({{&queries, count * key_dim},
                       {&sums, count * value_dim},
                       {&lanes, count * QueryLanes::FLOATS},
                       {&scores, PREFILL_TILE * 3 * LANES},
                       {&keys, PREFILL_TILE * key_dim},
                       {&values, PREFILL_TILE * value_dim}});
    }
};

template <class T> struct PrefillWorker {
    static constexpr int TILE = PREFILL_TILE;
    static constexpr bool converts = !std::is_same_v<T, float>;
    const AttentionArguments& a;
    const Task& task;
    PrefillScratch& scratch;
    const T* zeros;
    QueryLanes queries{a, task};
    int64_t key_dim = 0, value_dim = 0;  // of the rows that the products read
    bool stages_values = false;
    Tile<T, TILE> tile = {};
    const float *keys[TILE], *values[TILE];

    void run() {
        key_dim = converts ? padded(a.head_dim) : a.head_dim;
        // Vectors of the last value must not read behind it.
        stages_values = converts || a.value_dim % LANES;
        value_dim = padded(a.value_dim);
        scratch.prepare(queries.lanes, key_dim, value_dim);
        begin();
        for (int64_t from = task.start; from < task.stop; from += TILE) {
            tile.look_up(a, task, from, zeros, nullptr);
            read_rows();
            each_group([&](auto size, int64_t first) { attend<size()>(first); });
        }
        finish();
    }

    template <class Visit> void each_group(Visit visit) {
        int64_t lanes = queries.lanes, first = 0;
        for (; first + 3 * LANES <= lanes; first += 3 * LANES)
            visit(std::integral_constant<int, 3>{}, first);
        if (first + 2 * LANES <= lanes) visit(std::integral_constant<int, 2>{}, first);
        else if (first < lanes) visit(std::integral_constant<int, 1>{}, first);
    }

    // Transposes the queries, group by group: [group][dim][queries of the group].
    void begin() {
        int64_t lanes = queries.lanes;
        memset(scratch.queries, 0, lanes * key_dim * sizeof(float));
        memset(scratch.sums, 0, lanes * value_dim * sizeof(float));
        each_group([&](auto size, int64_t first) {
            float* group = scratch.queries + first * key_dim;
            int64_t width = size() * LANES, last = std::min(first + width, queries.vectors);
            for (int64_t vector = first; vector < last; vector++) {
                const T* query = (const T*)a.query + queries.place_of_query(vector);
                float* to = group + vector - first;
                for (int64_t d = 0; d < a.head_dim; d++)
                    to[place_of<T>(d) * width] = to_float(query[d]) * a.softmax_scale;
            }
        });
        queries.begin(scratch.lanes);
    }

    // Finds or converts the rows of this kv head.
    void read_rows() {
        int64_t key_offset = task.kv_head * a.key_head, value_offset = task.kv_head * a.value_head;
        for (int i = 0; i < TILE; i++) {
            const T *key = tile.keys[i] + key_offset, *value = tile.values[i] + value_offset;
            if constexpr (converts) {
                keys[i] = scratch.keys + i * key_dim;
                stage<T, IN_FLOATS>(key, a.head_dim, (char*)keys[i]);
            } else keys[i] = key;
            if (stages_values) {
                values[i] = scratch.values + i * value_dim;
                stage<T, IN_FLOATS>(value, a.value_dim, (char*)values[i]);
            } else if constexpr (!converts) values[i] = value;
        }
    }

    template <int V> __attribute__((noinline)) void attend(int64_t first) {
        Range part = queries.part_of(tile, first, first + V * LANES, PREFILL_KEYS);
        int from = int(part.first), to = int(part.last);
        if (from >= to) return;
        auto* scores = (Floats*)scratch.scores;
        const float* group = scratch.queries + first * key_dim;
        for (int t = from; t < to; t += PREFILL_KEYS)
            block_of_scores<V, PREFILL_KEYS>(group, keys + t, key_dim, scores + t * V);
        if (a.softcap > 0)
            for (int i = from * V; i < to * V; i++)
                scores[i] = tanh_of(scores[i] * (1 / a.softcap)) * a.softcap;
        alignas(64) float rescale[V * LANES];
        for (int v = 0; v < V; v++) {
            queries.hide<V>(tile, zeros, first + v * LANES, from, to, scores + v);
            store(rescale + v * LANES, queries.weigh<V>(first + v * LANES, from, to, scores + v));
        }
        sum<V>(first, from, to, rescale);
    }

    template <int V> void sum(int64_t first, int from, int to, const float* rescale) {
        constexpr int Q = V == 3 ? 6 : 4, WIDTH = V * LANES, S = LANES == 16 ? 4 : 2;
        const float* weights = scratch.scores + from * WIDTH;
        int64_t dim = stages_values ? value_dim : a.value_dim, d = 0;
        // A vector of values is read once for each Q queries, and stays in the L1 cache.
        for (; d + S * LANES <= dim; d += S * LANES)
            for (int q = 0; q < WIDTH; q += Q)
                block_of_sums<Q, S>(weights + q, WIDTH, rescale + q, values + from, d, to - from,
                                    scratch.sums + (first + q) * value_dim + d, value_dim);
        for (; d < dim; d += LANES)
            for (int q = 0; q < WIDTH; q += Q)
                block_of_sums<Q, 1>(weights + q, WIDTH, rescale + q, values + from, d, to - from,
                                    scratch.sums + (first + q) * value_dim + d, value_dim);
    }

    void finish() {
        for (int64_t vector = 0; vector < queries.vectors; vector++) {
            const float* sums = scratch.sums + vector * value_dim;
            if (task.partial >= 0) {
                float* to = queries.partial_of(vector);
                for (int64_t d = 0; d < a.value_dim; d++) to[d] = sums[place_of<T>(d)];
                continue;
            }
            T* to = (T*)a.output + queries.place_of_output(vector);
            float share = queries.share_of(vector);
            for (int64_t d = 0; d < a.value_dim; d++) from_float(sums[place_of<T>(d)] * share, to + d);
        }
    }
};

}  // namespace attention
