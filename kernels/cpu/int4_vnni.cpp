// INT4 weights times INT8 activations on x86 CPUs with AVX-512-VNNI and no AMX: products of bytes.
//
//   block of the weight [64 rows] x unit of K --- nibble u = q + 8, four inputs to a word ---> [K / 4][64][4] (L1)
//                                                                        |
//   x [K / unit][M][unit], packed once --- four bytes to all lanes --- vpdpbusd: 6 rows x 64 outputs
//                                                                        |
//                 int32 sums of the unit, - 8 sum(x) of it, x group scale --> float32 sums [M, 64]
//
// u is unsigned, as vpdpbusd wants one side. With w = u - a (a = 8, or 7.5 on the half-integer grid) and x = n + b
// (b = 0 or 1/2): sum(w x) = sum(u n) + b sum(u) - a sum(x). The sums of integers are exact.

#include <immintrin.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>

#include "int4_linear.hpp"
#include "tiles.hpp"
#include "unroll.hpp"

namespace {

constexpr int64_t kUnit = 256;   // the most inputs of a panel: 16 KB, half of the L1 cache
constexpr int64_t kRows = 6;     // rows of x whose sums, with four vectors of outputs, fill the registers
constexpr int64_t kChunk = 252;  // rows of x whose sums stay in the L2 cache

// sums += unsigned bytes times signed ones, by fours. Not the intrinsic: GCC 12 copies its sums about.
inline void add_products(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// The most inputs of a group that make a panel.
int64_t unit_of(int64_t group) {
    int64_t unit = group < kUnit ? group : kUnit;
    while (group % unit) unit -= 32;
    return unit;
}

// Sixteen bytes of each of four inputs -> words of four inputs.
inline __m512i words(const uint8_t* bytes) {
    __m512i word[4];
    each<4>([&](auto i) QUANTKIT_INLINE {
        word[i] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 32 * i)));
    });
    const __m512i low = _mm512_or_si512(word[0], _mm512_slli_epi32(word[1], 8));
    const __m512i high = _mm512_or_si512(word[2], _mm512_slli_epi32(word[3], 8));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// A unit of a block, [inputs][32 bytes] -> panel [inputs / 4][64][4]; sums [64] of each output's nibbles.
void expand(const uint8_t* bytes, int64_t inputs, uint8_t* panel, __m512 sums[4]) {
    const __m512i nibble = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
    __m512i all[4];
    each<4>([&](auto j) QUANTKIT_INLINE { all[j] = _mm512_setzero_si512(); });
    for (int64_t k = 0; k < inputs; k += 4) {
        const uint8_t* at = bytes + k * 32;
        // The next unit lies behind a page's end, where the hardware does not look ahead.
        _mm_prefetch(reinterpret_cast<const char*>(at + inputs * 32), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at + inputs * 32 + 64), _MM_HINT_T0);
        const __m512i first = words(at), second = words(at + 16);
        const __m512i w[4] = {_mm512_and_si512(first, nibble), _mm512_and_si512(second, nibble),
                              _mm512_and_si512(_mm512_srli_epi32(first, 4), nibble),
                              _mm512_and_si512(_mm512_srli_epi32(second, 4), nibble)};
        each<4>([&](auto j) QUANTKIT_INLINE {
            add_products(all[j], w[j], ones);
            _mm512_store_si512(panel + k * kBlock + 64 * j, w[j]);
        });
    }
    each<4>([&](auto j) QUANTKIT_INLINE { sums[j] = _mm512_cvtepi32_ps(all[j]); });
}

// total [M, 64] = or += scale * (x [M, inputs] times a panel + added - the rows' own).
template <int M>
__attribute__((noinline)) void tile(const int8_t* x, const uint8_t* panel, int64_t inputs, const float* rows,
                                    const __m512* added, const __m512* scale, bool first, float* total) {
    __m512i acc[M][4];
    pairs<M, 4>([&](auto r, auto j) QUANTKIT_INLINE { acc[r][j] = _mm512_setzero_si512(); });
    for (int64_t i = 0; i < inputs; i += 4) {
        __m512i w[4];
        each<4>([&](auto j) QUANTKIT_INLINE { w[j] = _mm512_load_si512(panel + i * kBlock + 64 * j); });
        each<M>([&](auto r) QUANTKIT_INLINE {
            int32_t four;
            std::memcpy(&four, x + r * inputs + i, 4);
            const __m512i values = _mm512_set1_epi32(four);
            each<4>([&](auto j) QUANTKIT_INLINE { add_products(acc[r][j], w[j], values); });
        });
    }
    pairs<M, 4>([&](auto r, auto j) QUANTKIT_INLINE {
        float* at = total + r * kBlock + 16 * j;
        const __m512 old = first ? _mm512_setzero_ps() : _mm512_load_ps(at);
        const __m512 more = _mm512_sub_ps(added[j], _mm512_set1_ps(rows[r]));
        const __m512 sum = _mm512_add_ps(_mm512_cvtepi32_ps(acc[r][j]), more);
        _mm512_store_ps(at, _mm512_fmadd_ps(sum, scale[j], old));
    });
}

