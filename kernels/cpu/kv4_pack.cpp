// INT4 keys and values on the CPU: packing, RoPE and packing in one pass, and expanding.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kv4.hpp"

namespace {

// values [D] times factors (or null) -> D / 2 bytes and the scale; values are changed.
void pack_vector(float* values, int64_t dim, const float* factors, bool float8, uint8_t* vector,
                 uint8_t* stored_scale) {
    const int64_t half = dim / 2;
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int64_t k = 0; k < dim; k += 16) {
        const __mmask16 mask = left(k, dim);
        __m512 value = _mm512_maskz_loadu_ps(mask, values + k);
        if (factors != nullptr) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, factors + k));
        _mm512_mask_storeu_ps(values + k, mask, value);
        nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        low = _mm512_min_ps(low, value);
        high = _mm512_max_ps(high, value);
    }
    // The element of the largest magnitude gets the code -8: the scale has the other sign.
    const float lowest = _mm512_reduce_min_ps(low), highest = _mm512_reduce_max_ps(high);
    const bool positive = highest > -lowest;
    const float largest = std::fabs(positive ? highest : lowest) / 8.0f;
    const auto with_sign = [&](__m512 magnitude) {
        return positive ? _mm512_sub_ps(_mm512_setzero_ps(), magnitude) : magnitude;
    };
    __m512 scale = nan ? _mm512_set1_ps(NAN) : with_sign(_mm512_set1_ps(largest));
    if (float8) {
        const float stored = std::clamp(largest, 0x1p-9f, 448.0f);
        const __m512i code = to_float8(nan ? scale : with_sign(_mm512_set1_ps(stored)));
        *stored_scale = static_cast<uint8_t>(_mm512_cvtsi512_si32(code));
        scale = from_float8(code);
    } else {
        scale = round_to(scale, false);
        const uint32_t bits = _mm512_cvtsi512_si32(_mm512_castps_si512(scale));
        const uint16_t stored = static_cast<uint16_t>(bits >> 16);
        std::memcpy(stored_scale, &stored, 2);
    }
    const __m512 divisor = std::fabs(_mm512_cvtss_f32(scale)) > 0 ? scale : _mm512_set1_ps(1.0f);
    const auto encode = [&](int64_t k, __mmask16 mask) {
        __m512 code = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, values + k), divisor);
        code = _mm512_roundscale_ps(code, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        code = _mm512_min_ps(_mm512_max_ps(code, _mm512_set1_ps(-8.0f)), _mm512_set1_ps(7.0f));
        return _mm512_add_epi32(_mm512_cvtps_epi32(code), _mm512_set1_epi32(8));
    };
    for (int64_t k = 0; k < half; k += 16) {
        const __mmask16 mask = left(k, half);
        const __m512i pair = _mm512_or_si512(encode(k, mask), _mm512_slli_epi32(encode(half + k, mask), 4));
        _mm_mask_storeu_epi8(vector + k, mask, _mm512_cvtepi32_epi8(pair));
    }
}

// RoPE: pairs (i, i + turned / 2), each product and sum rounded to the type that all tensors have.
void rotate(const void* x, bool is_float, int64_t start, const void* cos, int64_t cos_start,
            const void* sin, int64_t sin_start, int64_t dim, int64_t turned, float* out) {
    const int64_t half = turned / 2;
    for (int side = 0; side < 2; ++side)
        for (int64_t k = 0; k < half; k += 16) {
            const __mmask16 mask = left(k, half);
            const int64_t here = side * half + k, there = (1 - side) * half + k;
            const __m512 c = load(cos, is_float, cos_start + here, mask);
            const __m512 s = load(sin, is_float, sin_start + here, mask);
            const __m512 first = _mm512_mul_ps(load(x, is_float, start + here, mask), c);
            const __m512 second = _mm512_mul_ps(load(x, is_float, start + there, mask), s);
            const __m512 a = round_to(first, is_float), b = round_to(second, is_float);
            const __m512 sum = side == 0 ? _mm512_sub_ps(a, b) : _mm512_add_ps(a, b);
            _mm512_mask_storeu_ps(out + here, mask, round_to(sum, is_float));
        }
    for (int64_t k = turned; k < dim; k += 16) {
        const __mmask16 mask = left(k, dim);
        _mm512_mask_storeu_ps(out + k, mask, load(x, is_float, start + k, mask));
    }
}

}  // namespace

