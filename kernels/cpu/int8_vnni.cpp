// INT8 weights times INT8 activations on x86 CPUs with AVX-512-VNNI and no AMX: exact int32 sums.
//
// vpdpbusd multiplies unsigned by signed bytes: the weight goes in as w + 128, and 128 times the sum of x's
// row is taken off at the end.
//
//   weight [64 rows] x slab of K --- 16 x 16 transposes, + 128 ---> panel [K / 4][64 outputs][4] (L1)
//                                                                        |
//   x [K / slab][M][slab], packed once --- four bytes to all lanes --- vpdpbusd: 6 rows x 64 outputs
//                                                                        |
//                      int32 sums [M, 64], kept over the slabs, - 128 sum(x), scales -> y
//
// Up to four rows the weight is read once and straight from memory, 64 inputs of a row at a time.

#include <immintrin.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>

#include "int8_linear.hpp"
#include "tiles.hpp"
#include "unroll.hpp"

namespace {

constexpr int64_t kBlock = 64;   // outputs of a panel
constexpr int64_t kSlab = 256;   // inputs of a panel: 16 KB, half of the L1 cache
constexpr int64_t kRows = 6;     // rows of x whose sums, with four vectors of outputs, fill the registers
constexpr int64_t kChunk = 252;  // rows of x whose sums stay in the L2 cache
constexpr int64_t kFew = 4;

inline __m512i to_unsigned(__m512i signed_bytes) {
    return _mm512_xor_si512(signed_bytes, _mm512_set1_epi8(-128));
}

// sums += unsigned bytes times signed ones, by fours. Not the intrinsic: GCC 12 copies its sums about.
inline void add_products(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

int32_t row_sum(const int8_t* x, int64_t k) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 64)
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(x + i));
    return _mm512_reduce_add_epi32(sum);
}

// Four outputs of up to four rows.
template <int M>
void few_rows(const Int8Problem& p, const int32_t* row_sums, int64_t output, int32_t* sums) {
    const int8_t* weight = p.weight + output * p.k;
    __m512i acc[M][4];
    pairs<M, 4>([&](auto r, auto j) QUANTKIT_INLINE { acc[r][j] = _mm512_setzero_si512(); });
    for (int64_t k = 0; k < p.k; k += 64) {
        __m512i x[M];
        each<M>([&](auto r) QUANTKIT_INLINE { x[r] = _mm512_loadu_si512(p.x + r * p.stride + k); });
        each<4>([&](auto j) QUANTKIT_INLINE {
            _mm_prefetch(reinterpret_cast<const char*>(weight + j * p.k + k + 1024), _MM_HINT_T0);
            const __m512i w = to_unsigned(_mm512_loadu_si512(weight + j * p.k + k));
            each<M>([&](auto r) QUANTKIT_INLINE { add_products(acc[r][j], w, x[r]); });
        });
    }
    pairs<M, 4>([&](auto r, auto j) QUANTKIT_INLINE {
        sums[r * kBlock + j] = _mm512_reduce_add_epi32(acc[r][j]) - 128 * row_sums[r];
    });
}

void write_block(const Int8Problem& p, const int32_t* sums, const int32_t* row_sums, int64_t first,
                 int64_t rows, int64_t output) {
    __m512 scale[4];
    for (int j = 0; j < 4; ++j) scale[j] = _mm512_loadu_ps(p.scale + output + 16 * j);
    for (int64_t r = 0; r < rows; ++r) {
        const __m512i off = _mm512_set1_epi32(row_sums ? 128 * row_sums[r] : 0);
        for (int j = 0; j < 4; ++j) {
            const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums + r * kBlock + 16 * j), off);
            write_sums(p, _mm512_cvtepi32_ps(sum), scale[j], first + r, output + 16 * j);
        }
    }
}

void few(const Int8Problem& p, int threads) {
    int32_t row_sums[kFew];
    for (int64_t r = 0; r < p.m; ++r) row_sums[r] = row_sum(p.x + r * p.stride, p.k);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t output = 0; output < p.n; output += kBlock) {
        alignas(64) int32_t sums[kFew * kBlock];
        for (int64_t j = 0; j < kBlock; j += 4) {
            switch (p.m) {
                case 1: few_rows<1>(p, row_sums, output + j, sums + j); break;
                case 2: few_rows<2>(p, row_sums, output + j, sums + j); break;
                case 3: few_rows<3>(p, row_sums, output + j, sums + j); break;
                default: few_rows<4>(p, row_sums, output + j, sums + j);
            }
        }
        write_block(p, sums, nullptr, 0, p.m, output);
    }
}

