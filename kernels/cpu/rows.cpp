// Rows of activations -> FP8 or integer codes and one scale per row, in two passes of which the second
// reads the cache. The arithmetic is float32, step by step that of the references (quantize_fp8,
// quantize_int8, quantize_half), except that the half-integer grid's mean square is summed in float64.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace {

constexpr int64_t kParallel = 1 << 15;  // elements below which a second thread costs more than it gives

enum Form : int { kFloat8 = 0, kInteger = 1, kHalfInteger = 2 };

struct Rows {
    const void* x;
    bool is_float;  // else bf16
    int64_t stride, m, k;
    int form;
    float low, high;   // the codes' range; for FP8 448 is the largest value
    float factor;      // half-integer grid: step = rms * factor
    void* codes;
    float* scale;
};

inline __mmask16 left(int64_t k, int64_t end) {
    return end - k >= 16 ? 0xffff : static_cast<__mmask16>((1u << (end - k)) - 1);
}

inline __m512 load(const Rows& rows, int64_t at, __mmask16 mask) {
    if (rows.is_float) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(rows.x) + at);
    __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(rows.x) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Largest magnitude; NaN where there is one in the row.
inline float largest(const Rows& rows, int64_t start) {
    __m512 top = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int64_t k = 0; k < rows.k; k += 16) {
        const __m512 x = load(rows, start + k, left(k, rows.k));
        nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        top = _mm512_max_ps(top, _mm512_abs_ps(x));
    }
    return nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(top);
}

inline float root_mean_square(const Rows& rows, int64_t start) {
    __m512d low = _mm512_setzero_pd(), high = low;
    for (int64_t k = 0; k < rows.k; k += 16) {
        const __m512 x = load(rows, start + k, left(k, rows.k));
        const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
        const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
        low = _mm512_fmadd_pd(a, a, low);
        high = _mm512_fmadd_pd(b, b, high);
    }
    const double sum = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
    return std::sqrt(static_cast<float>(sum / static_cast<double>(rows.k)));
}

// float32 in [-448, 448] -> e4m3fn bits, round half to even.
inline __m128i to_float8(__m512 x) {
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
    return _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign));
}

void quantize_row(const Rows& rows, int64_t row) {
    const int64_t start = row * rows.stride;
    const bool half = rows.form == kHalfInteger;
    const float scale = half ? root_mean_square(rows, start) * rows.factor
                             : largest(rows, start) / rows.high;
    rows.scale[row] = scale;
    const __m512 divisor = _mm512_set1_ps(scale > 0 ? scale : 1.0f);
    const __m512 low = _mm512_set1_ps(rows.low), high = _mm512_set1_ps(rows.high);
    uint8_t* codes = static_cast<uint8_t*>(rows.codes) + row * rows.k;
    for (int64_t k = 0; k < rows.k; k += 16) {
        const __mmask16 mask = left(k, rows.k);
        __m512 y = _mm512_div_ps(load(rows, start + k, mask), divisor);
        __m128i code;
        if (rows.form == kFloat8) {
            // min and max give their second operand where the first is NaN: NaN stays.
            code = to_float8(_mm512_max_ps(low, _mm512_min_ps(high, y)));
        } else {
            constexpr int kEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
            y = half ? _mm512_roundscale_ps(y, kDown) : _mm512_roundscale_ps(y, kEven);
            y = _mm512_min_ps(_mm512_max_ps(y, low), high);
            code = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(y));
        }
        _mm_mask_storeu_epi8(codes + k, mask, code);
    }
}

}  // namespace

// x [M, K], rows `stride` elements apart, bf16 or float32 -> codes [M, K] (one byte each), scale [M].
extern "C" void quantkit_quantize_rows(const void* x, int is_float, int64_t stride, int64_t m,
                                       int64_t k, int form, float low, float high, float factor,
                                       void* codes, float* scale, int threads) {
    const Rows rows{x, is_float != 0, stride, m, k, form, low, high, factor, codes, scale};
    if (m < 2 || m * k < kParallel) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < m; ++row) quantize_row(rows, row);
}
