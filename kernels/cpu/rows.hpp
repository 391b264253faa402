// Rows of activations, and their quantization: what rows.cpp and hadamard.cpp share.

#pragma once

#include <cstdint>

constexpr int64_t kParallel = 1 << 15;  // elements below which a second thread costs more than it gives

enum Form : int { kFloat8 = 0, kInteger = 1, kHalfInteger = 2 };

struct Rows {
    const void* x;
    bool is_float;  // else bf16
    int64_t stride, m, k;
    int form;
    float low, high;  // the codes' range; for FP8 448 is the largest value
    float factor;     // step = largest / factor; of the half-integer grid rms * factor
    void* codes;
    float* scale;
};

// Row `row` of x -> its codes and its scale.
void quantkit_quantize_row(const Rows& rows, int64_t row);

inline int useful_threads(int threads, int64_t m, int64_t k) { return m < 2 || m * k < kParallel ? 1 : threads; }
