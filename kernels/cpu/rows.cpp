// Rows of activations -> FP8 or integer codes and one scale per row, in two passes of which the second
// reads the cache; alone, after an RMS norm, after a SiLU gate. The arithmetic is float32, step by step
// that of the references (quantize_fp8, quantize_int8, quantize_half, rmsnorm_quantize,
// silu_mul_quantize), except that mean squares are summed in float64.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

#include "rows.hpp"
#include "vectors.hpp"

namespace {

// Largest magnitude; NaN where there is one in the row.
inline float largest(const Rows& rows, int64_t start) {
    __m512 top = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int64_t k = 0; k < rows.k; k += 16) {
        const __m512 x = load(rows.x, rows.is_float, start + k, left(k, rows.k));
        nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        top = _mm512_max_ps(top, _mm512_abs_ps(x));
    }
    return nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(top);
}

inline float mean_square(const Rows& rows, int64_t start) {
    __m512d low = _mm512_setzero_pd(), high = low;
    for (int64_t k = 0; k < rows.k; k += 16) {
        const __m512 x = load(rows.x, rows.is_float, start + k, left(k, rows.k));
        const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
        const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
        low = _mm512_fmadd_pd(a, a, low);
        high = _mm512_fmadd_pd(b, b, high);
    }
    const double sum = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
    return static_cast<float>(sum / static_cast<double>(rows.k));
}

}  // namespace

void quantkit_quantize_row(const Rows& rows, int64_t row) {
    const int64_t start = row * rows.stride;
    const bool half = rows.form == kHalfInteger;
    const float scale = half ? std::sqrt(mean_square(rows, start)) * rows.factor
                             : largest(rows, start) / rows.factor;
    rows.scale[row] = scale;
    const __m512 divisor = _mm512_set1_ps(scale > 0 ? scale : 1.0f);
    const __m512 low = _mm512_set1_ps(rows.low), high = _mm512_set1_ps(rows.high);
    uint8_t* codes = static_cast<uint8_t*>(rows.codes) + row * rows.k;
    for (int64_t k = 0; k < rows.k; k += 16) {
        const __mmask16 mask = left(k, rows.k);
        __m512 y = _mm512_div_ps(load(rows.x, rows.is_float, start + k, mask), divisor);
        __m128i code;
        if (rows.form == kFloat8) {
            // min and max give their second operand where the first is NaN: NaN stays.
            code = _mm512_cvtepi32_epi8(to_float8(_mm512_max_ps(low, _mm512_min_ps(high, y))));
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

namespace {

// y = weight * (x / rms(x)), with x = x + residual first where there is one: into `hidden`, by rows.
void norm_row(const Rows& x, int64_t row, const void* residual, int64_t residual_stride,
              const void* weight, float eps, void* hidden, void* y) {
    const bool is_float = x.is_float;
    Rows source = x;
    int64_t start = row * x.stride;
    if (residual != nullptr) {
        for (int64_t k = 0; k < x.k; k += 16) {
            const __mmask16 mask = left(k, x.k);
            const __m512 other = load(residual, is_float, row * residual_stride + k, mask);
            const __m512 sum = _mm512_add_ps(load(x.x, is_float, start + k, mask), other);
            store(hidden, is_float, row * x.k + k, mask, sum);
        }
        source.x = hidden;
        start = row * x.k;
    }
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean_square(source, start) + eps));
    for (int64_t k = 0; k < x.k; k += 16) {
        const __mmask16 mask = left(k, x.k);
        __m512 value = _mm512_mul_ps(load(source.x, is_float, start + k, mask), factor);
        value = _mm512_mul_ps(load(weight, is_float, k, mask), round_to(value, is_float));
        store(y, is_float, row * x.k + k, mask, value);
    }
}

// y = silu(x[:K]) * x[K:2K], each step rounded to x's type.
void gate_row(const Rows& x, int64_t row, void* y) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t k = 0; k < x.k; k += 16) {
        const __mmask16 mask = left(k, x.k);
        const __m512 gate = load(x.x, x.is_float, row * x.stride + k, mask);
        const __m512 up = load(x.x, x.is_float, row * x.stride + x.k + k, mask);
        const __m512 bottom = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
        const __m512 silu = round_to(_mm512_div_ps(gate, bottom), x.is_float);
        store(y, x.is_float, k, mask, _mm512_mul_ps(silu, up));
    }
}

}  // namespace

// x [M, K], rows `stride` elements apart, bf16 or float32 -> codes [M, K] (one byte each), scale [M].
extern "C" void quantkit_quantize_rows(const void* x, int is_float, int64_t stride, int64_t m,
                                       int64_t k, int form, float low, float high, float factor,
                                       void* codes, float* scale, int threads) {
    const Rows rows{x, is_float != 0, stride, m, k, form, low, high, factor, codes, scale};
    threads = useful_threads(threads, m, k);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < m; ++row) quantkit_quantize_row(rows, row);
}

// The same for weight [K] * x / rms(x), which goes to y [M, K]; with residual (or null), x + residual
// comes before it, and goes to hidden [M, K].
extern "C" void quantkit_norm_quantize(const void* x, int is_float, int64_t stride, int64_t m,
                                       int64_t k, const void* residual, int64_t residual_stride,
                                       const void* weight, float eps, int form, float low, float high,
                                       float factor, void* hidden, void* y, void* codes, float* scale,
                                       int threads) {
    const Rows before{x, is_float != 0, stride, m, k, form, low, high, factor, codes, scale};
    Rows after = before;
    after.x = y;
    after.stride = k;
    threads = useful_threads(threads, m, k);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < m; ++row) {
        norm_row(before, row, residual, residual_stride, weight, eps, hidden, y);
        quantkit_quantize_row(after, row);
    }
}

// The same for silu(x[:, :K]) * x[:, K:2K]. Returns 0, or 1 where memory is missing.
extern "C" int quantkit_gate_quantize(const void* x, int is_float, int64_t stride, int64_t m, int64_t k,
                                      int form, float low, float high, float factor, void* codes,
                                      float* scale, int threads) {
    const Rows before{x, is_float != 0, stride, m, k, form, low, high, factor, codes, scale};
    threads = useful_threads(threads, m, k);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        void* y = std::malloc(static_cast<size_t>(k + 16) * 4);
        failed = y == nullptr;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; ++row) {
            if (failed) continue;
            gate_row(before, row, y);
            Rows after = before;
            after.x = y;
            after.stride = 0;
            quantkit_quantize_row(after, row);
        }
        std::free(y);
    }
    return failed;
}
