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

#include "products.h"
#include "tile.h"

namespace attention {

constexpr int PREFILL_TILE = 64;
// Query vectors per task: their queries and sums stay in the L2 cache.
constexpr int64_t PREFILL_QUERIES = 120, PREFILL_ELEMENTS = 120 * 128;
// Rows with fewer query vectors per kv head stay with `attention.h`, which reads memory in order.
constexpr int64_t PREFILL_LEAST = LANES == 16 ? 48 : 24;
constexpr int PREFILL_KEYS = LANES == 16 ? 8 : 4;  // keys of a block of scores

// True if the row's queries are attended by tasks of this file.
template <class T, Arithmetic arithmetic>
bool is_prefill(const AttentionArguments& a, int64_t row) {
    if (arithmetic != IN_FLOATS || sizeof(T) == 1 || a.mask) return false;
    return a.queries_of(row) * (a.query_heads / a.kv_heads) >= PREFILL_LEAST;
}

// Queries (tokens) per task of a row with `queries` queries.
inline int64_t prefill_chunk(const AttentionArguments& a, int64_t queries) {
    int64_t most = PREFILL_ELEMENTS / std::max(padded(a.head_dim), padded(a.value_dim));
    most = std::min(PREFILL_QUERIES, std::max<int64_t>(most / (3 * LANES), 1) * 3 * LANES);
    most = std::max<int64_t>(1, most / (a.query_heads / a.kv_heads));
    int64_t chunks = (queries + most - 1) / most;
    return (queries + chunks - 1) / chunks;
}

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
    float *queries, *sums, *highest, *totals, *scores, *keys, *values;

