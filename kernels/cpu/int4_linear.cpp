// INT4 weights times 16-bit, FP8 or INT8 activations on x86 CPUs with AVX-512-BF16, and AMX where it is.
//
// The weight is in torch's native INT4 layout (aten::_convert_weight_to_int4pack_for_cpu, AVX-512 form):
// blocks of 64 output rows; in a block, for each input k, 32 bytes whose low nibbles are rows 0..31 and
// whose high nibbles are rows 32..63. One packed copy so serves this file and torch's own product.
//
//   x [M, K] -> bf16 panels of 16 rows (shared)        weight block [64 rows] x group
//        |                                                   | nibble -> bf16, a table of 16
//        v                                                   v
//   A tile [16, 32] ----------- tdpbf16ps -------- B tile [32, 16] (L1, reused by every panel of x)
//                                   |
//                    float32 sums of the group  x scale -> float32 accumulator [rows, 64]
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

#include "int4_linear.hpp"
#include "tiles.hpp"
#include "unroll.hpp"

namespace {

constexpr int64_t kPanel = 16;    // rows of x in a tile
constexpr int64_t kStep = 32;     // inputs in a tile
constexpr int64_t kChunk = 256;   // rows of x that stay in the L2 cache while the weight passes
constexpr int64_t kStrip = 8;     // blocks of a thread whose sums do, from one slab to the next
constexpr int64_t kSlab = 1024;   // inputs of such a chunk that do, together with their sums

inline float to_float(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline bf16 to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN stays NaN
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The magnitudes of e4m3fn as bf16: exact.
struct Float8Table {
    bf16 values[128];
    Float8Table() {
        for (int code = 0; code < 128; ++code) {
            int exponent = (code >> 3) & 15, mantissa = code & 7;
            float value = exponent ? (1.0f + mantissa / 8.0f) : mantissa / 8.0f;
            for (int e = exponent ? exponent : 1; e > 7; --e) value *= 2;
            for (int e = exponent ? exponent : 1; e < 7; ++e) value /= 2;
            bool nan = exponent == 15 && mantissa == 7;
            values[code] = nan ? 0x7fc0 : to_bf16(value);
        }
    }
};
const Float8Table kFloat8Table;

// 32 e4m3fn codes -> bf16: the magnitude is one of 128, looked up 64 at a time.
inline __m512i float8_32(const uint8_t* codes) {
    const __m512i words =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const bf16* table = kFloat8Table.values;
    const __m512i small = _mm512_permutex2var_epi16(_mm512_loadu_si512(table), words,
                                                    _mm512_loadu_si512(table + 32));
    const __m512i large = _mm512_permutex2var_epi16(_mm512_loadu_si512(table + 64), words,
                                                    _mm512_loadu_si512(table + 96));
    const __mmask32 above = _mm512_test_epi16_mask(words, _mm512_set1_epi16(64));
    const __m512i magnitude = _mm512_mask_blend_epi16(above, small, large);
    const __m512i sign = _mm512_and_si512(words, _mm512_set1_epi16(128));
    return _mm512_or_si512(magnitude, _mm512_slli_epi16(sign, 8));
}

// 32 elements of a row as bf16.
inline __m512i elements32(const void* row, int64_t k, int kind) {
    if (kind == kBf16) return _mm512_loadu_si512(static_cast<const bf16*>(row) + k);
    if (kind == kFloat8) return float8_32(static_cast<const uint8_t*>(row) + k);
    const __m256i codes =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const int8_t*>(row) + k));
    const __m512 half = _mm512_set1_ps(kind == kInt8Half ? 0.5f : 0.0f);
    __m512 low = _mm512_add_ps(
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes))), half);
    __m512 high = _mm512_add_ps(
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1))), half);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Rows [first, first + 16) of x -> a panel [K / 32][16][32] of bf16; rows past the end are zeros.
void pack_panel(const void* x, int64_t row_bytes, int kind, int64_t first, int64_t m, int64_t k,
                bf16* panel) {
    for (int64_t r = 0; r < kPanel; ++r) {
        const bool there = first + r < m;
        const void* row = static_cast<const char*>(x) + (first + r) * row_bytes;
        for (int64_t step = 0; step < k / kStep; ++step) {
            __m512i values =
                there ? elements32(row, step * kStep, kind) : _mm512_setzero_si512();
            _mm512_storeu_si512(panel + (step * kPanel + r) * kStep, values);
        }
    }
}

