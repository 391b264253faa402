// Attention of a few queries over INT4 keys and values on the CPU.
//
// The packed bytes are read once: 16 bytes become 32 floats by two permutations of a table of the 16 codes,
// shared by up to four queries of a group.
//
//   keys:   4 rows x 4 keys (2 x 8, 1 x 16) of sums in 16 registers --- reduced together ---> 16 scores
//   block of 256 keys: scores x scales + mask -> online softmax -> weights x the values' scales
//   values: 32 columns at a time, sums of 4 rows in 8 registers over the block's keys

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "kv4.hpp"

namespace {

constexpr int64_t kBlock = 256;  // keys whose scores and bytes stay in the L1 and L2 caches
constexpr int kRows = 4;         // queries that share an expansion
constexpr int64_t kLeast = 512;  // keys worth a thread of their own

// Lane i: the sum of the lanes of sums[i].
inline __m512 reduce(__m512 sums[16]) {
    __m512 a[8], b[4];
    for (int i = 0; i < 8; ++i)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[2 * i], sums[2 * i + 1]),
                             _mm512_unpackhi_ps(sums[2 * i], sums[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
        const __m512d first = _mm512_castps_pd(a[2 * i]), second = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
    }
    // Each b[i] has four vectors' sums in every 128 bits: add those up, in order.
    const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x44), _mm512_shuffle_f32x4(b[0], b[1], 0xee));
    const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x44), _mm512_shuffle_f32x4(b[2], b[3], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}

struct Attention {
    const void* query;  // [B, Hq, T, D], D contiguous
    bool is_float;
    int64_t query_batch, query_head, query_token;
    Vectors key, value;
    const float* post_scale;  // [Hkv, D] or null
    bool quantize_query;
    const void* mask;  // null, bytes (1: attend) or floats (added)
    bool mask_bool;
    int64_t mask_batch, mask_head, mask_token;
    float scaling;
    bool causal;
    void* out;  // [B, Hq, T, D]
    int64_t batches, heads, kv_heads, tokens, length, dim;

    int64_t group() const { return heads / kv_heads; }
    int64_t rows() const { return group() * tokens; }  // queries that read one head's keys
    int64_t width() const { return 2 * padded(); }
    int64_t padded() const { return (dim / 2 + 15) / 16 * 16; }  // half a vector, in whole registers
};

// Query row r of key head h -> its two halves, each padded with zeros, times the scores' factor.
void prepare_query(const Attention& a, int64_t b, int64_t h, int64_t r, float* q) {
    const int64_t head = h * a.group() + r / a.tokens, token = r % a.tokens;
    const int64_t start = b * a.query_batch + head * a.query_head + token * a.query_token;
    const int64_t half = a.dim / 2;
    __m512 top = _mm512_setzero_ps();
    for (int side = 0; side < 2; ++side)
        for (int64_t k = 0; k < a.padded(); k += 16) {
            const __mmask16 mask = k < half ? left(k, half) : 0;
            __m512 x = load(a.query, a.is_float, start + side * half + k, mask);
            if (a.post_scale != nullptr) {
                const float* factor = a.post_scale + h * a.dim + side * half + k;
                x = _mm512_maskz_div_ps(mask, x, _mm512_maskz_loadu_ps(mask, factor));
            }
            top = _mm512_max_ps(_mm512_abs_ps(x), top);
            _mm512_storeu_ps(q + side * a.padded() + k, x);
        }
    const float scale = _mm512_reduce_max_ps(top) / 448.0f;
    const __m512 divisor = _mm512_set1_ps(scale > 0 ? scale : 1.0f);
    for (int64_t k = 0; k < a.width(); k += 16) {
        __m512 x = _mm512_loadu_ps(q + k);
        if (a.quantize_query) {
            x = _mm512_div_ps(x, divisor);
            x = _mm512_max_ps(_mm512_set1_ps(-448.0f), _mm512_min_ps(_mm512_set1_ps(448.0f), x));
            x = _mm512_mul_ps(from_float8(to_float8(x)), _mm512_set1_ps(scale));
        }
        _mm512_storeu_ps(q + k, _mm512_mul_ps(x, _mm512_set1_ps(a.scaling)));
    }
}

