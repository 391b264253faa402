// The stored INT4 layout -> torch's native CPU layout (AVX-512 form), without an unpacked copy between.
//
//   stored: int32 [N, K / 8], eight inputs of a row per word, lowest bits first
//   native: blocks of 64 rows, [K][32 bytes]: low nibbles are rows 0..31, high nibbles rows 32..63

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t kBlock = 64;

// One column of words of 64 rows (8 inputs) -> 8 x 32 bytes.
inline void column(const int32_t* words, int64_t row_words, uint8_t* bytes) {
    const __m512i index = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_set1_epi32(static_cast<int>(row_words)));
    const __m512i nibble = _mm512_set1_epi32(15);
    __m512i rows[4];
    for (int part = 0; part < 4; ++part)
        rows[part] = _mm512_i32gather_epi32(index, words + part * 16 * row_words, 4);
    for (int k = 0; k < 8; ++k) {
        for (int half = 0; half < 2; ++half) {
            const __m512i low = _mm512_and_si512(_mm512_srli_epi32(rows[half], 4 * k), nibble);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi32(rows[half + 2], 4 * k), nibble);
            const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 4));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + k * 32 + half * 16),
                             _mm512_cvtepi32_epi8(both));
        }
    }
}

}  // namespace

// words [N, K / 8] -> bytes [N / 64][K][32]; N a multiple of 64, K of 8.
extern "C" void quantkit_int4_pack(const int32_t* words, int64_t n, int64_t k, uint8_t* bytes,
                                   int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < n / kBlock; ++block)
        for (int64_t w = 0; w < k / 8; ++w)
            column(words + block * kBlock * (k / 8) + w, k / 8, bytes + block * 32 * k + w * 8 * 32);
}
