// Causal attention of a prompt's queries over 16-bit keys and values: both products of bf16 pairs added up in float32, the
// softmax between them in float32 and of one block of keys at a time.
//
//   keys by dims, values by tokens    scores [32 queries x 384 keys] in the L2 cache    outputs [32 queries x D] in the L1 cache
//
// torch's own takes MKL's products of bf16, which are slow on processors without AMX.

#include "prompt_attention.hpp"

namespace {

// Query t's scores of the `count` keys from `start` on -> weights, bf16, zeros where it does not see; what is kept of the
// sums of before.
float soften(const Prompt& a, int64_t t, int64_t start, int64_t count, float* scores, float& top, float& total,
             uint16_t* weights) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY), scaling = _mm512_set1_ps(a.scaling);
    __m512 most = nothing;
    for (int64_t s = 0; s < count; s += kLanes) {
        const __m512 x = _mm512_mask_mul_ps(nothing, a.sees(t, start + s), _mm512_loadu_ps(scores + s), scaling);
        _mm512_storeu_ps(scores + s, x);
        most = _mm512_max_ps(most, x);
    }
    const float largest = std::max(top, _mm512_reduce_max_ps(most));
    const float keep = top == -INFINITY ? 0.0f : std::exp(top - largest);
    const __m512 shift = _mm512_set1_ps(largest == -INFINITY ? 0.0f : largest);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < count; s += kLanes) {
        const __m512 p = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + s), shift));
        sum = _mm512_add_ps(sum, p);
        store(weights, false, s, 0xffff, p);
    }
    top = largest;
    total = total * keep + _mm512_reduce_add_ps(sum);
    return keep;
}

struct Scratch {
    uint16_t *queries, *weights;
    float *scores, *outputs;

    static int64_t bytes(int64_t dim) { return kQueries * (2 * dim + 2 * kKeys + 4 * kKeys + 4 * dim); }
    Scratch(char* memory, int64_t dim)
        : queries(reinterpret_cast<uint16_t*>(memory)),
          weights(queries + kQueries * dim),
          scores(reinterpret_cast<float*>(weights + kQueries * kKeys)),
          outputs(scores + kQueries * kKeys) {}
};

struct Outputs {
    uint16_t* out;     // [B, T, Hq, D]
    float* normalizer;  // of the softmax, its logarithm: [B, Hq, T], or null
};

void attend(const Prompt& a, int64_t b, int64_t h, int64_t first, const uint32_t* keys, const uint32_t* values,
            const Scratch& mine, const Outputs& to) {
    const int64_t pairs = a.pairs(), rows = a.rows(first), end = a.end(first), stride = a.stride();
    const uint32_t* queries = reinterpret_cast<const uint32_t*>(mine.queries);
    const uint32_t* weights = reinterpret_cast<const uint32_t*>(mine.weights);
    float top[kQueries], total[kQueries], keep[kQueries];
    take_rows(a.query.at(b, h), a.query.token, first, rows, a.dim, mine.queries);
    std::fill(top, top + kQueries, -INFINITY);
    std::fill(total, total + kQueries, 0.0f);
    std::fill(mine.outputs, mine.outputs + kQueries * a.dim, 0.0f);
    for (int64_t start = a.begin(first); start < end; start += kKeys) {
        const int64_t blocks = (std::min(kKeys, end - start) + kLanes - 1) / kLanes, count = blocks * kLanes;
        product(rows, blocks, queries, pairs, 1, keys + start * pairs, pairs * kLanes, pairs,
                [&](int64_t r, int64_t c, __m512 sum) QUANTKIT_INLINE { _mm512_storeu_ps(mine.scores + r * kKeys + c, sum); });
        for (int64_t r = 0; r < (rows + kRows - 1) / kRows * kRows; ++r)
            keep[r] = soften(a, first + r, start, count, mine.scores + r * kKeys, top[r], total[r],
                             mine.weights + r * kKeys);
        product(rows, a.dims(), weights, kKeys / 2, 1, values + start / 2 * kLanes, stride, count / 2,
                [&](int64_t r, int64_t c, __m512 sum) QUANTKIT_INLINE {
                    float* at = mine.outputs + r * a.dim + c;
                    _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_loadu_ps(at), _mm512_set1_ps(keep[r]), sum));
                });
    }
    for (int64_t r = 0; r < rows; ++r) {
        const __m512 factor = _mm512_set1_ps(1.0f / total[r]);
        const int64_t at = ((b * a.tokens + first + r) * a.heads + h) * a.dim;
        for (int64_t k = 0; k < a.dim; k += kLanes)
            store(to.out, false, at + k, 0xffff, _mm512_mul_ps(_mm512_loadu_ps(mine.outputs + r * a.dim + k), factor));
        if (to.normalizer) to.normalizer[(b * a.heads + h) * a.tokens + first + r] = top[r] + std::log(total[r]);
    }
}

}  // namespace

// Strides {B, H, T} of query, key and value in elements; sizes {B, Hq, Hkv, T, S, D}; normalizer may be null. Returns 0, or 1
// where memory is missing.
extern "C" int quantkit_prompt_attention(const uint16_t* query, const uint16_t* key, const uint16_t* value,
                                         const int64_t* strides, float scaling, int64_t window, uint16_t* out,
                                         float* normalizer, const int64_t* sizes, int threads) {
    const Prompt a({query, strides}, {key, strides + 3}, {value, strides + 6}, sizes, scaling, window);
    const int64_t each = a.packed(), pairs = a.batches * a.kv_heads, heads = a.batches * a.heads;
    uint32_t* keys = static_cast<uint32_t*>(std::aligned_alloc(64, 2 * pairs * each * sizeof(uint32_t)));
    if (keys == nullptr) return 1;
    uint32_t* values = keys + pairs * each;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        char* memory = static_cast<char*>(std::aligned_alloc(64, Scratch::bytes(a.dim)));
        failed |= memory == nullptr;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < pairs * a.blocks(); ++task) {
            const int64_t head = task / a.blocks(), block = task % a.blocks(), first = block * kLanes;
            const int64_t b = head / a.kv_heads, h = head % a.kv_heads;
            pack_by_dims(a.key.at(b, h), a.key.token, first, a.length, a.dim, keys + head * each + first * a.pairs());
            pack_by_tokens(a.value.at(b, h), a.value.token, first, a.length, a.dim, a.stride(),
                           first / 2, values + head * each);
        }
        // The last queries see the most keys: they come first.
#pragma omp for schedule(dynamic)
        for (int64_t task = heads * a.groups() - 1; task >= 0; --task) {
            if (failed) continue;
            const int64_t group = task / heads, b = task % heads / a.heads, h = task % a.heads;
            const int64_t shared = b * a.kv_heads + h / (a.heads / a.kv_heads);
            attend(a, b, h, group * kQueries, keys + shared * each, values + shared * each, Scratch(memory, a.dim),
                   {out, normalizer});
        }
        std::free(memory);
    }
    std::free(keys);
    return failed;
}