// scores [ROWS][kBlock] of keys [from, to), without their scales.
template <int ROWS>
void score(const Attention& a, const uint8_t* keys, int64_t count, const float* q, float* scores) {
    constexpr int KEYS = 16 / ROWS;
    const __m512 table = code_table();
    const int64_t half = a.dim / 2, padded = a.padded();
    for (int64_t s = 0; s < count; s += KEYS) {
        const uint8_t* at[KEYS];
        for (int i = 0; i < KEYS; ++i) at[i] = keys + std::min(s + i, count - 1) * a.key.token;
        __m512 sums[16];
        for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
        for (int64_t k = 0; k < half; k += 16) {
            const __mmask16 mask = left(k, half);
#pragma GCC unroll 16
            for (int i = 0; i < KEYS; ++i) {
                __m512 low, high;
                expand(at[i] + k, mask, table, low, high);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) {
                    const float* row = q + r * 2 * padded + k;
                    __m512& sum = sums[r * KEYS + i];
                    sum = _mm512_fmadd_ps(low, _mm512_loadu_ps(row), sum);
                    sum = _mm512_fmadd_ps(high, _mm512_loadu_ps(row + padded), sum);
                }
            }
        }
        alignas(64) float found[16];
        _mm512_store_ps(found, reduce(sums));
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < KEYS; ++i) scores[r * (kBlock + 16) + s + i] = found[r * KEYS + i];
    }
}

// out [ROWS][width] = out * keep[row] + sum over keys of weights [key][kRows] * codes.
template <int ROWS>
void accumulate(const Attention& a, const uint8_t* values, int64_t count, const float* weights,
                const float* keep, float* out) {
    const __m512 table = code_table();
    const int64_t half = a.dim / 2, padded = a.padded();
    for (int64_t k = 0; k < half; k += 16) {
        const __mmask16 mask = left(k, half);
        __m512 low[ROWS], high[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            const __m512 factor = _mm512_set1_ps(keep[r]);
            low[r] = _mm512_mul_ps(_mm512_loadu_ps(out + r * 2 * padded + k), factor);
            high[r] = _mm512_mul_ps(_mm512_loadu_ps(out + r * 2 * padded + padded + k), factor);
        }
        for (int64_t s = 0; s < count; ++s) {
            __m512 first, second;
            expand(values + s * a.value.token + k, mask, table, first, second);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const __m512 weight = _mm512_set1_ps(weights[s * kRows + r]);
                low[r] = _mm512_fmadd_ps(first, weight, low[r]);
                high[r] = _mm512_fmadd_ps(second, weight, high[r]);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            _mm512_storeu_ps(out + r * 2 * padded + k, low[r]);
            _mm512_storeu_ps(out + r * 2 * padded + padded + k, high[r]);
        }
    }
}

template <typename Function>
void with_rows(int64_t rows, Function call) {
    if (rows > 2) call(std::integral_constant<int, 4>());
    else if (rows == 2) call(std::integral_constant<int, 2>());
    else call(std::integral_constant<int, 1>());
}

// Scores of one row -> masked; returns the largest.
float finish_scores(const Attention& a, int64_t b, int64_t h, int64_t r, int64_t from, int64_t count,
                    const float* scales, float* scores) {
    const int64_t head = h * a.group() + r / a.tokens, token = r % a.tokens;
    const int64_t seen = a.causal ? a.length - a.tokens + token + 1 - from : count;
    const int64_t at = b * a.mask_batch + head * a.mask_head + token * a.mask_token + from;
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    __m512 top = nothing;
    for (int64_t s = 0; s < count; s += 16) {
        const __mmask16 inside = left(s, count);
        __mmask16 attends = seen > s ? left(s, std::min(seen, count)) : 0;
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + s), _mm512_loadu_ps(scales + s));
        if (a.mask != nullptr && a.mask_bool) {
            const __m128i bytes = _mm_maskz_loadu_epi8(inside, static_cast<const uint8_t*>(a.mask) + at + s);
            attends &= _mm_test_epi8_mask(bytes, bytes);
        } else if (a.mask != nullptr) {
            x = _mm512_add_ps(x, load(a.mask, true, at + s, inside));
        }
        x = _mm512_mask_mov_ps(nothing, attends, x);
        _mm512_storeu_ps(scores + s, x);
        top = _mm512_max_ps(top, x);
    }
    return _mm512_reduce_max_ps(top);
}

