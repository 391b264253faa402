// Gradients of a prompt's causal attention. The weights are computed again, a block at a time, from the scores and the
// softmax's normalizer that the forward pass kept:
//
//   P = exp(scale Q K^T - normalizer)    dS = scale P (dO V^T - rowsum(dO O))    dQ = dS K    dK = dS^T Q    dV = P^T dO
//
// P and dS are rounded to bf16 for the products behind them, which are added up in float32. A thread has a head of keys to
// itself, with all queries that read it, so that the sums are in one order whatever the threads do.
//
// Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.

#include "prompt_attention.hpp"

namespace {

struct Gradients {
    Heads out, out_gradient;  // [B, Hq, T, D]
    const float* normalizer;  // [B, Hq, T]
    uint16_t *query, *key, *value;  // [B, Hq, T, D], [B, Hkv, S, D], contiguous
};

// Memory of one thread, every part a multiple of 64 bytes.
struct Scratch {
    uint32_t *keys_by_dims, *keys_by_tokens, *values_by_dims;  // of the head
    uint32_t *queries_by_tokens, *outs_by_tokens;              // [D / 16][16][16] of 32 queries and their outputs' gradients
    uint32_t *weights, *slopes;                                // P and dS, pairs of queries: [16, 384]
    uint16_t *queries, *outs;                                  // [32, D]
    uint16_t* slope_rows;                                      // dS, pairs of keys: [32, 384]
    float *scores, *inner;                                     // Q K^T and dO V^T [32, 384]
    float *by_query, *by_key, *by_value;                       // [32, D], [S, D], [S, D]

    template <typename T>
    static void take(char*& at, T*& part, int64_t count) {
        part = reinterpret_cast<T*>(at);
        at += count * sizeof(T);
    }
    int64_t lay_out(char* memory, const Prompt& a) {
        char* at = memory;
        for (uint32_t** part : {&keys_by_dims, &keys_by_tokens, &values_by_dims}) take(at, *part, a.packed());
        for (uint32_t** part : {&queries_by_tokens, &outs_by_tokens}) take(at, *part, kQueries / 2 * a.dim);
        for (uint32_t** part : {&weights, &slopes}) take(at, *part, kQueries / 2 * kKeys);
        for (uint16_t** part : {&queries, &outs}) take(at, *part, kQueries * a.dim);
        take(at, slope_rows, kQueries * kKeys);
        for (float** part : {&scores, &inner}) take(at, *part, kQueries * kKeys);
        take(at, by_query, kQueries * a.dim);
        for (float** part : {&by_key, &by_value}) take(at, *part, a.blocks() * kLanes * a.dim);
        return at - memory;
    }
};

// The weight and the slope of query t for the 16 keys from `key` on, at `at` of the blocks.
inline void slope(const Prompt& a, int64_t t, int64_t key, int64_t at, float normalizer, float mean, const Scratch& mine,
                  __m256i* weight, __m256i* rounded) {
    const __m512 scaling = _mm512_set1_ps(a.scaling);
    const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(mine.scores + at), scaling, _mm512_set1_ps(normalizer));
    // What is not seen may be anything: rows beyond the last query have no scores.
    const __mmask16 seen = a.sees(t, key);
    const __m512 p = _mm512_maskz_mov_ps(seen, exponential(x));
    const __m512 inner = _mm512_sub_ps(_mm512_loadu_ps(mine.inner + at), _mm512_set1_ps(mean));
    *weight = (__m256i)_mm512_cvtneps_pbh(p);
    *rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mul_ps(seen, _mm512_mul_ps(p, inner), scaling));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mine.slope_rows + at), *rounded);
}

inline void add(float* at, __m512 sum) { _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sum)); }