// A block of 64 outputs for some rows of x; rows_sums [units][m] are a * sum(n + b).
void block(const Int4Problem& p, const int8_t* packed, const float* row_sums, int64_t first, int64_t rows,
           int64_t number, uint8_t* panel, float* total) {
    const int64_t unit = unit_of(p.group);
    const float b = p.kind == kInt8Half ? 0.5f : 0.0f;
    for (int64_t u = 0; u < p.k / unit; ++u) {
        __m512 added[4], scale[4];
        expand(p.weight + number * 32 * p.k + u * unit * 32, unit, panel, added);
        for (int j = 0; j < 4; ++j) {
            added[j] = _mm512_mul_ps(added[j], _mm512_set1_ps(b));
            scale[j] = load_scales(p, u * unit / p.group, number * kBlock + 16 * j);
        }
        const int8_t* x = packed + u * p.m * unit + first * unit;
        const float* sums = row_sums + u * p.m + first;
        for (int64_t r = 0; r < rows; r += kRows) {
            const int8_t* at = x + r * unit;
            float* into = total + r * kBlock;
            switch (rows - r) {
                case 1: tile<1>(at, panel, unit, sums + r, added, scale, !u, into); break;
                case 2: tile<2>(at, panel, unit, sums + r, added, scale, !u, into); break;
                case 3: tile<3>(at, panel, unit, sums + r, added, scale, !u, into); break;
                case 4: tile<4>(at, panel, unit, sums + r, added, scale, !u, into); break;
                case 5: tile<5>(at, panel, unit, sums + r, added, scale, !u, into); break;
                default: tile<kRows>(at, panel, unit, sums + r, added, scale, !u, into);
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r) write_row(p, first + r, number * kBlock, total + r * kBlock);
}

// Row r of x -> its units in packed [K / unit][M][unit], and a * sum(n + b) of each.
void pack_row(const Int4Problem& p, int64_t r, int8_t* packed, float* row_sums) {
    const int64_t unit = unit_of(p.group);
    const int8_t* row = static_cast<const int8_t*>(p.x) + r * p.row_bytes;
    const float a = p.half ? 7.5f : 8.0f, b = p.kind == kInt8Half ? 0.5f : 0.0f;
    const __m256i ones = _mm256_set1_epi8(1);
    for (int64_t u = 0; u < p.k / unit; ++u) {
        __m256i sum = _mm256_setzero_si256();
        for (int64_t i = 0; i < unit; i += 32) {
            const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + u * unit + i));
            sum = _mm256_dpbusd_epi32(sum, ones, x);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + (u * p.m + r) * unit + i), x);
        }
        const int32_t whole = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(sum));
        row_sums[u * p.m + r] = a * (static_cast<float>(whole) + b * static_cast<float>(unit));
    }
}

}  // namespace

bool int4_vnni(const Int4Problem& p, int threads) {
    const int64_t chunk = p.m < kChunk ? p.m : kChunk;
    int8_t* packed = scratch<int8_t>(p.m * p.k);
    float* row_sums = scratch<float>(p.m * (p.k / unit_of(p.group)));
    uint8_t* panels = scratch<uint8_t>(threads * kUnit * kBlock);
    float* totals = scratch<float>(threads * chunk * kBlock);
    const bool complete = packed && row_sums && panels && totals;
#pragma omp parallel num_threads(threads) if (complete)
    {
        const int64_t me = omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < (complete ? p.m : 0); ++r) pack_row(p, r, packed, row_sums);
        for (int64_t first = 0; first < (complete ? p.m : 0); first += kChunk) {
            const int64_t rows = p.m - first < kChunk ? p.m - first : kChunk;
#pragma omp for schedule(static) nowait
            for (int64_t number = 0; number < p.n / kBlock; ++number)
                block(p, packed, row_sums, first, rows, number, panels + me * kUnit * kBlock,
                      totals + me * chunk * kBlock);
        }
    }
    std::free(packed);
    std::free(row_sums);
    std::free(panels);
    std::free(totals);
    return complete;
}