// Up to four query rows of one head over keys [from, to): out [rows][width] not yet divided by `total`.
void attend(const Attention& a, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t from,
            int64_t to, const float* q, float* out, float* top, float* total, float* scratch) {
    float* scores = scratch;                               // [kRows][kBlock + 16]
    float* weights = scores + kRows * (kBlock + 16);       // [kBlock + 16][kRows]
    float* scales = weights + kRows * (kBlock + 16);       // [2][kBlock + 16], keys' and values'
    for (int r = 0; r < kRows; ++r) {
        top[r] = -INFINITY;
        total[r] = 0;
        std::fill(out + r * a.width(), out + (r + 1) * a.width(), 0.0f);
    }
    std::fill(weights, weights + kRows * (kBlock + 16), 0.0f);
    for (int64_t start = from; start < to; start += kBlock) {
        const int64_t count = std::min(kBlock, to - start);
        const uint8_t *keys = a.key.at(b, h, start), *values = a.value.at(b, h, start);
        with_rows(rows, [&](auto n) { score<n.value>(a, keys, count, q, scores); });
        for (int64_t s = 0; s < count; ++s) {
            scales[s] = a.key.scale(a.key.scale_at(b, h, start + s));
            scales[kBlock + 16 + s] = a.value.scale(a.value.scale_at(b, h, start + s));
        }
        float keep[kRows] = {1, 1, 1, 1};
        for (int64_t r = 0; r < rows; ++r) {
            float* row = scores + r * (kBlock + 16);
            const float found = finish_scores(a, b, h, first + r, start, count, scales, row);
            const float largest = std::max(top[r], found);
            // A row that has seen no key yet: its weights must be zeros, not NaN.
            const __m512 shift = _mm512_set1_ps(largest == -INFINITY ? 0.0f : largest);
            keep[r] = top[r] == -INFINITY ? 0.0f : std::exp(top[r] - largest);
            top[r] = largest;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t s = 0; s < count; s += 16) {
                __m512 p = exponential(_mm512_sub_ps(_mm512_loadu_ps(row + s), shift));
                p = _mm512_maskz_mov_ps(left(s, count), p);
                sum = _mm512_add_ps(sum, p);
                p = _mm512_mul_ps(p, _mm512_loadu_ps(scales + kBlock + 16 + s));
                const __m512i places = _mm512_mullo_epi32(
                    _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                    _mm512_set1_epi32(kRows));
                _mm512_mask_i32scatter_ps(weights + s * kRows + r, left(s, count), places, p, 4);
            }
            total[r] = total[r] * keep[r] + _mm512_reduce_add_ps(sum);
        }
        with_rows(rows, [&](auto n) { accumulate<n.value>(a, values, count, weights, keep, out); });
    }
}

struct Partial {
    float top[kRows], total[kRows];
};

// The parts' outputs of up to four rows -> the attention's.
void combine(const Attention& a, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t parts,
             const Partial* partial, const float* outs) {
    for (int64_t r = 0; r < rows; ++r) {
        float top = -INFINITY, total = 0;
        for (int64_t p = 0; p < parts; ++p) top = std::max(top, partial[p].top[r]);
        for (int64_t p = 0; p < parts; ++p)
            if (partial[p].top[r] > -INFINITY) total += partial[p].total[r] * std::exp(partial[p].top[r] - top);
        const int64_t head = h * a.group() + (first + r) / a.tokens, token = (first + r) % a.tokens;
        const int64_t at = ((b * a.heads + head) * a.tokens + token) * a.dim, half = a.dim / 2;
        for (int side = 0; side < 2; ++side)
            for (int64_t k = 0; k < half; k += 16) {
                __m512 sum = _mm512_setzero_ps();
                for (int64_t p = 0; p < parts; ++p) {
                    if (partial[p].top[r] == -INFINITY) continue;
                    const float factor = std::exp(partial[p].top[r] - top) / total;
                    const float* out = outs + (p * kRows + r) * a.width() + side * a.padded() + k;
                    sum = _mm512_fmadd_ps(_mm512_loadu_ps(out), _mm512_set1_ps(factor), sum);
                }
                store(a.out, a.is_float, at + side * half + k, left(k, half), sum);
            }
    }
}

int64_t parts_for(const Attention& a, int64_t tasks, int threads) {
    const int64_t most = std::max<int64_t>(1, a.length / kLeast);
    return tasks >= threads ? 1 : std::min<int64_t>(most, (threads + tasks - 1) / tasks);
}

}  // namespace

