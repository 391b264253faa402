// INT4 weights on x86 CPUs with AMX: in bytes times INT8 activations, in bf16 times the others.
//
//   x [M, K] -> A tiles of 16 rows (shared)        weight [64 rows] x slab of K, torch's own INT4 layout
//        |                                              | a byte permutation, a table of 16
//        |                                              v
//        |                             B tiles of the slab (L2 cache, a group of them L1), for up to 256 rows
//        v                                              v
//   two tiles of rows ----- tdpbssd or tdpbf16ps ----- two tiles of outputs
//                                   |
//         four tiles of a group's sums x scale -> float32 totals (L1 cache, over the groups of a slab)
//                                   |
//                x row scale + bias -> bf16 or float32 output
//
// Bytes: a code goes in as it is, a half-integer one as 2 q + 1 with half its scale: sums of integers are exact.
// Half-integer activations n + 1/2 add half the sum of an output's weights, once, at the end.
// The sums of one product are added while the next one runs: just stored by tiles they are slow to read back.
//
// Storing and adding the sums of each group costs as much as multiplying it. Where more than 64 rows make a bf16
// output of 16-bit or FP8 activations, the weight is expanded as bf16(q * scale) instead, and a product runs through a
// whole slab: one rounding of 2^-9 a weight, as of the output.

#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "int4_expand.hpp"
#include "int4_linear.hpp"
#include "tiles.hpp"
#include "unroll.hpp"

namespace {

constexpr int64_t kPanel = 16;                // rows of x in a tile
constexpr int64_t kTotals = kPanel * kBlock;  // of a panel, [4 tiles of outputs][16][16]
constexpr int64_t kChunk = 16;                // panels that a slab of the weight is expanded for
constexpr int64_t kHeld = 4;                  // panels whose totals stay in the L1 cache
constexpr int64_t kStrip = 8;                 // blocks of a thread whose totals stay in the L2 cache
constexpr int64_t kSlab = 1024;               // inputs of a slab
constexpr int kParts = 8;                     // of the adding up of a product's sums
constexpr int kRound = 8;                     // steps of a round of scaled weights

// The sums of a product, and where they are to be added: four tiles, of two panels by two tiles of outputs, or of
// one by four.
struct Pending {
    const char* sums;
    float* totals[4];
    __m512 scale[4];
};

struct Work {
    const Int4Problem& p;
    const char* x;  // [slabs][panels][steps of the slab] tiles
    int64_t panels, groups, slab_groups;
    bool scaled;  // the weight is expanded with its scales
};

// What a thread has for itself.
struct Scratch {
    char* tiles;  // of a slab of a block
    char* sums;   // of two products, and a place for what nobody wants
    Pending last;
    int turn = 0;

    // Nothing is pending: what is added goes to a place that nobody reads.
    void rest() {
        last.sums = sums;
        for (int tile = 0; tile < 4; ++tile) {
            last.totals[tile] = reinterpret_cast<float*>(sums + 8 * kTile);
            last.scale[tile] = _mm512_setzero_ps();
        }
    }
};

// Rows of a panel of x -> its tiles in every slab; rows past the end are zeros. Panels of a slab lie side by side: a
// power of two apart, as K may be, they would fall on each other in the cache.
template <bool kBytes>
void pack_panel(const Work& work, int64_t panel, char* tiles) {
    const Int4Problem& p = work.p;
    const int64_t steps = p.k / kStep<kBytes>, whole = work.slab_groups * p.group / kStep<kBytes>;
    for (int64_t r = 0; r < kPanel; ++r) {
        const bool there = panel * kPanel + r < p.m;
        const char* row = static_cast<const char*>(p.x) + (panel * kPanel + r) * p.row_bytes;
        for (int64_t begin = 0; begin < steps; begin += whole) {
            const int64_t count = steps - begin < whole ? steps - begin : whole;
            char* into = tiles + (begin * work.panels + panel * count) * kTile + r * 64;
            for (int64_t s = 0; s < count; ++s) {
                __m512i values = _mm512_setzero_si512();
                if (there && kBytes) values = _mm512_loadu_si512(row + (begin + s) * 64);
                if (there && !kBytes) values = elements32(row, (begin + s) * 32, p.kind);
                _mm512_store_si512(into + s * kTile, values);
            }
        }
    }
}

// Part of the adding up of a product's sums: eight rows of one tile.
template <bool kBytes, int kPart>
QUANTKIT_INLINE inline void add_part(const Pending& last) {
    constexpr int kOf = kPart / 2, kRow = kPart % 2 * 8;
    const char* sums = last.sums + kOf * kTile + kRow * 64;
    float* into = last.totals[kOf] + kRow * 16;
    const __m512 scale = last.scale[kOf];
    each<8>([&](auto r) QUANTKIT_INLINE {
        __m512 sum;
        if constexpr (kBytes)
            sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + r * 64));
        else
            sum = _mm512_load_ps(sums + r * 64);
        _mm512_store_ps(into + r * 16, _mm512_fmadd_ps(sum, scale, _mm512_load_ps(into + r * 16)));
    });
}

