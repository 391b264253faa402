// What packing and attention know of INT4 keys and values: where the vectors are, and how bytes become numbers.
//
// A vector of D numbers is D / 2 bytes (byte i: element i low, element i + D / 2 high, both q + 8) and a
// scale, behind them or (planar) behind the codes of all tokens.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "vectors.hpp"

namespace {

constexpr int64_t kWidest = 512; // half of the longest vector, in whole registers

inline __m512 code_table() {
    return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
}

// Where a packed tensor's vectors are, [B, H, S] of them; `strides` as they come from Python.
struct Vectors {
    uint8_t* data;
    int64_t batch, head, token;       // strides in bytes
    int64_t scales, scale_token;      // where the first scale is, and the bytes to the next
    bool float8;                      // the scale's type, else bf16

    Vectors(const uint8_t* data, const int64_t* strides, bool float8)
        : data(const_cast<uint8_t*>(data)), batch(strides[0]), head(strides[1]), token(strides[2]),
          scales(strides[3]), scale_token(strides[4]), float8(float8) {}
    Vectors() = default;

    uint8_t* at(int64_t b, int64_t h, int64_t s) const { return data + b * batch + h * head + s * token; }
    uint8_t* scale_at(int64_t b, int64_t h, int64_t s) const {
        return data + b * batch + h * head + scales + s * scale_token;
    }
    float scale(const uint8_t* at) const {
        if (float8) return _mm512_cvtss_f32(from_float8(_mm512_set1_epi32(*at)));
        uint16_t bits;
        std::memcpy(&bits, at, 2);
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
};

// 16 bytes -> the numbers of their low and of their high nibbles; absent bytes give -8.
inline void expand(const uint8_t* bytes, __mmask16 mask, __m512 table, __m512& low, __m512& high) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes));
    low = _mm512_permutexvar_ps(wide, table);  // which reads four bits of each index
    high = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), table);
}

}  // namespace
