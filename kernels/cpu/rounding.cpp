// Offline: GPTQ's columns within a block, sixteen rows of the weight at a time; the search of clipping ratios; rounding
// to nearest; rounding with learned offsets, and its gradients.

#include <algorithm>
#include <cstdlib>

#include "rows.hpp"
#include "vectors.hpp"

namespace {

constexpr int64_t kLanes = 16;

struct Grid {
    float low, high;  // of the codes
    float shift;      // 1/2 on the half-integer grid
};

// A ratio on the next level, the range left out.
inline __m512 round_ratio(__m512 ratio, const Grid& grid) {
    return grid.shift != 0 ? _mm512_roundscale_ps(ratio, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)
                           : _mm512_roundscale_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// The nearest code; 0 where the scale is not positive, and for NaN.
inline __m512 nearest(__m512 x, __m512 scale, const Grid& grid) {
    const __mmask16 positive = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 divisor = _mm512_mask_mov_ps(_mm512_set1_ps(INFINITY), positive, scale);
    __m512 code = round_ratio(_mm512_div_ps(x, divisor), grid);
    const __mmask16 number = _mm512_cmp_ps_mask(code, code, _CMP_ORD_Q);
    code = _mm512_min_ps(_mm512_max_ps(code, _mm512_set1_ps(grid.low)), _mm512_set1_ps(grid.high));
    return _mm512_maskz_mov_ps(number, code);
}

inline __m512 value(__m512 code, __m512 scale, const Grid& grid) {
    return _mm512_mul_ps(_mm512_add_ps(code, _mm512_set1_ps(grid.shift)), scale);
}

// A block's columns for the rows [first, first + 16) of `mask`; its loss.
double gptq_lanes(float* work, const float* original, int64_t n, int64_t first, __mmask16 mask, const float* ratios,
                  int64_t stride, const float* scale, const int* groups, const double* pivots, const double* added,
                  int64_t block, const Grid& grid, int8_t* codes, float* errors, float* stands) {
    for (int64_t j = 0; j < block; ++j)
        _mm512_storeu_ps(stands + j * kLanes, _mm512_maskz_loadu_ps(mask, work + j * n + first));
    double loss = 0;
    for (int64_t j = 0; j < block; ++j) {
        const __m512 step = _mm512_maskz_loadu_ps(mask, scale + groups[j] * n + first);
        const __m512 target = _mm512_loadu_ps(stands + j * kLanes);
        const __m512 code = nearest(target, step, grid), level = value(code, step, grid);
        const __m512 error = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, original + j * n + first), level);
        const __m512 missed = _mm512_maskz_sub_ps(mask, target, level);
        loss += pivots[j] * _mm512_reduce_add_ps(_mm512_mul_ps(missed, missed));
        loss -= added[j] * _mm512_mask_reduce_add_ps(mask, _mm512_mul_ps(error, error));
        _mm_mask_storeu_epi8(codes + j * n + first, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code)));
        _mm512_mask_storeu_ps(errors + j * n + first, mask, error);
        _mm512_mask_storeu_ps(work + j * n + first, mask, target);
        const float* row = ratios + j * stride;
        for (int64_t i = j + 1; i < block; ++i) {
            float* later = stands + i * kLanes;
            _mm512_storeu_ps(later, _mm512_fmadd_ps(_mm512_set1_ps(row[i]), error, _mm512_loadu_ps(later)));
        }
    }
    return loss;
}

// The nearest codes of one group of `size` numbers; adds its squared errors and squares.
void round_group(const float* x, int64_t size, float scale, const Grid& grid, int8_t* codes, double* lost,
                 double* total) {
    const __m512 step = _mm512_set1_ps(scale);
    __m512 errors = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int64_t k = 0; k < size; k += kLanes) {
        const __mmask16 mask = left(k, size);
        const __m512 number = _mm512_maskz_loadu_ps(mask, x + k), code = nearest(number, step, grid);
        const __m512 error = _mm512_maskz_sub_ps(mask, number, value(code, step, grid));
        errors = _mm512_fmadd_ps(error, error, errors);
        squares = _mm512_fmadd_ps(number, number, squares);
        _mm_mask_storeu_epi8(codes + k, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code)));
    }
    *lost += _mm512_reduce_add_ps(errors);
    *total += _mm512_reduce_add_ps(squares);
}

// The level of x / scale + offset, in units of the scale; `ratio` is x / scale, `inside` which lanes the range does not cut.
inline __m512 offset_level(__m512 x, __m512 scale, __m512 offset, const Grid& grid, __m512* ratio, __mmask16* inside) {
    *ratio = _mm512_div_ps(x, scale);
    const __m512 code = round_ratio(_mm512_add_ps(*ratio, offset), grid);
    // In this order NaN stays what it is.
    const __m512 cut = _mm512_min_ps(_mm512_set1_ps(grid.high), _mm512_max_ps(_mm512_set1_ps(grid.low), code));
    *inside = _mm512_cmp_ps_mask(code, cut, _CMP_EQ_OQ);
    return _mm512_add_ps(cut, _mm512_set1_ps(grid.shift));
}

// The gradients of one group of `size` numbers with respect to their offsets; returns that with respect to their scale.
float offset_gradients(const float* x, int64_t size, float scale, const float* offset, const float* gradient,
                       const Grid& grid, float* by_offset) {
    const __m512 step = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps(), ratio;
    for (int64_t k = 0; k < size; k += kLanes) {
        const __mmask16 mask = left(k, size);
        const __m512 given = _mm512_maskz_loadu_ps(mask, gradient + k);
        __mmask16 inside;
        const __m512 level = offset_level(_mm512_maskz_loadu_ps(mask, x + k), step,
                                          _mm512_maskz_loadu_ps(mask, offset + k), grid, &ratio, &inside);
        sum = _mm512_fmadd_ps(given, _mm512_mask_sub_ps(level, inside, level, ratio), sum);
        _mm512_mask_storeu_ps(by_offset + k, mask, _mm512_maskz_mul_ps(inside, given, step));
    }
    return _mm512_reduce_add_ps(sum);
}

