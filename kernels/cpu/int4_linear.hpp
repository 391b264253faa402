// What the products of INT4 weights share: in bf16 (int4_linear.cpp) and in bytes (int4_vnni.cpp).

#pragma once

#include <immintrin.h>

#include <cstdint>

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
bool int4_vnni(const Int4Problem& problem, int threads);

namespace {

constexpr int64_t kBlock = 64;  // output rows of a block of the weight

inline __m512 load_scales(const Int4Problem& p, int64_t group, int64_t row) {
    // (scale, zero) pairs of bf16: the scale is the low half of each 32 bits.
    __m512i pairs = _mm512_loadu_si512(p.scales + (group * p.n + row) * 2);
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}

inline void write_row(const Int4Problem& p, int64_t row, int64_t column, const float* sums) {
    const __m512 factor = _mm512_set1_ps(p.row_scale ? p.row_scale[row] : 1.0f);
    for (int64_t j = 0; j < kBlock; j += 16) {
        __m512 y = _mm512_mul_ps(_mm512_loadu_ps(sums + j), factor);
        if (p.bias) y = _mm512_add_ps(y, _mm512_loadu_ps(p.bias + column + j));
        const int64_t at = row * p.n + column + j;
        if (p.out_float) {
            _mm512_storeu_ps(static_cast<float*>(p.out) + at, y);
        } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<bf16*>(p.out) + at),
                                reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
        }
    }
}

}  // namespace
