// INT4 weights times 16-bit, FP8 or INT8 activations on x86 CPUs with AVX-512-BF16. With AMX, from two rows on:
// int4_tiles.cpp.
//
// The weight is in torch's native INT4 layout (aten::_convert_weight_to_int4pack_for_cpu, AVX-512 form):
// blocks of 64 output rows; in a block, for each input k, 32 bytes whose low nibbles are rows 0..31 and
// whose high nibbles are rows 32..63. One packed copy so serves this file and torch's own product.
//
//   x [M, K] -> bf16 panels of 16 rows (shared)        weight block [64 rows] x group
//        |                                                   | nibble -> bf16, a table of 16
//        v                                                   v
//   6 rows of x ------------- vdpbf16ps ------------- 64 outputs (L1, reused by every panel of x)
//                                   |
//                    float32 sums of the group  x scale -> float32 totals [rows, 64]
//                                   |
//                 x row scale + bias -> bf16 or float32 output
//
// Codes and FP8 or INT8 activations are exact in bf16, so only float32 sums round: the group scales are
// applied to each group's sum, never to a rounded product.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "int4_expand.hpp"
#include "int4_linear.hpp"
#include "tiles.hpp"
#include "unroll.hpp"

namespace {

constexpr int64_t kPanel = 16;    // rows of x in a tile
constexpr int64_t kInputs = 32;   // inputs in a tile
constexpr int64_t kChunk = 256;   // rows of x that stay in the L2 cache while the weight passes
constexpr int64_t kStrip = 8;     // blocks of a thread whose sums do, from one slab to the next
constexpr int64_t kSlab = 1024;   // inputs of such a chunk that do, together with their sums

// Rows [first, first + 16) of x -> a panel [K / 32][16][32] of bf16; rows past the end are zeros.
void pack_panel(const void* x, int64_t row_bytes, int kind, int64_t first, int64_t m, int64_t k,
                bf16* panel) {
    for (int64_t r = 0; r < kPanel; ++r) {
        const bool there = first + r < m;
        const void* row = static_cast<const char*>(x) + (first + r) * row_bytes;
        for (int64_t step = 0; step < k / kInputs; ++step) {
            __m512i values =
                there ? elements32(row, step * kInputs, kind) : _mm512_setzero_si512();
            _mm512_storeu_si512(panel + (step * kPanel + r) * kInputs, values);
        }
    }
}

// A group of a block, [inputs][32 bytes] -> [inputs / 32][4][16 pairs][16][2].
void expand_group(const uint8_t* bytes, int64_t inputs, const PairExpander& expander, bf16* tiles) {
    for (int64_t k = 0; k < inputs; k += 2) {
        __m512i w[4];
        expander(bytes + k * 32, w);
        bf16* base = tiles + (k / kInputs) * 4 * 512 + (k % kInputs) / 2 * 32;
        each<4>([&](auto j) QUANTKIT_INLINE { _mm512_store_si512(base + j * 512, w[j]); });
    }
}

// sums += pairs of bf16. Not the intrinsic: GCC 12 copies its sums about.
inline void add_products(__m512& sums, __m512i a, __m512i b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}

// Up to four rows: each expanded pair goes straight into the products.
template <int M>
void few_rows(const Int4Problem& p, const bf16* rows, int64_t block) {
    const PairExpander expander(p.half);
    const uint8_t* bytes = p.weight + block * 32 * p.k;
    const int64_t column = block * kBlock;
    alignas(64) float total[M][kBlock];
    std::memset(total, 0, sizeof(total));
    for (int64_t g = 0; g < p.k / p.group; ++g) {
        __m512 sums[M][4];
        pairs<M, 4>([&](auto r, auto j) QUANTKIT_INLINE { sums[r][j] = _mm512_setzero_ps(); });
        for (int64_t k = g * p.group; k < (g + 1) * p.group; k += 2) {
            __m512i w[4];
            expander(bytes + k * 32, w);
            each<M>([&](auto r) QUANTKIT_INLINE {
                uint32_t pair;
                std::memcpy(&pair, rows + r * p.k + k, 4);
                const __m512i x = _mm512_set1_epi32(static_cast<int>(pair));
                each<4>([&](auto j) QUANTKIT_INLINE { add_products(sums[r][j], w[j], x); });
            });
        }
        each<4>([&](auto j) QUANTKIT_INLINE {
            const __m512 scale = load_scales(p, g, column + 16 * j);
            each<M>([&](auto r) QUANTKIT_INLINE {
                float* at = total[r] + 16 * j;
                _mm512_store_ps(at, _mm512_fmadd_ps(sums[r][j], scale, _mm512_load_ps(at)));
            });
        });
    }
    for (int r = 0; r < M; ++r) write_row(p, r, column, total[r]);
}

// total [M, 64] = or += scale * a group's product of M rows of a panel. Not inlined: what its caller
// keeps in registers would push the sums out of them.
template <int M>
__attribute__((noinline)) void rows_avx512(const bf16* panel, const bf16* tiles, int64_t steps,
                                           const __m512* scale, bool first, float* total) {
    __m512 acc[M][4];
    pairs<M, 4>([&](auto i, auto j) QUANTKIT_INLINE { acc[i][j] = _mm512_setzero_ps(); });
    for (int64_t s = 0; s < steps; ++s) {
        for (int64_t pair = 0; pair < 16; ++pair) {
            const bf16* b = tiles + s * 4 * 512 + pair * 32;
            __m512i w[4];
            each<4>([&](auto j) QUANTKIT_INLINE { w[j] = _mm512_load_si512(b + j * 512); });
            each<M>([&](auto i) QUANTKIT_INLINE {
                uint32_t values;
                std::memcpy(&values, panel + (s * kPanel + i) * kInputs + pair * 2, 4);
                const __m512i x = _mm512_set1_epi32(static_cast<int>(values));
                each<4>([&](auto j) QUANTKIT_INLINE { add_products(acc[i][j], w[j], x); });
            });
        }
    }
    pairs<M, 4>([&](auto i, auto j) QUANTKIT_INLINE {
        float* at = total + i * kBlock + 16 * j;
        const __m512 old = first ? _mm512_setzero_ps() : _mm512_load_ps(at);
        _mm512_store_ps(at, _mm512_fmadd_ps(acc[i][j], scale[j], old));
    });
}

void panel_avx512(const bf16* panel, const bf16* tiles, int64_t steps, int64_t rows,
                  const __m512* scale, bool first, float* total) {
    for (int64_t r = 0; r < rows;) {
        const int64_t left = rows - r;
        const bf16* at = panel + r * kInputs;
        float* into = total + r * kBlock;
        // 16 rows are 6 + 5 + 5.
        if (left == 16 || left == 6) {
            rows_avx512<6>(at, tiles, steps, scale, first, into), r += 6;
        } else if (left > 4) {
            rows_avx512<5>(at, tiles, steps, scale, first, into), r += 5;
        } else {
            switch (left) {
                case 1: rows_avx512<1>(at, tiles, steps, scale, first, into); break;
                case 2: rows_avx512<2>(at, tiles, steps, scale, first, into); break;
                case 3: rows_avx512<3>(at, tiles, steps, scale, first, into); break;
                default: rows_avx512<4>(at, tiles, steps, scale, first, into);
            }
            r = rows;
        }
    }
}

inline int64_t in_panel(int64_t panel, int64_t rows) {
    const int64_t left = rows - panel * kPanel;
    return left < kPanel ? left : kPanel;
}

inline int64_t slab_groups(const Int4Problem& p) { return p.group < kSlab ? kSlab / p.group : 1; }

inline int64_t slabs(const Int4Problem& p) {
    return (p.k / p.group + slab_groups(p) - 1) / slab_groups(p);
}

// One block of 64 outputs for a chunk of packed panels and a slab of the inputs; the slabs of a chunk
// add up in `total` and the last one writes.
void block_of_chunk(const Int4Problem& p, const bf16* panels, int64_t first_row, int64_t rows,
                    int64_t block, int64_t slab, bf16* tiles, float* total) {
    const PairExpander expander(p.half);
    const uint8_t* bytes = p.weight + block * 32 * p.k;
    const int64_t column = block * kBlock, count = (rows + kPanel - 1) / kPanel;
    const int64_t steps = p.group / kInputs, groups = p.k / p.group, per_slab = slab_groups(p);
    const int64_t last = (slab + 1) * per_slab < groups ? (slab + 1) * per_slab : groups;
    for (int64_t g = slab * per_slab; g < last; ++g) {
        expand_group(bytes + g * p.group * 32, p.group, expander, tiles);
        __m512 scale[4];
        for (int j = 0; j < 4; ++j) scale[j] = load_scales(p, g, column + 16 * j);
        for (int64_t c = 0; c < count; ++c)
            panel_avx512(panels + c * kPanel * p.k + g * steps * kPanel * kInputs, tiles, steps,
                         in_panel(c, rows), scale, g == 0, total + c * kPanel * kBlock);
    }
    if (last < groups) return;
    for (int64_t r = 0; r < rows; ++r) write_row(p, first_row + r, column, total + r * kBlock);
}

bool few(const Int4Problem& p, int threads) {
    bf16* rows = scratch<bf16>(p.m * p.k);
    if (!rows) return false;
    for (int64_t r = 0; r < p.m; ++r)
        for (int64_t k = 0; k < p.k; k += kInputs)
            _mm512_storeu_si512(rows + r * p.k + k,
                                elements32(static_cast<const char*>(p.x) + r * p.row_bytes, k, p.kind));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < p.n / kBlock; ++block) {
        switch (p.m) {
            case 1: few_rows<1>(p, rows, block); break;
            case 2: few_rows<2>(p, rows, block); break;
            case 3: few_rows<3>(p, rows, block); break;
            default: few_rows<4>(p, rows, block);
        }
    }
    std::free(rows);
    return true;
}

