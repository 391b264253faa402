// Products of bf16 numbers, two at a time, added up in float32: a tile of sums in registers.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "unroll.hpp"

namespace {

constexpr int64_t kLanes = 16;  // columns of a packed block

// finish(r, q, sums): of `rows` rows and `count` blocks of 16 columns, over `length` pairs. Row r's pairs lie at
// a[r * row + p * pair], block q's at b[q * block + p * 16].
template <int rows, int count, typename Finish>
QUANTKIT_INLINE inline void bf16_tile(const uint32_t* a, int64_t row, int64_t pair, const uint32_t* b, int64_t block,
                                      int64_t length, const Finish& finish) {
    __m512 sums[rows][count];
    pairs<rows, count>([&](auto r, auto q) QUANTKIT_INLINE { sums[r][q] = _mm512_setzero_ps(); });
    for (int64_t p = 0; p < length; ++p) {
        __m512bh columns[count];
        each<count>([&](auto q) QUANTKIT_INLINE {
            columns[q] = (__m512bh)_mm512_loadu_si512(b + q * block + p * kLanes);
        });
        each<rows>([&](auto r) QUANTKIT_INLINE {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * row + p * pair]));
            each<count>([&](auto q) QUANTKIT_INLINE { sums[r][q] = _mm512_dpbf16_ps(sums[r][q], left, columns[q]); });
        });
    }
    pairs<rows, count>([&](auto r, auto q) QUANTKIT_INLINE { finish(r, q, sums[r][q]); });
}

// Two rows of 16 numbers each, bf16 -> pairs of them.
inline __m512i pair_up(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

}  // namespace