// Strides: query {B, H, T} in elements; key and value {B, H, S, first scale, next scale} in bytes; mask
// {B, H, T} in elements.
// Returns 0, or 1 where memory is missing.
extern "C" int quantkit_kv4_attention(const void* query, int is_float, const int64_t* query_strides,
                                      const uint8_t* key, const int64_t* key_strides,
                                      const uint8_t* value, const int64_t* value_strides, int float8,
                                      const float* post_scale, int quantize_query, const void* mask,
                                      int mask_bool, const int64_t* mask_strides, float scaling,
                                      int causal, void* out, const int64_t* sizes, int threads) {
    const Attention a{query, is_float != 0, query_strides[0], query_strides[1], query_strides[2],
                      Vectors(key, key_strides, float8 != 0), Vectors(value, value_strides, float8 != 0), post_scale,
                      quantize_query != 0, mask, mask_bool != 0, mask_strides[0], mask_strides[1],
                      mask_strides[2], scaling, causal != 0, out, sizes[0], sizes[1], sizes[2],
                      sizes[3], sizes[4], sizes[5]};
    const int64_t groups = (a.rows() + kRows - 1) / kRows;
    const int64_t tasks = a.batches * a.kv_heads * groups;
    const int64_t parts = parts_for(a, tasks, threads);
    const int64_t each = ((a.length + parts - 1) / parts + 15) / 16 * 16;
    const int64_t width = kRows * a.width();
    float* outs = static_cast<float*>(std::malloc(tasks * parts * width * sizeof(float)));
    Partial* partial = static_cast<Partial*>(std::malloc(tasks * parts * sizeof(Partial)));
    int failed = outs == nullptr || partial == nullptr;
    if (a.length * tasks * kRows < 4 * kLeast) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        float* scratch = static_cast<float*>(std::malloc((width + (2 * kRows + 2) * (kBlock + 16)) * sizeof(float)));
        failed |= scratch == nullptr;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks * parts; ++task) {
            if (failed) continue;
            const int64_t whole = task / parts, part = task % parts;
            const int64_t first = whole % groups * kRows, rows = std::min<int64_t>(kRows, a.rows() - first);
            const int64_t h = whole / groups % a.kv_heads, b = whole / groups / a.kv_heads;
            for (int64_t r = 0; r < kRows; ++r)  // three rows run as four, the last twice
                prepare_query(a, b, h, first + std::min(r, rows - 1), scratch + r * a.width());
            attend(a, b, h, first, rows, std::min(part * each, a.length), std::min((part + 1) * each, a.length),
                   scratch, outs + task * width, partial[task].top, partial[task].total, scratch + width);
        }
#pragma omp for schedule(static)
        for (int64_t whole = 0; whole < tasks; ++whole) {
            if (failed) continue;
            const int64_t first = whole % groups * kRows, rows = std::min<int64_t>(kRows, a.rows() - first);
            combine(a, whole / groups / a.kv_heads, whole / groups % a.kv_heads, first, rows, parts,
                    partial + whole * parts, outs + whole * parts * width);
        }
        std::free(scratch);
    }
    std::free(outs);
    std::free(partial);
    return failed;
}

// Queries as `quantkit_kv4_attention` reads them (without the scores' factor) -> [B, Hq, T, D] in their type.
extern "C" void quantkit_kv4_query(const void* query, int is_float, const int64_t* strides,
                                   const float* post_scale, int quantize, void* out,
                                   const int64_t* sizes, int threads) {
    Attention a{};
    a.query = query;
    a.is_float = is_float != 0;
    a.query_batch = strides[0], a.query_head = strides[1], a.query_token = strides[2];
    a.post_scale = post_scale;
    a.quantize_query = quantize != 0;
    a.scaling = 1.0f;
    a.batches = sizes[0], a.heads = sizes[1], a.kv_heads = sizes[2], a.tokens = sizes[3], a.dim = sizes[5];
    const int64_t half = a.dim / 2, count = a.batches * a.kv_heads * a.rows();
    if (count * a.dim < (1 << 14)) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) {
        float q[2 * kWidest];
        const int64_t r = i % a.rows(), h = i / a.rows() % a.kv_heads, b = i / a.rows() / a.kv_heads;
        prepare_query(a, b, h, r, q);
        for (int64_t k = 0; k < half; k += 16) {
            store(out, a.is_float, i * a.dim + k, left(k, half), _mm512_loadu_ps(q + k));
            store(out, a.is_float, i * a.dim + half + k, left(k, half), _mm512_loadu_ps(q + a.padded() + k));
        }
    }
}