// The scale with the least squared error of one group of `size` numbers.
float search(const float* x, int64_t size, const float* importance, float start, const float* ratios, int count,
             const Grid& grid) {
    float best = start, least = INFINITY;
    for (int r = 0; r < count; ++r) {
        const float scale = start * ratios[r];
        const __m512 step = _mm512_set1_ps(scale);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < size; k += kLanes) {
            const __mmask16 mask = left(k, size);
            const __m512 number = _mm512_maskz_loadu_ps(mask, x + k);
            const __m512 error = _mm512_maskz_sub_ps(mask, number, value(nearest(number, step, grid), step, grid));
            const __m512 weighed =
                importance ? _mm512_mul_ps(error, _mm512_maskz_loadu_ps(mask, importance + k)) : error;
            sum = _mm512_fmadd_ps(weighed, error, sum);
        }
        const float total = _mm512_reduce_add_ps(sum);
        if (total < least) {
            least = total;
            best = scale;
        }
    }
    return best;
}

}  // namespace

// work, original, errors float [block, n], codes int8 [block, n], scale float [groups, n]; ratios [block, stride];
// pivots, added double [block]. `work` becomes the targets. Gives 1 where there is no memory.
extern "C" int quantkit_gptq_block(float* work, const float* original, int64_t n, int64_t block, const float* ratios,
                                   int64_t stride, const float* scale, const int* groups, const double* pivots,
                                   const double* added, float low, float high, float shift, int8_t* codes,
                                   float* errors, double* loss, int threads) {
    const Grid grid{low, high, shift};
    const int64_t strips = (n + kLanes - 1) / kLanes;
    threads = useful_threads(threads, n, block * block);
    double total = 0;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : total) reduction(| : failed)
    {
        float* stands = static_cast<float*>(std::malloc(static_cast<size_t>(block) * kLanes * 4));
        failed = stands == nullptr;
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < strips; ++strip) {
            if (failed) continue;
            const int64_t first = strip * kLanes;
            total += gptq_lanes(work, original, n, first, left(first, n), ratios, stride, scale, groups, pivots,
                                added, block, grid, codes, errors, stands);
        }
        std::free(stands);
    }
    *loss = total;
    return failed;
}

// weight float [rows, groups * size], start float [rows, groups] (becomes the best), importance float
// [groups * size] or null, ratios float [count].
extern "C" void quantkit_scale_search(const float* weight, int64_t rows, int64_t groups, int64_t size,
                                      const float* importance, const float* ratios, int count, float low,
                                      float high, float shift, float* scale, int threads) {
    const Grid grid{low, high, shift};
    threads = useful_threads(threads, rows * groups, size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < rows * groups; ++at) {
        const float* other = importance ? importance + at % groups * size : nullptr;
        scale[at] = search(weight + at * size, size, other, scale[at], ratios, count, grid);
    }
}

// weight float [rows, groups * size], scale float [rows, groups], codes int8 as weight, sums double [rows, 2]: of the
// squared errors and of the squares.
extern "C" void quantkit_round(const float* weight, int64_t rows, int64_t groups, int64_t size, const float* scale,
                               float low, float high, float shift, int8_t* codes, double* sums, int threads) {
    const Grid grid{low, high, shift};
    threads = useful_threads(threads, rows, groups * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        double lost = 0, total = 0;
        for (int64_t group = row * groups; group < (row + 1) * groups; ++group)
            round_group(weight + group * size, size, scale[group], grid, codes + group * size, &lost, &total);
        sums[2 * row] = lost;
        sums[2 * row + 1] = total;
    }
}

// weight, offset, value float [rows, groups * size], scale float [rows, groups].
extern "C" void quantkit_round_with_offset(const float* weight, int64_t rows, int64_t groups, int64_t size,
                                           const float* scale, const float* offset, float low, float high,
                                           float shift, float* value, int threads) {
    const Grid grid{low, high, shift};
    threads = useful_threads(threads, rows, groups * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t group = 0; group < rows * groups; ++group) {
        const __m512 step = _mm512_set1_ps(scale[group]);
        for (int64_t k = 0; k < size; k += kLanes) {
            const __mmask16 mask = left(k, size);
            const int64_t at = group * size + k;
            __m512 ratio;
            __mmask16 inside;
            const __m512 level = offset_level(_mm512_maskz_loadu_ps(mask, weight + at), step,
                                              _mm512_maskz_loadu_ps(mask, offset + at), grid, &ratio, &inside);
            _mm512_mask_storeu_ps(value + at, mask, _mm512_mul_ps(level, step));
        }
    }
}

// The same with the gradient of `value`: by_offset as offset, by_scale as scale.
extern "C" void quantkit_round_with_offset_backward(const float* weight, int64_t rows, int64_t groups, int64_t size,
                                                    const float* scale, const float* offset, const float* gradient,
                                                    float low, float high, float shift, float* by_offset,
                                                    float* by_scale, int threads) {
    const Grid grid{low, high, shift};
    threads = useful_threads(threads, rows, groups * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t group = 0; group < rows * groups; ++group) {
        const int64_t at = group * size;
        by_scale[group] = offset_gradients(weight + at, size, scale[group], offset + at, gradient + at, grid,
                                           by_offset + at);
    }
}