// x [A, B, C, D] with strides {A, B, C} in elements, times factor [B, D] (or null) -> vectors of D / 2
// bytes and a scale, without gaps.
extern "C" void quantkit_kv4_quantize(const void* x, int is_float, const int64_t* strides,
                                      const int64_t* sizes, const float* factor, int float8,
                                      uint8_t* out, int threads) {
    const int64_t dim = sizes[3], token = dim / 2 + (float8 ? 1 : 2);
    const int64_t count = sizes[0] * sizes[1] * sizes[2];
    if (count * dim < (1 << 14)) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) {
        float values[2 * kWidest];
        const int64_t c = i % sizes[2], b = i / sizes[2] % sizes[1], a = i / sizes[2] / sizes[1];
        const int64_t start = a * strides[0] + b * strides[1] + c * strides[2];
        for (int64_t k = 0; k < dim; k += 16)
            _mm512_storeu_ps(values + k, load(x, is_float != 0, start + k, left(k, dim)));
        uint8_t* vector = out + i * token;
        pack_vector(values, dim, factor == nullptr ? nullptr : factor + b * dim, float8 != 0, vector, vector + dim / 2);
    }
}

// RoPE of query [B, Hq, T, D] into out, of key [B, Hkv, T, D], whose packed vectors then go to the
// caches' slots `positions` [T] as those of value do. cos and sin are [B or 1, T, R]. Strides: of
// query, key, value {B, H, T}, of cos and sin {B, T}, in elements; of the caches as attention has them.
// sizes: B, Hq, Hkv, T, D, R.
extern "C" void quantkit_kv4_append(const void* query, const void* key, const void* value,
                                    const void* cos, const void* sin, int is_float,
                                    const int64_t* strides, uint8_t* key_cache, uint8_t* value_cache,
                                    const int64_t* positions, const float* factor, int float8,
                                    void* out, const int64_t* sizes, int threads) {
    const int64_t heads = sizes[1], kv_heads = sizes[2], tokens = sizes[3], dim = sizes[4], turned = sizes[5];
    const int64_t *qs = strides, *ks = strides + 3, *vs = strides + 6, *cs = strides + 9, *ss = strides + 11;
    const Vectors keys_cache(key_cache, strides + 13, float8 != 0), values_cache(value_cache, strides + 18, float8 != 0);
    const int64_t all = heads + 2 * kv_heads, count = sizes[0] * tokens * all;
    if (count * dim < (1 << 14)) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) {
        float values[2 * kWidest];
        const int64_t t = i % tokens, b = i / tokens / all, j = i / tokens % all;
        const int64_t h = j < heads ? j : (j - heads) % kv_heads;
        if (j >= heads + kv_heads) {
            const int64_t start = b * vs[0] + h * vs[1] + t * vs[2];
            for (int64_t k = 0; k < dim; k += 16)
                _mm512_storeu_ps(values + k, load(value, is_float != 0, start + k, left(k, dim)));
            pack_vector(values, dim, nullptr, float8 != 0, values_cache.at(b, h, positions[t]),
                        values_cache.scale_at(b, h, positions[t]));
            continue;
        }
        const int64_t* at = j < heads ? qs : ks;
        rotate(j < heads ? query : key, is_float != 0, b * at[0] + h * at[1] + t * at[2], cos,
               b * cs[0] + t * cs[1], sin, b * ss[0] + t * ss[1], dim, turned, values);
        if (j < heads) {
            const int64_t place = ((b * heads + h) * tokens + t) * dim;
            for (int64_t k = 0; k < dim; k += 16)
                store(out, is_float != 0, place + k, left(k, dim), _mm512_loadu_ps(values + k));
        } else {
            pack_vector(values, dim, factor == nullptr ? nullptr : factor + h * dim, float8 != 0,
                        keys_cache.at(b, h, positions[t]), keys_cache.scale_at(b, h, positions[t]));
        }
    }
}

// Vectors [A, B, C], strides as attention has them -> contiguous bf16 or float32 [A, B, C, D].
extern "C" void quantkit_kv4_dequantize(const uint8_t* packed, const int64_t* strides,
                                        const int64_t* sizes, int float8, void* out, int is_float,
                                        int threads) {
    const int64_t dim = sizes[3], half = dim / 2, count = sizes[0] * sizes[1] * sizes[2];
    const Vectors vectors(packed, strides, float8 != 0);
    if (count * dim < (1 << 14)) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) {
        const int64_t s = i % sizes[2], h = i / sizes[2] % sizes[1], b = i / sizes[2] / sizes[1];
        const uint8_t* vector = vectors.at(b, h, s);
        const __m512 scale = _mm512_set1_ps(vectors.scale(vectors.scale_at(b, h, s))), table = code_table();
        for (int64_t k = 0; k < half; k += 16) {
            const __mmask16 mask = left(k, half);
            __m512 low, high;
            expand(vector + k, mask, table, low, high);
            store(out, is_float != 0, i * dim + k, mask, _mm512_mul_ps(low, scale));
            store(out, is_float != 0, i * dim + half + k, mask, _mm512_mul_ps(high, scale));
        }
    }
}
