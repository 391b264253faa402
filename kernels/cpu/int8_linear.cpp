// INT8 weights times INT8 activations on x86 CPUs with AMX: exact int32 sums, one epilogue. Without
// AMX: int8_vnni.cpp.
//
// The weight [N, K] is used as it is stored: 16 of its rows by 64 inputs are the tile A. The activations
// are the tile B, [64 / 4 quads][16 rows of x][4], packed once per call. So the sums come out transposed,
// [16 outputs][16 rows of x], and are turned while the scales are applied.
//
//   weight [N, K] rows of K bytes --- tdpbssd --- x panels [K / 64][16 quads][16 rows][4]
//                    |
//   int32 sums of a slab of K, kept over the slabs -> turn, x scale, x row scale, + bias -> bf16 or float32

#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "int8_linear.hpp"
#include "tiles.hpp"

namespace {

constexpr int64_t kTile = 16;    // outputs, and rows of x, in a tile
constexpr int64_t kStep = 64;    // inputs in a tile
constexpr int64_t kPair = 32;    // outputs, and rows of x, that four tiles of sums hold
constexpr int64_t kChunk = 256;  // rows of x that stay in the L2 cache while the weight passes
constexpr int64_t kSlab = 1024;  // inputs of a pair of weight tiles that stay in the L1 cache

// Rows [first, first + 16) of x -> [K / 64][16 quads][16 rows][4]; rows past the end are zeros.
void pack_panel(const Int8Problem& p, int64_t first, int8_t* panel) {
    for (int64_t r = 0; r < kTile; ++r) {
        const bool there = first + r < p.m;
        const int8_t* row = p.x + (first + r) * p.stride;
        for (int64_t quad = 0; quad < p.k / 4; ++quad) {
            int32_t values = 0;
            if (there) std::memcpy(&values, row + quad * 4, 4);
            std::memcpy(panel + (quad * kTile + r) * 4, &values, 4);
        }
    }
}

// Up to 16 rows of x: 64 outputs at once, the weight read once and straight from memory.
QUANTKIT_AMX void one_panel(const int8_t* weight, int64_t k, const int8_t* panel, int32_t* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < k; s += kStep) {
        // 64 streams are more than the hardware follows.
        for (int64_t row = 0; row < 4 * kTile; ++row)
            _mm_prefetch(reinterpret_cast<const char*>(weight + row * k + s + 8 * kStep), _MM_HINT_T0);
        _tile_loadd(6, panel + s * kTile, 64);
        _tile_loadd(4, weight + s, k);
        _tile_loadd(5, weight + kTile * k + s, k);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 5, 6);
        _tile_loadd(4, weight + 2 * kTile * k + s, k);
        _tile_loadd(5, weight + 3 * kTile * k + s, k);
        _tile_dpbssd(2, 4, 6);
        _tile_dpbssd(3, 5, 6);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

// 32 outputs x 32 rows of x over a slab of K; sums are four tiles [outputs / 16][rows / 16][16][16].
QUANTKIT_AMX void pair_of_panels(const int8_t* weight, int64_t k, const int8_t* panels, int64_t from,
                                 int64_t to, int32_t* sums) {
    if (from == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    }
    for (int64_t s = from; s < to; s += kStep) {
        _tile_loadd(4, weight + s, k);
        _tile_loadd(6, panels + s * kTile, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, panels + kTile * k + s * kTile, 64);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, weight + kTile * k + s, k);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

void write_tile(const Int8Problem& p, const int32_t* sums, int64_t row, int64_t output) {
    __m512i turned[16];
    for (int i = 0; i < 16; ++i) turned[i] = _mm512_loadu_si512(sums + 16 * i);
    turn(turned);  // [16 outputs][16 rows of x] -> rows of 16 outputs
    const __m512 scale = _mm512_loadu_ps(p.scale + output);
    for (int64_t r = 0; r < kTile && row + r < p.m; ++r) write_sums(p, _mm512_cvtepi32_ps(turned[r]), scale, row + r, output);
}

// 32 outputs for a chunk of packed panels.
void chunk(const Int8Problem& p, const int8_t* panels, int64_t first, int64_t rows, int64_t output,
           int32_t* sums) {
    const int8_t* weight = p.weight + output * p.k;
    for (int64_t from = 0; from < p.k; from += kSlab) {
        const int64_t to = from + kSlab < p.k ? from + kSlab : p.k;
        for (int64_t r = 0; r < rows; r += kPair)
            pair_of_panels(weight, p.k, panels + r * p.k, from, to, sums + r / kPair * 1024);
    }
    for (int64_t r = 0; r < rows; r += kTile)
        for (int64_t half = 0; half < 2; ++half) {
            const int64_t tile = r / kPair * 4 + half * 2 + r / kTile % 2;
            write_tile(p, sums + tile * 256, first + r, output + half * kTile);
        }
}

bool int8_tiles(const Int8Problem& p, int threads) {
    // Pairs of panels are read together, so an odd last one gets a partner of zeros.
    const int64_t panels = p.m <= kTile ? 1 : (p.m + kPair - 1) / kPair * 2;
    int8_t* packed = scratch<int8_t>(panels * kTile * p.k);
    int32_t* sums = scratch<int32_t>(threads * kChunk * kPair);
    const bool complete = packed && sums;
#pragma omp parallel num_threads(threads) if (complete)
    {
        int32_t* mine = sums + omp_get_thread_num() * kChunk * kPair;
        configure_tiles();
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < (complete ? panels : 0); ++panel)
            pack_panel(p, panel * kTile, packed + panel * kTile * p.k);
        if (panels == 1) {
#pragma omp for schedule(static)
            for (int64_t output = 0; output < (complete ? p.n : 0); output += 4 * kTile) {
                one_panel(p.weight + output * p.k, p.k, packed, mine);
                for (int64_t tile = 0; tile < 4; ++tile)
                    write_tile(p, mine + tile * 256, 0, output + tile * kTile);
            }
        } else {
            for (int64_t first = 0; first < (complete ? p.m : 0); first += kChunk) {
                const int64_t rows = p.m - first < kChunk ? p.m - first : kChunk;
#pragma omp for schedule(static) nowait
                for (int64_t output = 0; output < p.n; output += kPair)
                    chunk(p, packed + first * p.k, first, rows, output, mine);
            }
        }
        release_tiles();
    }
    std::free(packed);
    std::free(sums);
    return complete;
}

}  // namespace

// y = row_scale * scale * (x @ weight^T) + bias. N a multiple of 64, K of 64; level as quantkit_level
// gives it. 0, or 1: memory ran out.
extern "C" int quantkit_int8_linear(const void* x, int64_t stride, const void* weight, const float* scale,
                                    const float* row_scale, const float* bias, void* out,
                                    int out_float, int64_t m, int64_t n, int64_t k, int threads,
                                    int level) {
    const Int8Problem p{static_cast<const int8_t*>(x), stride, static_cast<const int8_t*>(weight),
                        scale, row_scale, bias, out, out_float != 0, m, n, k};
    return (level == 2 ? int8_tiles(p, threads) : int8_vnni(p, threads)) ? 0 : 1;
}