// Tile 4 times 6 and 7, into sums 0 and 1. GCC's intrinsics want numbers that are written out.
template <bool kBytes>
QUANTKIT_AMX inline void multiply_first() {
    if constexpr (kBytes) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
    } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
}

// Of two panels tile 5, of one 4 again, times 6 and 7, into sums 2 and 3.
template <bool kBytes, bool kTwo>
QUANTKIT_AMX inline void multiply_second() {
    if constexpr (kBytes && kTwo) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    } else if constexpr (kBytes) {
        _tile_dpbssd(2, 4, 6);
        _tile_dpbssd(3, 4, 7);
    } else if constexpr (kTwo) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    } else {
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 7);
    }
}

// Step kFrom of kSteps and those after it; with kAdd the last product's sums are added meanwhile.
template <bool kBytes, bool kTwo, int kSteps, bool kAdd, int kFrom = 0>
QUANTKIT_AMX QUANTKIT_INLINE inline void multiply_steps(const char* x, int64_t panel_bytes, const char* tiles,
                                                        const char* more, const Pending& last) {
    if constexpr (kFrom < kSteps) {
        constexpr int kPart = kFrom * kParts / kSteps, kEnd = (kFrom + 1) * kParts / kSteps;
        _tile_loadd(4, x, 64);
        _tile_loadd(6, tiles, 64);
        _tile_loadd(7, tiles + kTile, 64);
        multiply_first<kBytes>();
        if constexpr (kTwo) {
            _tile_loadd(5, x + panel_bytes, 64);
        } else {
            _tile_loadd(6, more, 64);
            _tile_loadd(7, more + kTile, 64);
        }
        multiply_second<kBytes, kTwo>();
        if constexpr (kAdd)
            each<kEnd - kPart>([&](auto part) QUANTKIT_INLINE { add_part<kBytes, kPart + part>(last); });
        multiply_steps<kBytes, kTwo, kSteps, kAdd, kFrom + 1>(x + kTile, panel_bytes, tiles + 2 * kTile,
                                                              more + 2 * kTile, last);
    }
}

// `rounds` of kSteps of two panels times a pair of tiles of outputs, or of one times two pairs.
template <bool kBytes, bool kTwo, int kSteps>
QUANTKIT_AMX void product(const char* x, int64_t panel_bytes, const char* tiles, const char* more, int64_t rounds,
                          char* sums, const Pending& last) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    multiply_steps<kBytes, kTwo, kSteps, true>(x, panel_bytes, tiles, more, last);
    for (int64_t round = 1; round < rounds; ++round) {
        const int64_t steps = round * kSteps;
        multiply_steps<kBytes, kTwo, kSteps, false>(x + steps * kTile, panel_bytes, tiles + steps * 2 * kTile,
                                                    more + steps * 2 * kTile, last);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kTile, 64);
    _tile_stored(2, sums + 2 * kTile, 64);
    _tile_stored(3, sums + 3 * kTile, 64);
}

// A product of panels at `x` whose sums will be added to `totals`, from the pair of tiles of outputs `half` on.
template <bool kBytes, bool kTwo, int kSteps>
void run(const char* x, int64_t panel_bytes, const char* tiles, int64_t half, int64_t rounds, const __m512 scale[4],
         float* totals, Scratch& own) {
    const int64_t half_bytes = rounds * kSteps * 2 * kTile;
    char* sums = own.sums + own.turn * 4 * kTile;
    product<kBytes, kTwo, kSteps>(x, panel_bytes, tiles + half * half_bytes, tiles + half_bytes, rounds, sums,
                                  own.last);
    own.turn ^= 1;
    own.last.sums = sums;
    for (int64_t tile = 0; tile < 4; ++tile) {
        const int64_t output = kTwo ? half * 2 + tile % 2 : tile;
        own.last.scale[tile] = scale[output];
        own.last.totals[tile] = totals + (kTwo ? tile / 2 * kTotals : 0) + output * 256;
    }
}