bool many(const Int4Problem& p, int threads) {
    const int64_t panels = (p.m + kPanel - 1) / kPanel, blocks = p.n / kBlock;
    const int64_t sums = (p.m < kChunk ? panels * kPanel : kChunk) * kBlock;
    const int64_t stride = kStrip * threads;
    bf16* packed = scratch<bf16>(panels * kPanel * p.k);
    float* totals = scratch<float>(stride * sums);
    bool complete = packed && totals;
#pragma omp parallel num_threads(threads) if (complete)
    {
        bf16* tiles = scratch<bf16>(p.group * kBlock);
        const bool mine = complete && tiles;
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; ++panel)
            if (mine)
                pack_panel(p.x, p.row_bytes, p.kind, panel * kPanel, p.m, p.k,
                           packed + panel * kPanel * p.k);
        for (int64_t first = 0; first < p.m; first += kChunk) {
            const int64_t rows = p.m - first < kChunk ? p.m - first : kChunk;
            // A strip's sums stay in the L2 cache from one slab to the next.
            for (int64_t strip = 0; strip < blocks; strip += stride) {
                for (int64_t slab = 0; slab < slabs(p); ++slab) {
                    // Every loop runs over all places of a strip, so that a place's sums stay with one
                    // thread and none needs to wait for another; in turns, since the last strip may
                    // be short.
#pragma omp for schedule(static, 1) nowait
                    for (int64_t place = 0; place < stride; ++place)
                        if (mine && strip + place < blocks)
                            block_of_chunk(p, packed + first * p.k, first, rows, strip + place, slab,
                                           tiles, totals + place * sums);
                }
            }
        }
        std::free(tiles);
        if (!mine) {
#pragma omp atomic write
            complete = false;
        }
    }
    std::free(packed);
    std::free(totals);
    return complete;
}

}  // namespace

