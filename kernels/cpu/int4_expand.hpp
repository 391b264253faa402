// Packed INT4 weights -> what products read: pairs in registers, or AMX tiles of bytes, of bf16, of scaled bf16.
//
// A block of the weight is 64 output rows; for each input k it has 32 bytes whose low nibbles u = q + 8 are rows 0..31 and
// whose high nibbles are rows 32..63.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "int4_linear.hpp"
#include "unroll.hpp"

namespace {

constexpr int64_t kAhead = 4096;  // bytes of the weight that are asked for ahead of their use
constexpr int64_t kTile = 1024;   // bytes of a tile

template <bool kBytes>
constexpr int64_t kStep = kBytes ? 64 : 32;  // inputs in a tile

// Two inputs of a block -> bf16 pairs of its 64 rows.
class PairExpander {
  public:
    explicit PairExpander(bool half) {
        alignas(64) bf16 values[32];
        // Twice: vpermw reads five bits of an index, of which one is another row's.
        for (int i = 0; i < 32; ++i) values[i] = to_bf16((i & 15) - 8 + (half ? 0.5f : 0.0f));
        table_ = _mm512_load_si512(values);
        alignas(64) uint8_t index[2][64] = {};
        for (int r = 0; r < 32; ++r)
            for (int input = 0; input < 2; ++input)
                index[r / 16][r % 16 * 4 + input * 2] = static_cast<uint8_t>(input * 32 + r);
        low_ = _mm512_load_si512(index[0]);
        high_ = _mm512_load_si512(index[1]);
    }

    // 64 bytes, [2 inputs][32]: low nibbles are rows 0..31, high ones 32..63 -> w [4][16 rows][2].
    QUANTKIT_INLINE void operator()(const uint8_t* bytes, __m512i w[4]) const {
        _mm_prefetch(reinterpret_cast<const char*>(bytes + kAhead), _MM_HINT_T0);
        const __m512i both = _mm512_loadu_si512(bytes);
        const __m512i a = _mm512_permutexvar_epi8(low_, both), b = _mm512_permutexvar_epi8(high_, both);
        w[0] = _mm512_permutexvar_epi16(a, table_);
        w[1] = _mm512_permutexvar_epi16(b, table_);
        w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(a, 4), table_);
        w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), table_);
    }

  private:
    __m512i table_, low_, high_;
};

// The values of a nibble as bytes: q, or 2 q + 1.
inline __m512i byte_table(bool half) {
    alignas(16) int8_t table[16];
    for (int u = 0; u < 16; ++u) table[u] = static_cast<int8_t>(half ? 2 * u - 15 : u - 8);
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

// Of four inputs of 32 bytes, in two vectors: [16 rows from `first`][4 inputs].
inline __m512i quads_from(int first) {
    alignas(64) uint8_t index[64];
    for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(i % 4 * 32 + first + i / 4);
    return _mm512_load_si512(index);
}

// Where input k of the four tiles of outputs goes, of a slab of `steps`: [2 pairs of tiles][steps][2 tiles].
template <bool kBytes>
QUANTKIT_INLINE inline void put(char* tiles, int64_t steps, int64_t k, const __m512i w[4]) {
    char* into = tiles + k / kStep<kBytes> * 2 * kTile + k % kStep<kBytes> * (kTile / kStep<kBytes>);
    each<4>([&](auto j) QUANTKIT_INLINE {
        _mm512_store_si512(into + j / 2 * steps * 2 * kTile + j % 2 * kTile, w[j]);
    });
}

// A group of a block, [inputs][32 bytes] -> bytes, a tile is [16 quads][16][4];
// total [4], unless null, += the sums of each output's bytes.
void expand_bytes(const uint8_t* bytes, int64_t inputs, bool half, char* tiles, int64_t steps, __m512i* total) {
    const __m512i table = byte_table(half), low = quads_from(0), high = quads_from(16);
    const __m512i nibble = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
    for (int64_t k = 0; k < inputs; k += 4) {
        const uint8_t* at = bytes + k * 32;
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + 64), _MM_HINT_T0);
        const __m512i x = _mm512_loadu_si512(at), y = _mm512_loadu_si512(at + 64);
        const __m512i a = _mm512_permutex2var_epi8(x, low, y), b = _mm512_permutex2var_epi8(x, high, y);
        const __m512i codes[4] = {a, b, _mm512_srli_epi16(a, 4), _mm512_srli_epi16(b, 4)};
        __m512i w[4];
        each<4>([&](auto j) QUANTKIT_INLINE {
            w[j] = _mm512_shuffle_epi8(table, _mm512_and_si512(codes[j], nibble));
            if (total) total[j] = _mm512_dpbusd_epi32(total[j], ones, w[j]);
        });
        put<true>(tiles, steps, k, w);
    }
}

// The same -> bf16, a tile is [16 pairs][16][2].
void expand_bf16(const uint8_t* bytes, int64_t inputs, bool half, char* tiles, int64_t steps) {
    const PairExpander expander(half);
    for (int64_t k = 0; k < inputs; k += 2) {
        __m512i w[4];
        expander(bytes + k * 32, w);
        put<false>(tiles, steps, k, w);
    }
}

// The same times the outputs' scales.
void expand_scaled(const uint8_t* bytes, int64_t inputs, bool half, const __m512 scale[4], char* tiles, int64_t steps) {
    const PairExpander expander(half);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(i % 2 * 16 + i / 2);
    const __m512i woven = _mm512_load_si512(index);
    for (int64_t k = 0; k < inputs; k += 2) {
        __m512i w[4];
        expander(bytes + k * 32, w);
        each<4>([&](auto j) QUANTKIT_INLINE {
            // A pair of bf16 is two float32: the first shifted up, the second with the first masked off.
            const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(w[j], 16));
            const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(w[j], upper));
            const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(second, scale[j]), _mm512_mul_ps(first, scale[j]));
            w[j] = _mm512_permutexvar_epi16(woven, (__m512i)both);
        });
        put<false>(tiles, steps, k, w);
    }
}

}  // namespace
