// Sixteen floats at a time: loads and stores of bf16 and float32, e4m3, exp.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

inline __mmask16 left(int64_t k, int64_t end) {
    return end - k >= 16 ? 0xffff : static_cast<__mmask16>((1u << (end - k)) - 1);
}

inline __m512 load(const void* x, bool is_float, int64_t at, __mmask16 mask) {
    if (is_float) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + at);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store(void* y, bool is_float, int64_t at, __mmask16 mask, __m512 value) {
    if (is_float) {
        _mm512_mask_storeu_ps(static_cast<float*>(y) + at, mask, value);
    } else {
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, mask, half);
    }
}

// float32 as it comes back from a tensor of the given type.
inline __m512 round_to(__m512 value, bool is_float) {
    if (is_float) return value;
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// float32 in [-448, 448] -> e4m3fn bits in 32-bit lanes, round half to even.
inline __m512i to_float8(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
    const __m512 magnitude = _mm512_abs_ps(x);
    const __m512i raw = _mm512_castps_si512(magnitude);
    // Normal: keep three bits of the mantissa; the exponent's bias goes from 127 to 7.
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(raw, 20), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(raw, _mm512_set1_epi32(0x7ffff)), odd);
    __m512i code = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32(120 << 3));
    // Below 2^-6: a multiple of 2^-9, which float32's own rounding finds.
    const __m512i small = _mm512_cvtps_epi32(_mm512_mul_ps(magnitude, _mm512_set1_ps(512.0f)));
    const __mmask16 tiny = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0.015625f), _CMP_LT_OQ);
    code = _mm512_mask_mov_epi32(code, tiny, small);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    code = _mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7f));
    return _mm512_or_si512(code, sign);
}

// e4m3fn bits in 32-bit lanes -> float32.
inline __m512 from_float8(__m512i code) {
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi32(0x7f));
    // Seven bits of exponent and mantissa at a float's place are the value times 2^-120.
    __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(magnitude, 20));
    value = _mm512_mul_ps(value, _mm512_set1_ps(0x1p120f));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
    value = _mm512_mask_mov_ps(value, nan, _mm512_set1_ps(NAN));
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
}

// e^x within two units in the last place; 0 below -87.3, infinity above 88.7, NaN for NaN.
inline __m512 exponential(__m512 x) {
    const __m512 log2e = _mm512_set1_ps(1.44269504088896341f);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // ln 2 in two parts: the first has few enough bits for n times it to be exact.
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    __m512 y = _mm512_scalef_ps(p, n);
    const __mmask16 low = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
    const __mmask16 high = _mm512_cmp_ps_mask(x, _mm512_set1_ps(88.72f), _CMP_GT_OQ);
    y = _mm512_mask_mov_ps(y, low, _mm512_setzero_ps());
    return _mm512_mask_mov_ps(y, high, _mm512_set1_ps(INFINITY));
}

}  // namespace