// 64 outputs x inputs -> [inputs / 4][64][4], + 128.
void pack_weight(const int8_t* weight, int64_t k, int64_t inputs, int8_t* panel) {
    for (int64_t i = 0; i < inputs; i += 64)
        for (int64_t j = 0; j < 4; ++j) {
            __m512i rows[16];
            for (int r = 0; r < 16; ++r) {
                const int8_t* row = weight + (16 * j + r) * k + i;
                // 64 streams are more than the hardware follows.
                _mm_prefetch(reinterpret_cast<const char*>(row + kSlab), _MM_HINT_T0);
                rows[r] = to_unsigned(_mm512_loadu_si512(row));
            }
            turn(rows);
            for (int r = 0; r < 16; ++r)
                _mm512_store_si512(panel + ((i / 4 + r) * 4 + j) * 64, rows[r]);
        }
}

// sums [M, 64] += x [M, inputs] times a panel.
template <int M>
void tile(const int8_t* x, const int8_t* panel, int64_t inputs, bool first, int32_t* sums) {
    __m512i acc[M][4];
    pairs<M, 4>([&](auto r, auto j) QUANTKIT_INLINE {
        acc[r][j] = first ? _mm512_setzero_si512() : _mm512_load_si512(sums + r * kBlock + 16 * j);
    });
    for (int64_t i = 0; i < inputs; i += 4) {
        __m512i w[4];
        each<4>([&](auto j) QUANTKIT_INLINE { w[j] = _mm512_load_si512(panel + i * kBlock + 64 * j); });
        each<M>([&](auto r) QUANTKIT_INLINE {
            int32_t four;
            std::memcpy(&four, x + r * kSlab + i, 4);
            const __m512i values = _mm512_set1_epi32(four);
            each<4>([&](auto j) QUANTKIT_INLINE { add_products(acc[r][j], w[j], values); });
        });
    }
    pairs<M, 4>([&](auto r, auto j) QUANTKIT_INLINE {
        _mm512_store_si512(sums + r * kBlock + 16 * j, acc[r][j]);
    });
}

void block(const Int8Problem& p, const int8_t* x, const int32_t* row_sums, int64_t first, int64_t rows,
           int64_t output, int8_t* panel, int32_t* sums) {
    for (int64_t from = 0; from < p.k; from += kSlab) {
        const int64_t inputs = p.k - from < kSlab ? p.k - from : kSlab;
        pack_weight(p.weight + output * p.k + from, p.k, inputs, panel);
        const int8_t* slab = x + from * p.m + first * kSlab;
        for (int64_t r = 0; r < rows; r += kRows) {
            const int8_t* at = slab + r * kSlab;
            int32_t* into = sums + r * kBlock;
            switch (rows - r) {
                case 1: tile<1>(at, panel, inputs, !from, into); break;
                case 2: tile<2>(at, panel, inputs, !from, into); break;
                case 3: tile<3>(at, panel, inputs, !from, into); break;
                case 4: tile<4>(at, panel, inputs, !from, into); break;
                case 5: tile<5>(at, panel, inputs, !from, into); break;
                default: tile<kRows>(at, panel, inputs, !from, into);
            }
        }
    }
    write_block(p, sums, row_sums + first, first, rows, output);
}

bool many(const Int8Problem& p, int threads) {
    const int64_t slabs = (p.k + kSlab - 1) / kSlab;
    int8_t* packed = scratch<int8_t>(slabs * kSlab * p.m);
    int32_t* row_sums = scratch<int32_t>(p.m);
    int8_t* panels = scratch<int8_t>(threads * kSlab * kBlock);
    int32_t* sums = scratch<int32_t>(threads * kChunk * kBlock);
    const bool complete = packed && row_sums && panels && sums;
#pragma omp parallel num_threads(threads) if (complete)
    {
        const int64_t me = omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < (complete ? p.m : 0); ++r) {
            const int8_t* row = p.x + r * p.stride;
            row_sums[r] = row_sum(row, p.k);
            for (int64_t from = 0; from < p.k; from += kSlab)
                std::memcpy(packed + from * p.m + r * kSlab, row + from,
                            p.k - from < kSlab ? p.k - from : kSlab);
        }
        for (int64_t first = 0; first < (complete ? p.m : 0); first += kChunk) {
            const int64_t rows = p.m - first < kChunk ? p.m - first : kChunk;
#pragma omp for schedule(static) nowait
            for (int64_t output = 0; output < p.n; output += kBlock)
                block(p, packed, row_sums, first, rows, output, panels + me * kSlab * kBlock,
                      sums + me * kChunk * kBlock);
        }
    }
    std::free(packed);
    std::free(row_sums);
    std::free(panels);
    std::free(sums);
    return complete;
}

}  // namespace

bool int8_vnni(const Int8Problem& p, int threads) {
    if (p.m > kFew) return many(p, threads);
    few(p, threads);
    return true;
}
