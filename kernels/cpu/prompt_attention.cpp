// Causal attention of a prompt's queries over 16-bit keys and values: both products of bf16 pairs added up in float32, the
// softmax between them in float32 and of one block of keys at a time.
//
//   keys:    16 x D  -> pairs of dims, 16 keys to a vector    scores  [32 queries x 384 keys] in the L2 cache
//   values:  S x 16  -> pairs of keys, 16 dims to a vector    outputs [32 queries x D] in the L1 cache
//
// torch's own takes MKL's products of bf16, which are slow on processors without AMX.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "bf16_tile.hpp"
#include "vectors.hpp"

namespace {

constexpr int64_t kQueries = 32, kKeys = 384;
constexpr int kRows = 8;  // of a tile

struct Prompt {
    // bf16 [B, Hq, T, D] and [B, Hkv, S, D], D contiguous; strides of keys and values are even.
    const uint16_t *query, *key, *value;
    int64_t query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token;
    uint16_t* out;  // [B, T, Hq, D]
    int64_t batches, heads, kv_heads, tokens, length, dim;
    float scaling;
    int64_t window;  // 0: none

    int64_t blocks() const { return (length + kLanes - 1) / kLanes; }
    int64_t packed() const { return blocks() * kLanes * dim / 2; }  // of one head's keys, or values
};

// One block of 16 keys -> uint32 [D / 2, 16]; keys beyond the last are zeros.
void pack_keys(const Prompt& a, int64_t b, int64_t h, int64_t block, uint32_t* out) {
    const __mmask16 there = left(block * kLanes, a.length);
    const uint16_t* from = a.key + b * a.key_batch + h * a.key_head + block * kLanes * a.key_token;
    const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(static_cast<int>(a.key_token / 2)));
    for (int64_t p = 0; p < a.dim / 2; ++p)
        _mm512_storeu_si512(out + p * kLanes, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, places,
                                                                          reinterpret_cast<const int*>(from) + p, 4));
}

// The values of the same 16 keys -> uint32 [D / 16][8 of S / 2, 16].
void pack_values(const Prompt& a, int64_t b, int64_t h, int64_t block, uint32_t* out) {
    const uint16_t* from = a.value + b * a.value_batch + h * a.value_head;
    for (int64_t d = 0; d < a.dim / kLanes; ++d)
        for (int64_t p = block * kLanes / 2; p < (block + 1) * kLanes / 2; ++p) {
            __m256i two[2];
            for (int64_t i = 0; i < 2; ++i)
                two[i] = _mm256_maskz_loadu_epi16(2 * p + i < a.length ? 0xffff : 0,
                                                  from + (2 * p + i) * a.value_token + d * kLanes);
            _mm512_storeu_si512(out + (d * a.blocks() * kLanes / 2 + p) * kLanes, pair_up(two[0], two[1]));
        }
}

// 32 queries from `first` on -> [32, D], zeros beyond the last.
void take_queries(const Prompt& a, int64_t b, int64_t h, int64_t first, uint16_t* out) {
    const int64_t rows = std::min(kQueries, a.tokens - first), size = a.dim * sizeof(uint16_t);
    const uint16_t* from = a.query + b * a.query_batch + h * a.query_head + first * a.query_token;
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * a.dim, from + r * a.query_token, size);
    std::memset(out + rows * a.dim, 0, (kQueries - rows) * size);
}

// keys: the first block's, `blocks` of them -> scores [8, 384].
template <int count>
void score(const uint32_t* queries, const uint32_t* keys, int64_t pairs, float* scores) {
    bf16_tile<kRows, count>(queries, pairs, 1, keys, pairs * kLanes, pairs, [&](auto r, auto q, __m512 sum) QUANTKIT_INLINE {
        _mm512_storeu_ps(scores + r * kKeys + q * kLanes, sum);
    });
}

// outputs [8, dim] = outputs * keep + weights [8, 384] values.
template <int count>
void weigh(const uint32_t* weights, const uint32_t* values, int64_t block, int64_t length, const float* keep,
           float* outputs, int64_t dim) {
    bf16_tile<kRows, count>(weights, kKeys / 2, 1, values, block, length, [&](auto r, auto q, __m512 sum) QUANTKIT_INLINE {
        float* at = outputs + r * dim + q * kLanes;
        _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_loadu_ps(at), _mm512_set1_ps(keep[r]), sum));
    });
}