// The 16 values of a nibble as bf16, twice: vpermw reads five bits of the index.
inline __m512i nibble_table(bool half) {
    alignas(64) bf16 table[32];
    for (int i = 0; i < 32; ++i) table[i] = to_bf16((i & 15) - 8 + (half ? 0.5f : 0.0f));
    return _mm512_load_si512(table);
}

// Two inputs (k, k + 1) of 16 bytes each -> pairs (k, k + 1) of the low and of the high nibbles' rows.
inline void expand_pair(const uint8_t* bytes, __m512i table, __m512i& low, __m512i& high) {
    const __m512i nibble = _mm512_set1_epi16(15);
    __m512i even = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    __m512i odd =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 32)));
    __m512i both = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    low = _mm512_permutexvar_epi16(_mm512_and_si512(both, nibble), table);
    high = _mm512_permutexvar_epi16(_mm512_and_si512(_mm512_srli_epi16(both, 4), nibble), table);
}

// A group of a block, [inputs][32 bytes] -> B tiles [inputs / 32][4 column tiles][16 pairs][16][2].
void expand_group(const uint8_t* bytes, int64_t inputs, __m512i table, bf16* tiles) {
    for (int64_t k = 0; k < inputs; k += 2) {
        // The next group lies behind a page's end, where the hardware does not look ahead.
        _mm_prefetch(reinterpret_cast<const char*>(bytes + (k + inputs) * 32), _MM_HINT_T0);
        bf16* base = tiles + (k / kStep) * 4 * 512 + (k % kStep) / 2 * 32;
        __m512i low, high;
        expand_pair(bytes + k * 32, table, low, high);
        _mm512_store_si512(base, low);
        _mm512_store_si512(base + 2 * 512, high);
        expand_pair(bytes + k * 32 + 16, table, low, high);
        _mm512_store_si512(base + 512, low);
        _mm512_store_si512(base + 3 * 512, high);
    }
}

// sums += pairs of bf16. Not the intrinsic: GCC 12 copies its sums about.
inline void add_products(__m512& sums, __m512i a, __m512i b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}