// Panels at `x` times `rounds` of kSteps: pairs of panels for one half of the outputs or both, the odd last panel alone.
template <bool kBytes, int kSteps>
void products(const char* x, int64_t panel_bytes, int64_t panels, const char* tiles, int64_t rounds,
              const __m512 scale[4], float* totals, Scratch& own) {
    // What lies in the L1 cache comes around soonest: of one round both pairs of tiles, of several one of them.
    const int64_t outer = rounds > 1 ? 2 : 1;
    for (int64_t first = 0; first < outer; ++first)
        for (int64_t panel = 0; panel + 1 < panels; panel += 2)
            for (int64_t half = first; half < 2; half += outer)
                run<kBytes, true, kSteps>(x + panel * panel_bytes, panel_bytes, tiles, half, rounds, scale,
                                          totals + panel * kTotals, own);
    if (panels % 2)
        run<kBytes, false, kSteps>(x + (panels - 1) * panel_bytes, panel_bytes, tiles, 0, rounds, scale,
                                   totals + (panels - 1) * kTotals, own);
}

template <bool kBytes>
inline void group_scales(const Int4Problem& p, int64_t group, int64_t column, __m512 scale[4]) {
    for (int j = 0; j < 4; ++j) {
        scale[j] = load_scales(p, group, column + 16 * j);
        if (kBytes && p.half) scale[j] = _mm512_mul_ps(scale[j], _mm512_set1_ps(0.5f));
    }
}

// Groups [begin, end) of a block -> tiles; where activations are half-integers, constants [64] are added to.
template <bool kBytes>
void expand(const Work& work, int64_t block, int64_t begin, int64_t end, char* tiles, float* constants) {
    const Int4Problem& p = work.p;
    const int64_t group_steps = p.group / kStep<kBytes>;
    const int64_t steps = work.scaled ? (end - begin) * group_steps : group_steps;
    for (int64_t group = begin; group < end; ++group) {
        const uint8_t* from = p.weight + block * 32 * p.k + group * p.group * 32;
        char* into = tiles + (group - begin) * group_steps * (work.scaled ? 2 : 4) * kTile;
        __m512 scale[4];
        group_scales<kBytes>(p, group, block * kBlock, scale);
        if (work.scaled) {
            expand_scaled(from, p.group, p.half, scale, into, steps);
        } else if (!kBytes) {
            expand_bf16(from, p.group, p.half, into, steps);
        } else if (p.kind != kInt8Half) {
            expand_bytes(from, p.group, p.half, into, steps, nullptr);
        } else {
            __m512i sums[4] = {};
            expand_bytes(from, p.group, p.half, into, steps, sums);
            for (int j = 0; j < 4; ++j) {
                const __m512 half = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[j]), _mm512_set1_ps(0.5f));
                const __m512 old = _mm512_load_ps(constants + 16 * j);
                _mm512_store_ps(constants + 16 * j, _mm512_fmadd_ps(half, scale[j], old));
            }
        }
    }
}

// One block of 64 outputs for a chunk of panels and a slab of the inputs; the slabs of a chunk add up in
// `place`, the block's constants [64] and then the panels' totals, and the last one writes.
template <bool kBytes, int kSteps>
void block_of_chunk(const Work& work, int64_t first, int64_t panels, int64_t block, int64_t slab, float* place,
                    Scratch& own) {
    const Int4Problem& p = work.p;
    const int64_t group_steps = p.group / kStep<kBytes>, begin = slab * work.slab_groups;
    const int64_t end = begin + work.slab_groups < work.groups ? begin + work.slab_groups : work.groups;
    const int64_t panel_bytes = (end - begin) * group_steps * kTile;
    const char* x = work.x + begin * group_steps * work.panels * kTile + first * panel_bytes;
    float *constants = place, *totals = place + kBlock;
    if (!slab) std::memset(place, 0, (kBlock + panels * kTotals) * sizeof(float));
    // A slab that is used once needs no place of its own.
    const bool once = panels <= kHeld && !work.scaled;
    if (!once) expand<kBytes>(work, block, begin, end, own.tiles, constants);
    if (work.scaled) {
        const __m512 one = _mm512_set1_ps(1.0f), scale[4] = {one, one, one, one};
        const int64_t rounds = (end - begin) * group_steps / kSteps;
        products<kBytes, kSteps>(x, panel_bytes, panels, own.tiles, rounds, scale, totals, own);
    } else {
        for (int64_t held = 0; held < panels; held += kHeld) {
            const int64_t count = panels - held < kHeld ? panels - held : kHeld;
            for (int64_t group = begin; group < end; ++group) {
                char* tiles = own.tiles + (once ? 0 : (group - begin) * kSteps * 4 * kTile);
                if (once) expand<kBytes>(work, block, group, group + 1, tiles, constants);
                __m512 scale[4];
                group_scales<kBytes>(p, group, block * kBlock, scale);
                products<kBytes, kSteps>(x + held * panel_bytes + (group - begin) * kSteps * kTile, panel_bytes, count,
                                         tiles, 1, scale, totals + held * kTotals, own);
            }
        }
    }
    each<kParts>([&](auto part) QUANTKIT_INLINE { add_part<kBytes, part>(own.last); });
    own.rest();
    if (end < work.groups) return;
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t r = 0; r < kPanel && (first + panel) * kPanel + r < p.m; ++r) {
            __m512 sums[4];
            for (int j = 0; j < 4; ++j) {
                const __m512 total = _mm512_load_ps(totals + panel * kTotals + j * 256 + r * 16);
                sums[j] = _mm512_add_ps(total, _mm512_load_ps(constants + 16 * j));
            }
            write_row(p, (first + panel) * kPanel + r, block * kBlock, sums);
        }
}

