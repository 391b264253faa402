// Offline: 2 X^T X of calibration inputs, their numbers rounded to bf16 and the products added up in float32. oneDNN has
// it with AMX alone; elsewhere its float32 products take twice the time.

#include <algorithm>

#include "bf16_tile.hpp"
#include "vectors.hpp"

namespace {

constexpr int kRows = 8, kBlocks = 3;  // a tile of sums in registers: 8 x 48

// Columns [first, first + 16) of x float [tokens, k] as pairs of bf16 of two consecutive tokens; zeros beyond both ends.
void pack(const float* x, int64_t stride, int64_t tokens, int64_t first, int64_t k, uint32_t* out) {
    const __mmask16 mask = left(first, k);
    for (int64_t t = 0; t < tokens; t += 2, out += kLanes) {
        const __m512 even = _mm512_maskz_loadu_ps(mask, x + t * stride + first);
        const __m512 odd = t + 1 < tokens ? _mm512_maskz_loadu_ps(mask, x + (t + 1) * stride + first) : __m512{};
        _mm512_storeu_si512(out, pair_up((__m256i)_mm512_cvtneps_pbh(even), (__m256i)_mm512_cvtneps_pbh(odd)));
    }
}

// Adds twice the products of 8 columns (within the block `a`) and of those in `count` blocks from `b` on, over `length`
// pairs of tokens, to out [8, 16 * count] with rows k apart; `rows` and `mask` say what of it is there.
template <int count>
void tile(const uint32_t* a, const uint32_t* b, int64_t length, float* out, int64_t k, int64_t rows, __mmask16 mask) {
    const __m512 two = _mm512_set1_ps(2.0f);
    bf16_tile<kRows, count>(a, 1, kLanes, b, length * kLanes, length, [&](auto r, auto q, __m512 sum) QUANTKIT_INLINE {
        if (r >= rows) return;
        const __mmask16 here = q == count - 1 ? mask : 0xffff;
        float* at = out + r * k + q * kLanes;
        _mm512_mask_storeu_ps(at, here, _mm512_fmadd_ps(two, sum, _mm512_maskz_loadu_ps(here, at)));
    });
}

}  // namespace

// x float [tokens, k] with rows `stride` apart, room for uint32 [ceil(k / 16), ceil(tokens / 2), 16] in `packed`; hessian
// float [k, k]: of its rows [s, s + strip), s a multiple of `strip`, all columns from s on are added to, and some before.
extern "C" void quantkit_hessian(const float* x, int64_t stride, int64_t tokens, int64_t k, int64_t strip,
                                 uint32_t* packed, float* hessian, int threads) {
    const int64_t blocks = (k + kLanes - 1) / kLanes, length = (tokens + 1) / 2, panels = (blocks + kBlocks - 1) / kBlocks;
    const int64_t size = length * kLanes;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block)
            pack(x, stride, tokens, block * kLanes, k, packed + block * size);
        // The last panels have the most rows: they come first.
#pragma omp for schedule(dynamic)
        for (int64_t panel = panels - 1; panel >= 0; --panel) {
            const int64_t first = panel * kBlocks, count = std::min<int64_t>(kBlocks, blocks - first);
            const int64_t column = first * kLanes, last = column + count * kLanes;
            const __mmask16 mask = left(last - kLanes, k);
            // Down to the end of the strip that its last column lies in.
            const int64_t end = std::min(k, (std::min(last, k) - 1) / strip * strip + strip);
            for (int64_t row = 0; row < end; row += kRows) {
                const uint32_t* a = packed + row / kLanes * size + row % kLanes;
                const uint32_t* b = packed + first * size;
                float* out = hessian + row * k + column;
                const int64_t rows = std::min<int64_t>(kRows, end - row);
                if (count == 3) tile<3>(a, b, length, out, k, rows, mask);
                if (count == 2) tile<2>(a, b, length, out, k, rows, mask);
                if (count == 1) tile<1>(a, b, length, out, k, rows, mask);
            }
        }
    }
}
