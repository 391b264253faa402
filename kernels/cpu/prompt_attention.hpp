// A prompt's queries, keys and values in 16 bits, and how they are laid out for products of pairs.
//
//   by dims:   16 tokens x D -> [D / 2][16] pairs of dims, where the sum is over the dims
//   by tokens: tokens x 16   -> [D / 16][tokens / 2][16] pairs of tokens, where the sum is over the tokens

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "bf16_tile.hpp"
#include "vectors.hpp"

namespace {

constexpr int64_t kQueries = 32, kKeys = 384;  // of a block: what lies between the products stays in the L2 cache
constexpr int kRows = 8;                       // of a tile

// bf16 [B, H, tokens, D], D contiguous; the strides are even.
struct Heads {
    const uint16_t* data;
    int64_t batch, head, token;

    Heads(const uint16_t* data, const int64_t* strides)
        : data(data), batch(strides[0]), head(strides[1]), token(strides[2]) {}
    const uint16_t* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// Query t of `tokens` is the token before() + t of `length`, and sees the `window` keys up to its own (0: all).
struct Prompt {
    Heads query, key, value;
    int64_t batches, heads, kv_heads, tokens, length, dim;
    float scaling;
    int64_t window;

    Prompt(const Heads& query, const Heads& key, const Heads& value, const int64_t* sizes, float scaling,
           int64_t window)
        : query(query), key(key), value(value), batches(sizes[0]), heads(sizes[1]), kv_heads(sizes[2]),
          tokens(sizes[3]), length(sizes[4]), dim(sizes[5]), scaling(scaling), window(window) {}

    int64_t pairs() const { return dim / 2; }
    int64_t dims() const { return dim / kLanes; }
    int64_t blocks() const { return (length + kLanes - 1) / kLanes; }      // of 16 keys
    int64_t packed() const { return blocks() * kLanes * pairs(); }         // numbers of one head's keys, or values
    int64_t stride() const { return blocks() * kLanes / 2 * kLanes; }      // from 16 dims to the next, by tokens
    int64_t groups() const { return (tokens + kQueries - 1) / kQueries; }  // of 32 queries
    int64_t before() const { return length - tokens; }
    int64_t rows(int64_t first) const { return std::min(kQueries, tokens - first); }

    // The keys that the 32 queries from `first` on see: [begin, end), begin a multiple of 16.
    int64_t begin(int64_t first) const {
        return window ? std::max<int64_t>(0, before() + first + 1 - window) / kLanes * kLanes : 0;
    }
    int64_t end(int64_t first) const { return std::min(length, before() + first + rows(first)); }
    // Which of the 16 keys from `key` on query t sees; none of a query beyond the last.
    __mmask16 sees(int64_t t, int64_t key) const {
        const int64_t to = t < tokens ? before() + t + 1 : 0, from = window ? to - window : 0;
        __mmask16 seen = to > key ? left(key, to) : 0;
        if (from > key) seen &= from - key >= 16 ? 0 : static_cast<__mmask16>(0xffffu << (from - key));
        return seen;
    }
};

// Tokens [first, first + 16) of a head, those from `length` on zeros, by dims -> [D / 2][16].
void pack_by_dims(const uint16_t* head, int64_t token, int64_t first, int64_t length, int64_t dim, uint32_t* out) {
    const __mmask16 there = left(first, length);
    const int* from = reinterpret_cast<const int*>(head + first * token);
    const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(static_cast<int>(token / 2)));
    for (int64_t p = 0; p < dim / 2; ++p)
        _mm512_storeu_si512(out + p * kLanes,
                            _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, places, from + p, 4));
}

// The same tokens by tokens -> the pairs from `pair` on of [D / 16][stride / 16][16].
void pack_by_tokens(const uint16_t* head, int64_t token, int64_t first, int64_t length, int64_t dim, int64_t stride,
                    int64_t pair, uint32_t* out) {
    for (int64_t d = 0; d < dim / kLanes; ++d)
        for (int64_t p = 0; p < kLanes / 2; ++p) {
            __m256i two[2];
            for (int64_t i = 0; i < 2; ++i) {
                const int64_t at = first + 2 * p + i;
                two[i] = _mm256_maskz_loadu_epi16(at < length ? 0xffff : 0, head + at * token + d * kLanes);
            }
            _mm512_storeu_si512(out + d * stride + (pair + p) * kLanes, pair_up(two[0], two[1]));
        }
}

// `rows` tokens of a head from `first` on -> [32, D], zeros beyond the last.
void take_rows(const uint16_t* head, int64_t token, int64_t first, int64_t rows, int64_t dim, uint16_t* out) {
    for (int64_t r = 0; r < rows; ++r)
        std::memcpy(out + r * dim, head + (first + r) * token, dim * sizeof(uint16_t));
    std::memset(out + rows * dim, 0, (kQueries - rows) * dim * sizeof(uint16_t));
}

// finish(r, c, sums): row r and the 16 columns from c on, of all rows (to a multiple of 8) and blocks of columns; the other
// arguments as `bf16_tile`'s.
template <typename Finish>
inline void product(int64_t rows, int64_t blocks, const uint32_t* a, int64_t row, int64_t pair, const uint32_t* b,
                    int64_t block, int64_t length, const Finish& finish) {
    for (int64_t r = 0; r < rows; r += kRows)
        for (int64_t j = 0, width; j < blocks; j += width) {
            width = blocks - j == 4 ? 2 : std::min<int64_t>(blocks - j, 3);
            const uint32_t *some = a + r * row, *columns = b + j * block;
            const auto done = [&](auto i, auto q, __m512 sum) QUANTKIT_INLINE { finish(r + i, (j + q) * kLanes, sum); };
            if (width == 3) bf16_tile<kRows, 3>(some, row, pair, columns, block, length, done);
            else if (width == 2) bf16_tile<kRows, 2>(some, row, pair, columns, block, length, done);
            else bf16_tile<kRows, 1>(some, row, pair, columns, block, length, done);
        }
}

}  // namespace