// What 32 queries of head h, from `first` on, give to the gradients of their keys and values, and their own.
void queries_back(const Prompt& a, const Gradients& to, int64_t b, int64_t h, int64_t first, const Scratch& mine) {
    const int64_t pairs = a.pairs(), rows = a.rows(first), end = a.end(first), stride = a.stride();
    const int64_t of_queries = kQueries / 2 * kLanes;
    float normalizer[kQueries] = {}, mean[kQueries] = {};
    take_rows(a.query.at(b, h), a.query.token, first, rows, a.dim, mine.queries);
    take_rows(to.out_gradient.at(b, h), to.out_gradient.token, first, rows, a.dim, mine.outs);
    for (int64_t half = 0; half < kQueries; half += kLanes) {
        pack_by_tokens(mine.queries, a.dim, half, kQueries, a.dim, of_queries, half / 2, mine.queries_by_tokens);
        pack_by_tokens(mine.outs, a.dim, half, kQueries, a.dim, of_queries, half / 2, mine.outs_by_tokens);
    }
    for (int64_t r = 0; r < rows; ++r) {
        normalizer[r] = to.normalizer[(b * a.heads + h) * a.tokens + first + r];
        const uint16_t* out = to.out.at(b, h) + (first + r) * to.out.token;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < a.dim; k += kLanes)
            sum = _mm512_fmadd_ps(load(out, false, k, 0xffff), load(mine.outs + r * a.dim, false, k, 0xffff), sum);
        mean[r] = _mm512_reduce_add_ps(sum);
    }
    std::fill(mine.by_query, mine.by_query + kQueries * a.dim, 0.0f);
    for (int64_t start = a.begin(first); start < end; start += kKeys) {
        const int64_t blocks = (std::min(kKeys, end - start) + kLanes - 1) / kLanes, count = blocks * kLanes;
        const auto keep = [](float* to) {
            return [to](int64_t r, int64_t c, __m512 sum) QUANTKIT_INLINE { _mm512_storeu_ps(to + r * kKeys + c, sum); };
        };
        product(rows, blocks, reinterpret_cast<uint32_t*>(mine.queries), pairs, 1, mine.keys_by_dims + start * pairs,
                pairs * kLanes, pairs, keep(mine.scores));
        product(rows, blocks, reinterpret_cast<uint32_t*>(mine.outs), pairs, 1, mine.values_by_dims + start * pairs,
                pairs * kLanes, pairs, keep(mine.inner));
        for (int64_t r = 0; r < kQueries; r += 2)
            for (int64_t s = 0; s < count; s += kLanes) {
                __m256i weight[2], rounded[2];
                for (int64_t i = 0; i < 2; ++i)
                    slope(a, first + r + i, start + s, (r + i) * kKeys + s, normalizer[r + i], mean[r + i], mine,
                          weight + i, rounded + i);
                _mm512_storeu_si512(mine.weights + r / 2 * kKeys + s, pair_up(weight[0], weight[1]));
                _mm512_storeu_si512(mine.slopes + r / 2 * kKeys + s, pair_up(rounded[0], rounded[1]));
            }
        const auto add_to = [&a](float* to) {
            return [to, &a](int64_t r, int64_t c, __m512 sum) QUANTKIT_INLINE { add(to + r * a.dim + c, sum); };
        };
        product(rows, a.dims(), reinterpret_cast<uint32_t*>(mine.slope_rows), kKeys / 2, 1,
                mine.keys_by_tokens + start / 2 * kLanes, stride, count / 2, add_to(mine.by_query));
        product(count, a.dims(), mine.weights, 1, kKeys, mine.outs_by_tokens, of_queries, kQueries / 2,
                add_to(mine.by_value + start * a.dim));
        product(count, a.dims(), mine.slopes, 1, kKeys, mine.queries_by_tokens, of_queries, kQueries / 2,
                add_to(mine.by_key + start * a.dim));
    }
    uint16_t* out = to.query + ((b * a.heads + h) * a.tokens + first) * a.dim;
    for (int64_t k = 0; k < rows * a.dim; k += kLanes) store(out, false, k, 0xffff, _mm512_loadu_ps(mine.by_query + k));
}

// One head of keys and values, with the queries of all heads that read it.
void head_back(const Prompt& a, const Gradients& to, int64_t b, int64_t h, const Scratch& mine) {
    const int64_t readers = a.heads / a.kv_heads, all = a.length * a.dim, stride = a.stride();
    for (int64_t first = 0; first < a.length; first += kLanes) {
        pack_by_dims(a.key.at(b, h), a.key.token, first, a.length, a.dim, mine.keys_by_dims + first * a.pairs());
        pack_by_dims(a.value.at(b, h), a.value.token, first, a.length, a.dim, mine.values_by_dims + first * a.pairs());
        pack_by_tokens(a.key.at(b, h), a.key.token, first, a.length, a.dim, stride, first / 2, mine.keys_by_tokens);
    }
    std::fill(mine.by_key, mine.by_key + a.blocks() * kLanes * a.dim, 0.0f);
    std::fill(mine.by_value, mine.by_value + a.blocks() * kLanes * a.dim, 0.0f);
    for (int64_t reader = h * readers; reader < (h + 1) * readers; ++reader)
        for (int64_t first = 0; first < a.tokens; first += kQueries) queries_back(a, to, b, reader, first, mine);
    const int64_t at = (b * a.kv_heads + h) * all;
    for (int64_t k = 0; k < all; k += kLanes) {
        store(to.key, false, at + k, 0xffff, _mm512_loadu_ps(mine.by_key + k));
        store(to.value, false, at + k, 0xffff, _mm512_loadu_ps(mine.by_value + k));
    }
}

}  // namespace

// As quantkit_prompt_attention; `strides` of query, key, value, out and out_gradient. Returns 0, or 1 where memory is missing.
extern "C" int quantkit_prompt_attention_backward(const uint16_t* query, const uint16_t* key, const uint16_t* value,
                                                  const uint16_t* out, const uint16_t* out_gradient,
                                                  const int64_t* strides, const float* normalizer, float scaling,
                                                  int64_t window, uint16_t* by_query, uint16_t* by_key,
                                                  uint16_t* by_value, const int64_t* sizes, int threads) {
    const Prompt a({query, strides}, {key, strides + 3}, {value, strides + 6}, sizes, scaling, window);
    const Gradients to{{out, strides + 9}, {out_gradient, strides + 12}, normalizer, by_query, by_key, by_value};
    const int64_t bytes = Scratch{}.lay_out(nullptr, a);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        char* memory = static_cast<char*>(std::aligned_alloc(64, bytes));
        failed |= memory == nullptr;
        Scratch mine;
        if (memory) mine.lay_out(memory, a);
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < a.batches * a.kv_heads; ++head)
            if (memory) head_back(a, to, head / a.kv_heads, head % a.kv_heads, mine);
        std::free(memory);
    }
    return failed;
}