// Up to four rows: each expanded pair goes straight into the products.
template <int M>
void few_rows(const Int4Problem& p, const bf16* rows, int64_t block) {
    const __m512i table = nibble_table(p.half);
    const uint8_t* bytes = p.weight + block * 32 * p.k;
    const int64_t column = block * kBlock;
    alignas(64) float total[M][kBlock];
    std::memset(total, 0, sizeof(total));
    for (int64_t g = 0; g < p.k / p.group; ++g) {
        __m512 sums[M][4];
        pairs<M, 4>([&](auto r, auto j) QUANTKIT_INLINE { sums[r][j] = _mm512_setzero_ps(); });
        for (int64_t k = g * p.group; k < (g + 1) * p.group; k += 2) {
            __m512i w[4];
            _mm_prefetch(reinterpret_cast<const char*>(bytes + k * 32 + 2048), _MM_HINT_T0);
            expand_pair(bytes + k * 32, table, w[0], w[2]);
            expand_pair(bytes + k * 32 + 16, table, w[1], w[3]);
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

// A group's product of one panel by AMX tiles: sums [16][64].
QUANTKIT_AMX inline void panel_amx(
    const bf16* panel, const bf16* next, const bf16* tiles, int64_t steps, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s) {
        const bf16* b = tiles + s * 4 * 512;
        for (int line = 0; line < 16; ++line)
            _mm_prefetch(reinterpret_cast<const char*>(next + s * kPanel * kStep + line * 32), _MM_HINT_T0);
        _tile_loadd(4, panel + s * kPanel * kStep, 64);
        _tile_loadd(5, b, 64);
        _tile_loadd(6, b + 512, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(5, b + 1024, 64);
        _tile_loadd(6, b + 1536, 64);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, sums, 256);
    _tile_stored(1, sums + 16, 256);
    _tile_stored(2, sums + 32, 256);
    _tile_stored(3, sums + 48, 256);
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
                std::memcpy(&values, panel + (s * kPanel + i) * kStep + pair * 2, 4);
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
        const bf16* at = panel + r * kStep;
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
                    int64_t block, int64_t slab, bool amx, bf16* tiles, float* buffers, float* total) {
    const __m512i table = nibble_table(p.half);
    const uint8_t* bytes = p.weight + block * 32 * p.k;
    const int64_t column = block * kBlock, count = (rows + kPanel - 1) / kPanel;
    const int64_t steps = p.group / kStep, groups = p.k / p.group, per_slab = slab_groups(p);
    const int64_t last = (slab + 1) * per_slab < groups ? (slab + 1) * per_slab : groups;
    for (int64_t g = slab * per_slab; g < last; ++g) {
        expand_group(bytes + g * p.group * 32, p.group, table, tiles);
        __m512 scale[4];
        for (int j = 0; j < 4; ++j) scale[j] = load_scales(p, g, column + 16 * j);
        const auto add_scaled = [&](int64_t c) {
            const float* sums = buffers + (c & 1) * kPanel * kBlock;
            float* into = total + c * kPanel * kBlock;
            const int64_t here = in_panel(c, rows);
            for (int64_t r = 0; r < here; ++r)
                for (int j = 0; j < 4; ++j) {
                    float* at = into + r * kBlock + 16 * j;
                    const __m512 sum = _mm512_load_ps(sums + r * kBlock + 16 * j);
                    const __m512 old = g ? _mm512_load_ps(at) : _mm512_setzero_ps();
                    _mm512_store_ps(at, _mm512_fmadd_ps(sum, scale[j], old));
                }
        };
        for (int64_t c = 0; c < count; ++c) {
            const bf16* panel = panels + c * kPanel * p.k + g * steps * kPanel * kStep;
            if (!amx) {
                panel_avx512(panel, tiles, steps, in_panel(c, rows), scale, g == 0,
                             total + c * kPanel * kBlock);
                continue;
            }
            float* sums = buffers + (c & 1) * kPanel * kBlock;
            panel_amx(panel, panel + kPanel * p.k, tiles, steps, sums);
            // One panel behind: sums just stored by tiles are slow to read back.
            if (c) add_scaled(c - 1);
        }
        if (amx) add_scaled(count - 1);
    }
    if (last < groups) return;
    for (int64_t r = 0; r < rows; ++r) write_row(p, first_row + r, column, total + r * kBlock);
}

bool few(const Int4Problem& p, int threads) {
    bf16* rows = scratch<bf16>(p.m * p.k);
    if (!rows) return false;
    for (int64_t r = 0; r < p.m; ++r)
        for (int64_t k = 0; k < p.k; k += kStep)
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

bool many(const Int4Problem& p, int threads, bool amx) {
    const int64_t panels = (p.m + kPanel - 1) / kPanel, blocks = p.n / kBlock;
    const int64_t sums = (p.m < kChunk ? panels * kPanel : kChunk) * kBlock;
    const int64_t stride = kStrip * threads;
    bf16* packed = scratch<bf16>(panels * kPanel * p.k);
    float* totals = scratch<float>(stride * sums);
    bool complete = packed && totals;
#pragma omp parallel num_threads(threads) if (complete)
    {
        bf16* tiles = scratch<bf16>(p.group * kBlock);
        float* buffers = scratch<float>(2 * kPanel * kBlock);
        const bool mine = complete && tiles && buffers;
        if (amx) configure_tiles();
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
                                           amx, tiles, buffers, totals + place * sums);
                }
            }
        }
        if (amx) release_tiles();
        std::free(tiles);
        std::free(buffers);
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

// 0: this processor cannot run the file; 1: AVX-512 with BF16 and VNNI; 2: AMX too.
int quantkit_level() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512bf16") ||
        !__builtin_cpu_supports("avx512vnni"))
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
    // INT8 by INT4 in bytes, twice as fast as in bf16; AMX in bf16 is faster still.
    if (level == 1 && m > 4 && kind >= kInt8) return int4_vnni(p, threads) ? 0 : 1;
    // With tiles two rows already pay for expanding the weight into the cache.
    if (m <= (level == 2 ? 1 : 4)) return few(p, threads) ? 0 : 1;
    return many(p, threads, level == 2) ? 0 : 1;
}
}
