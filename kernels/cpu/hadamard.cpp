// The block-diagonal Hadamard rotation of rows, alone and with their quantization: sums and differences
// in float32, log2(block) times over a row that stays in the L1 or L2 cache.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "rows.hpp"
#include "vectors.hpp"

namespace {

// Pairs of lanes whose numbers differ in one bit: the lower gets the sum, the upper the difference.
inline __m512 across(__m512 x, __m512 other, __mmask16 upper) {
    return _mm512_mask_sub_ps(_mm512_add_ps(x, other), upper, other, x);
}

inline __m512 inside_vector(__m512 x, int64_t block) {
    if (block > 1) x = across(x, _mm512_permute_ps(x, 0xb1), 0xaaaa);
    if (block > 2) x = across(x, _mm512_permute_ps(x, 0x4e), 0xcccc);
    if (block > 4) x = across(x, _mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);
    if (block > 8) x = across(x, _mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
    return x;
}

// row [K] -> out [K in whole registers], rotated in blocks of a power of two.
void rotate(const void* x, bool is_float, int64_t start, int64_t k, int64_t block, float* out) {
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(static_cast<float>(block)));
    for (int64_t i = 0; i < k; i += 16) {
        const __m512 value = _mm512_mul_ps(load(x, is_float, start + i, left(i, k)), factor);
        _mm512_storeu_ps(out + i, inside_vector(value, block));
    }
    for (int64_t first = 0; first < k; first += block)
        for (int64_t half = 16; half < block; half *= 2)
            for (int64_t pair = first; pair < first + block; pair += 2 * half)
                for (int64_t i = pair; i < pair + half; i += 16) {
                    const __m512 a = _mm512_loadu_ps(out + i), b = _mm512_loadu_ps(out + i + half);
                    _mm512_storeu_ps(out + i, _mm512_add_ps(a, b));
                    _mm512_storeu_ps(out + i + half, _mm512_sub_ps(a, b));
                }
}

}  // namespace

// x [M, K], rows `stride` elements apart, bf16 or float32; block a power of two that divides K. Either the
// rotated rows go to out [M, K] in x's type, or (out null) their codes and scales as
// `quantkit_quantize_rows` gives them. Returns 0, or 1 where memory is missing.
extern "C" int quantkit_hadamard(const void* x, int is_float, int64_t stride, int64_t m, int64_t k,
                                 int64_t block, void* out, int form, float low, float high, float factor,
                                 void* codes, float* scale, int threads) {
    const Rows rows{nullptr, true, 0, m, k, form, low, high, factor, codes, scale};
    threads = useful_threads(threads, m, k);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        float* row = static_cast<float*>(std::malloc(static_cast<size_t>(k + 16) * sizeof(float)));
        failed = row == nullptr;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; ++i) {
            if (failed) continue;
            rotate(x, is_float != 0, i * stride, k, block, row);
            if (out == nullptr) {
                Rows rotated = rows;
                rotated.x = row;
                quantkit_quantize_row(rotated, i);
                continue;
            }
            for (int64_t j = 0; j < k; j += 16)
                store(out, is_float != 0, i * k + j, left(j, k), _mm512_loadu_ps(row + j));
        }
        std::free(row);
    }
    return failed;
}