extern "C" {

// 0: this processor cannot run the files; 1: AVX-512 with BF16, VNNI and VBMI; 2: AMX too.
int quantkit_level() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512bf16") ||
        !__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vbmi"))
        return 0;
    uint32_t a = 7, b, c = 0, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const bool tiles = (d >> 24 & 1) && (d >> 22 & 1);
    // Linux gives the tiles' state to a process that asks for it (ARCH_REQ_XCOMP_PERM, XTILEDATA).
    if (tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0) return 2;
    return 1;
}

// y = row_scale * (x @ (q * scale)^T) + bias. N a multiple of 64, the group of 32, K of the group.
// Returns 0, or 1 when memory ran out.
int quantkit_int4_linear(const void* x, int64_t row_bytes, int kind, const void* weight,
                         const void* scales, int half, const float* row_scale, const float* bias,
                         void* out, int out_float, int64_t m, int64_t n, int64_t k, int64_t group,
                         int threads, int level) {
    Int4Problem p{x,    row_bytes, kind, static_cast<const uint8_t*>(weight), static_cast<const bf16*>(scales),
              half != 0, row_scale, bias, out, out_float != 0, m, n, k, group};
    // With tiles two rows already pay for expanding the weight into the cache.
    if (m <= (level == 2 ? 1 : 4)) return few(p, threads) ? 0 : 1;
    // INT8 by INT4 in bytes is twice as fast as in bf16.
    Int4Linear run = kind >= kInt8 ? int4_vnni : many;
    if (level == 2 && int4_tiles(p)) run = int4_tiles(p);
    return run(p, threads) ? 0 : 1;
}
}
