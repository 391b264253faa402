// What the two products of INT8 weights and activations share: with AMX, and with AVX-512-VNNI.

#pragma once

#include <immintrin.h>

#include <cstdint>

struct Int8Problem {
    const int8_t* x;  // [M, K]
    int64_t stride;   // of x's rows
    const int8_t* weight;    // [N, K]
    const float* scale;      // [N]
    const float* row_scale;  // [M]
    const float* bias;       // [N] or null
    void* out;               // [M, N] bf16 or float32
    bool out_float;
    int64_t m, n, k;
};

// False: memory ran out.
bool int8_vnni(const Int8Problem& problem, int threads);

namespace {

// 16 sums of a row of x, scaled and written.
inline void write_sums(const Int8Problem& p, __m512 sums, __m512 scale, int64_t row, int64_t output) {
    __m512 y = _mm512_mul_ps(_mm512_mul_ps(sums, _mm512_set1_ps(p.row_scale[row])), scale);
    if (p.bias) y = _mm512_add_ps(y, _mm512_loadu_ps(p.bias + output));
    const int64_t at = row * p.n + output;
    if (p.out_float) {
        _mm512_storeu_ps(static_cast<float*>(p.out) + at, y);
    } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p.out) + at),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
    }
}

// 16 rows of 16 32-bit words -> its transpose.
inline void turn(__m512i a[16]) {
    __m512i b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
}

}  // namespace