    void prepare(int64_t lanes, int64_t key_dim, int64_t value_dim) {
        memory.divide({{&queries, lanes * key_dim},
                       {&sums, lanes * value_dim},
                       {&highest, lanes},
                       {&totals, lanes},
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
    int64_t heads_per_kv = 0, vectors = 0, seq_len = 0;
    int64_t key_dim = 0, value_dim = 0;  // of the rows that the products read
    bool stages_values = false;
    Tile<T, TILE> tile = {};
    const float *keys[TILE], *values[TILE];

    void run() {
        heads_per_kv = a.query_heads / a.kv_heads;
        vectors = heads_per_kv * task.num_queries;
        seq_len = a.seq_lens.at(task.row);
        key_dim = converts ? padded(a.head_dim) : a.head_dim;
        // Vectors of the last value must not read behind it.
        stages_values = converts || a.value_dim % LANES;
        value_dim = padded(a.value_dim);
        int64_t lanes = (vectors + LANES - 1) / LANES * LANES;
        scratch.prepare(lanes, key_dim, value_dim);
        begin(lanes);
        for (int64_t from = task.start; from < task.stop; from += TILE) {
            tile.look_up(a, task, from, zeros, nullptr);
            read_rows();
            each_group(lanes, [&](auto size, int64_t first) { attend<size()>(first); });
        }
        finish();
    }

    template <class Visit> void each_group(int64_t lanes, Visit visit) {
        int64_t first = 0;
        for (; first + 3 * LANES <= lanes; first += 3 * LANES)
            visit(std::integral_constant<int, 3>{}, first);
        if (first + 2 * LANES <= lanes) visit(std::integral_constant<int, 2>{}, first);
        else if (first < lanes) visit(std::integral_constant<int, 1>{}, first);
    }

    int64_t query_of(int64_t vector) const { return vector / heads_per_kv; }
    int64_t head_of(int64_t vector) const {
        return task.kv_head * heads_per_kv + vector % heads_per_kv;
    }

    // Transposes the queries, group by group: [group][dim][queries of the group].
    void begin(int64_t lanes) {
        memset(scratch.queries, 0, lanes * key_dim * sizeof(float));
        memset(scratch.sums, 0, lanes * value_dim * sizeof(float));
        each_group(lanes, [&](auto size, int64_t first) {
            float* group = scratch.queries + first * key_dim;
            int64_t width = size() * LANES;
            for (int64_t vector = first; vector < std::min(first + width, vectors); vector++) {
                const T* query = (const T*)a.query + head_of(vector) * a.query_head
                    + (task.first_query + query_of(vector)) * a.query_token;
                float* to = group + vector - first;
                for (int64_t d = 0; d < a.head_dim; d++)
                    to[place_of<T>(d) * width] = to_float(query[d]) * a.softmax_scale;
            }
        });
        for (int64_t vector = 0; vector < lanes; vector++) {
            bool has_sink = a.sinks && task.with_sink && vector < vectors;
            scratch.highest[vector] = has_sink ? std::max(a.sinks[head_of(vector)], LOWEST) : LOWEST;
            scratch.totals[vector] = has_sink;
        }
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

    Range range_of(int64_t vector) const {
        int64_t position = task.first_position + query_of(std::min(vector, vectors - 1));
        return visible(a, task.row, position, seq_len);
    }

    template <int V> __attribute__((noinline)) void attend(int64_t first) {
        // Tokens of the tile that a query of the group sees, in whole blocks of scores.
        int64_t last_vector = std::min(first + V * LANES, vectors) - 1;
        int64_t start = std::max<int64_t>(range_of(first).first - tile.start, 0);
        int64_t stop = std::min<int64_t>(range_of(last_vector).last - tile.start, tile.count);
        if (start >= stop) return;
        int from = int(start / PREFILL_KEYS * PREFILL_KEYS);
        int to = int((stop + PREFILL_KEYS - 1) / PREFILL_KEYS * PREFILL_KEYS);
        auto* scores = (Floats*)scratch.scores;
        const float* queries = scratch.queries + first * key_dim;
        for (int t = from; t < to; t += PREFILL_KEYS)
            block_of_scores<V, PREFILL_KEYS>(queries, keys + t, key_dim, scores + t * V);
        if (a.softcap > 0)
            for (int i = from * V; i < to * V; i++)
                scores[i] = tanh_of(scores[i] * (1 / a.softcap)) * a.softcap;
        hide<V>(first, from, to, scores);
        alignas(64) float rescale[V * LANES];
        for (int v = 0; v < V; v++) weigh<V>(first, v, from, to, scores, rescale + v * LANES);
        sum<V>(first, from, to, rescale);
    }

    // Sets hidden scores to -inf.
    template <int V> void hide(int64_t first, int from, int to, Floats* scores) {
        Floats lowest = broadcast(-INFINITY);
        for (int v = 0; v < V; v++) {
            int64_t vector = first + v * LANES;
            Range one = range_of(vector), other = range_of(vector + LANES - 1);
            int64_t low = std::max(one.first, other.first), high = std::min(one.last, other.last);
            if (low <= tile.start + from && high >= tile.start + to) continue;
            Ints begins{}, ends{};
            for (int lane = 0; lane < LANES; lane++) {
                Range range = range_of(vector + lane);
                begins[lane] = int32_t(std::max<int64_t>(range.first - tile.start, 0));
                ends[lane] = int32_t(std::min<int64_t>(range.last - tile.start, TILE));
            }
            for (int t = from; t < to; t++) {
                Ints token = t - Ints{};
                Floats& score = scores[t * V + v];
                score = ((token >= begins) & (token < ends)) ? score : lowest;
            }
        }
        if (!tile.holes) return;
        for (int t = from; t < to; t++)
            if (tile.keys[t] == zeros)
                for (int v = 0; v < V; v++) scores[t * V + v] = lowest;
    }

    // Scores become weights; writes the factor of the earlier sums.
    template <int V>
    void weigh(int64_t first, int v, int from, int to, Floats* scores, float* rescale) {
        float *highest = scratch.highest + first + v * LANES,
              *totals = scratch.totals + first + v * LANES;
        Floats before = load<Floats>(highest), most = before;
        for (int t = from; t < to; t++) most = larger(most, scores[t * V + v]);
        Floats shrink = exp_nonpositive(before - most);
        Floats total = load<Floats>(totals) * shrink;
        for (int t = from; t < to; t++) {
            Floats weight = exp_nonpositive(scores[t * V + v] - most);
            scores[t * V + v] = weight;
            total += weight;
        }
        store(highest, most);
        store(totals, total);
        store(rescale, shrink);
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
        for (int64_t vector = 0; vector < vectors; vector++) {
            int64_t token = task.first_query + query_of(vector), head = head_of(vector);
            const float* sums = scratch.sums + vector * value_dim;
            float total = scratch.totals[vector];
            if (task.partial < 0) {
                float share = total == 0 ? 0 : 1 / total;
                T* to = (T*)a.output + (token * a.query_heads + head) * a.value_dim;
                for (int64_t d = 0; d < a.value_dim; d++)
                    from_float(sums[place_of<T>(d)] * share, to + d);
            } else {
                int64_t query = task.partial + query_of(vector);
                float* to = a.partials + (query * a.query_heads + head) * (a.value_dim + 2);
                to[0] = scratch.highest[vector];
                to[1] = total;
                for (int64_t d = 0; d < a.value_dim; d++) to[2 + d] = sums[place_of<T>(d)];
            }
        }
    }
};

}  // namespace attention