template <bool kBytes, int kSteps>
bool multiply(const Int4Problem& p, int threads, bool scaled) {
    const int64_t panels = (p.m + kPanel - 1) / kPanel, blocks = p.n / kBlock, stride = kStrip * threads;
    const int64_t place = kBlock + (panels < kChunk ? panels : kChunk) * kTotals;
    const bool few = panels <= kHeld;
    Work work{p, nullptr, panels, p.k / p.group, 0, scaled};
    // Few panels take the weight as it comes; for more, a strip's totals stay in the cache from slab to slab.
    work.slab_groups = few ? work.groups : kSlab / p.group;
    const int64_t slabs = (work.groups + work.slab_groups - 1) / work.slab_groups;
    char* packed = scratch<char>(panels * (p.k / kStep<kBytes>)*kTile);
    float* places = scratch<float>(stride * place);
    bool complete = packed && places;
    work.x = packed;
#pragma omp parallel num_threads(threads) if (complete)
    {
        const int64_t expanded = (few ? 1 : work.slab_groups) * p.group / kStep<kBytes>;
        Scratch own{scratch<char>(expanded * 4 * kTile), scratch<char>(9 * kTile), {}};
        const bool mine = complete && own.tiles && own.sums;
        // Rows that few tiles leave alone are added too: denormals there would be slow.
        if (mine) std::memset(own.sums, 0, 9 * kTile);
        own.rest();
        configure_tiles(p.m < kPanel ? p.m : kPanel);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; ++panel)
            if (mine) pack_panel<kBytes>(work, panel, packed);
        for (int64_t first = 0; first < panels; first += kChunk) {
            const int64_t count = panels - first < kChunk ? panels - first : kChunk;
            for (int64_t strip = 0; strip < blocks; strip += stride) {
                for (int64_t slab = 0; slab < slabs; ++slab) {
                    // Every loop runs over all places of a strip, so that a place's totals stay with one
                    // thread and none needs to wait for another; in turns, since the last strip may
                    // be short.
#pragma omp for schedule(static, 1) nowait
                    for (int64_t at = 0; at < stride; ++at)
                        if (mine && strip + at < blocks)
                            block_of_chunk<kBytes, kSteps>(work, first, count, strip + at, slab, places + at * place,
                                                           own);
                }
            }
        }
        release_tiles();
        std::free(own.tiles);
        std::free(own.sums);
        if (!mine) {
#pragma omp atomic write
            complete = false;
        }
    }
    std::free(packed);
    std::free(places);
    return complete;
}

template <bool kBytes, int kSteps>
bool exactly(const Int4Problem& p, int threads) {
    return multiply<kBytes, kSteps>(p, threads, false);
}

bool nearly(const Int4Problem& p, int threads) { return multiply<false, kRound>(p, threads, true); }

}  // namespace

Int4Linear int4_tiles(const Int4Problem& p) {
    const bool small_group = p.group == 32 || p.group == 64 || p.group == 128 || p.group == 256;
    if (!small_group) return nullptr;
    if (p.kind >= kInt8) {
        switch (p.group) {
            case 64: return exactly<true, 1>;
            case 128: return exactly<true, 2>;
            case 256: return exactly<true, 4>;
        }
    }
    if (!p.out_float && p.m > kHeld * kPanel && p.k % (kRound * kStep<false>) == 0) return nearly;
    switch (p.group) {
        case 32: return exactly<false, 1>;
        case 64: return exactly<false, 2>;
        case 128: return exactly<false, 4>;
        default: return exactly<false, 8>;
    }
}