// One query's scores of `count` keys, of which it sees [from, to) -> weights, bf16, zeros elsewhere; what is kept of the
// sums of before.
float soften(const Prompt& a, float* scores, int64_t count, int64_t from, int64_t to, float& top, float& total,
             uint16_t* weights) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY), scaling = _mm512_set1_ps(a.scaling);
    __m512 most = nothing;
    for (int64_t s = 0; s < count; s += kLanes) {
        __mmask16 sees = to > s ? left(s, to) : 0;
        if (from > s) sees &= from - s >= 16 ? 0 : static_cast<__mmask16>(0xffffu << (from - s));
        const __m512 x = _mm512_mask_mul_ps(nothing, sees, _mm512_loadu_ps(scores + s), scaling);
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

void attend(const Prompt& a, int64_t b, int64_t h, int64_t first, const uint32_t* keys, const uint32_t* values,
            const Scratch& mine) {
    const int64_t pairs = a.dim / 2, rows = std::min(kQueries, a.tokens - first), stride = a.blocks() * kLanes / 2 * kLanes;
    const int64_t before = a.length - a.tokens;  // keys of earlier tokens: query t sees before + t + 1
    const int64_t end = std::min(a.length, before + first + rows);
    const int64_t begin = a.window ? std::max<int64_t>(0, before + first + 1 - a.window) / kLanes * kLanes : 0;
    float top[kQueries], total[kQueries], keep[kQueries];
    take_queries(a, b, h, first, mine.queries);
    std::fill(top, top + kQueries, -INFINITY);
    std::fill(total, total + kQueries, 0.0f);
    std::fill(mine.outputs, mine.outputs + kQueries * a.dim, 0.0f);
    for (int64_t start = begin; start < end; start += kKeys) {
        const int64_t blocks = (std::min(kKeys, end - start) + kLanes - 1) / kLanes, count = blocks * kLanes;
        for (int64_t r = 0; r < rows; r += kRows) {
            const uint32_t* q = reinterpret_cast<const uint32_t*>(mine.queries) + r * pairs;
            for (int64_t j = 0; j < blocks; j += 3) {
                const uint32_t* k = keys + (start + j * kLanes) * pairs;
                float* out = mine.scores + r * kKeys + j * kLanes;
                if (blocks - j >= 3) score<3>(q, k, pairs, out);
                else if (blocks - j == 2) score<2>(q, k, pairs, out);
                else score<1>(q, k, pairs, out);
            }
        }
        for (int64_t r = 0; r < (rows + kRows - 1) / kRows * kRows; ++r) {
            const int64_t seen = r < rows ? before + first + r + 1 : 0;
            keep[r] = soften(a, mine.scores + r * kKeys, count, a.window ? seen - a.window - start : 0, seen - start,
                             top[r], total[r], mine.weights + r * kKeys);
        }
        for (int64_t r = 0; r < rows; r += kRows) {
            const uint32_t* w = reinterpret_cast<const uint32_t*>(mine.weights + r * kKeys);
            for (int64_t d = 0, next; d < a.dim / kLanes; d = next) {
                const int64_t more = a.dim / kLanes - d, width = more == 4 ? 2 : std::min<int64_t>(more, 3);
                const uint32_t* v = values + d * stride + start / 2 * kLanes;
                float* out = mine.outputs + r * a.dim + d * kLanes;
                if (width == 3) weigh<3>(w, v, stride, count / 2, keep + r, out, a.dim);
                else if (width == 2) weigh<2>(w, v, stride, count / 2, keep + r, out, a.dim);
                else weigh<1>(w, v, stride, count / 2, keep + r, out, a.dim);
                next = d + width;
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const __m512 factor = _mm512_set1_ps(1.0f / total[r]);
        const int64_t at = ((b * a.tokens + first + r) * a.heads + h) * a.dim;
        for (int64_t k = 0; k < a.dim; k += kLanes)
            store(a.out, false, at + k, 0xffff, _mm512_mul_ps(_mm512_loadu_ps(mine.outputs + r * a.dim + k), factor));
    }
}

}  // namespace

// Strides {B, H, T} of query, key and value in elements. Returns 0, or 1 where memory is missing.
extern "C" int quantkit_prompt_attention(const uint16_t* query, const uint16_t* key, const uint16_t* value,
                                         const int64_t* strides, float scaling, int64_t window, uint16_t* out,
                                         const int64_t* sizes, int threads) {
    const Prompt a{query, key, value, strides[0], strides[1], strides[2], strides[3], strides[4], strides[5],
                   strides[6], strides[7], strides[8], out,
                   sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], scaling, window};
    const int64_t each = a.packed(), groups = (a.tokens + kQueries - 1) / kQueries, pairs = a.batches * a.kv_heads;
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
            const int64_t head = task / a.blocks(), block = task % a.blocks();
            const int64_t b = head / a.kv_heads, h = head % a.kv_heads;
            pack_keys(a, b, h, block, keys + head * each + block * kLanes * a.dim / 2);
            pack_values(a, b, h, block, values + head * each);
        }
        // The last queries see the most keys: they come first.
#pragma omp for schedule(dynamic)
        for (int64_t task = a.batches * a.heads * groups - 1; task >= 0; --task) {
            if (failed) continue;
            const int64_t group = task / (a.batches * a.heads), head = task % (a.batches * a.heads);
            const int64_t b = head / a.heads, h = head % a.heads;
            const int64_t shared = b * a.kv_heads + h / (a.heads / a.kv_heads);
            attend(a, b, h, group * kQueries, keys + shared * each, values + shared * each, Scratch(memory, a.dim));
        }
        std::free(memory);
    }
    std::free(keys);
    return failed;
}
