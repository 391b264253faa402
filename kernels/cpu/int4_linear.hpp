// What the products of INT4 weights share: in bf16 (int4_linear.cpp), in bytes (int4_vnni.cpp), by AMX (int4_tiles.cpp).

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

enum Kind : int { kBf16 = 0, kFloat8 = 1, kInt8 = 2, kInt8Half = 3 };

struct Int4Problem {
    const void* x;
    int64_t row_bytes;
    int kind;
    const uint8_t* weight;
    const bf16* scales;  // [G, N, 2]: scale and zero; only the scale is read
    bool half;
    const float* row_scale;  // [M] or null
    const float* bias;       // [N] or null
    void* out;
    bool out_float;
    int64_t m, n, k, group;
};

// False: memory ran out.
using Int4Linear = bool (*)(const Int4Problem& problem, int threads);

bool int4_vnni(const Int4Problem& problem, int threads);
Int4Linear int4_tiles(const Int4Problem& problem);  // null: not for such groups

namespace {

constexpr int64_t kBlock = 64;  // output rows of a block of the weight

inline bf16 to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN stays NaN
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The magnitudes of e4m3fn as bf16: exact.
struct Float8Table {
    bf16 values[128];
    Float8Table() {
        for (int code = 0; code < 128; ++code) {
            int exponent = (code >> 3) & 15, mantissa = code & 7;
            float value = exponent ? (1.0f + mantissa / 8.0f) : mantissa / 8.0f;
            for (int e = exponent ? exponent : 1; e > 7; --e) value *= 2;
            for (int e = exponent ? exponent : 1; e < 7; ++e) value /= 2;
            bool nan = exponent == 15 && mantissa == 7;
            values[code] = nan ? 0x7fc0 : to_bf16(value);
        }
    }
};
const Float8Table kFloat8Table;

// 32 e4m3fn codes -> bf16: the magnitude is one of 128, looked up 64 at a time.
inline __m512i float8_32(const uint8_t* codes) {
    const __m512i words =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const bf16* table = kFloat8Table.values;
    const __m512i small = _mm512_permutex2var_epi16(_mm512_loadu_si512(table), words,
                                                    _mm512_loadu_si512(table + 32));
    const __m512i large = _mm512_permutex2var_epi16(_mm512_loadu_si512(table + 64), words,
                                                    _mm512_loadu_si512(table + 96));
    const __mmask32 above = _mm512_test_epi16_mask(words, _mm512_set1_epi16(64));
    const __m512i magnitude = _mm512_mask_blend_epi16(above, small, large);
    const __m512i sign = _mm512_and_si512(words, _mm512_set1_epi16(128));
    return _mm512_or_si512(magnitude, _mm512_slli_epi16(sign, 8));
}

// 32 elements of a row as bf16.
inline __m512i elements32(const void* row, int64_t k, int kind) {
    if (kind == kBf16) return _mm512_loadu_si512(static_cast<const bf16*>(row) + k);
    if (kind == kFloat8) return float8_32(static_cast<const uint8_t*>(row) + k);
    const __m256i codes =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const int8_t*>(row) + k));
    const __m512 half = _mm512_set1_ps(kind == kInt8Half ? 0.5f : 0.0f);
    __m512 low = _mm512_add_ps(
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes))), half);
    __m512 high = _mm512_add_ps(
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1))), half);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

inline __m512 load_scales(const Int4Problem& p, int64_t group, int64_t row) {
    // (scale, zero) pairs of bf16: the scale is the low half of each 32 bits.
    __m512i pairs = _mm512_loadu_si512(p.scales + (group * p.n + row) * 2);
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}

// 64 outputs of a row of x.
inline void write_row(const Int4Problem& p, int64_t row, int64_t column, const __m512 sums[4]) {
    const __m512 factor = _mm512_set1_ps(p.row_scale ? p.row_scale[row] : 1.0f);
    for (int64_t j = 0; j < 4; ++j) {
        __m512 y = _mm512_mul_ps(sums[j], factor);
        if (p.bias) y = _mm512_add_ps(y, _mm512_loadu_ps(p.bias + column + 16 * j));
        const int64_t at = row * p.n + column + 16 * j;
        if (p.out_float) {
            _mm512_storeu_ps(static_cast<float*>(p.out) + at, y);
        } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<bf16*>(p.out) + at),
                                reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
        }
    }
}

inline void write_row(const Int4Problem& p, int64_t row, int64_t column, const float* sums) {
    const __m512 loaded[4] = {_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums + 32),
                              _mm512_loadu_ps(sums + 48)};
    write_row(p, row, column, loaded);
}

}  // namespace
