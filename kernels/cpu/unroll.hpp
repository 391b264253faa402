// Loops over arrays of registers.
//
// GCC unrolls a plain loop too late to see that its array could live in registers, and then writes every
// element to memory on every round: half the speed. Here the indices are constants from the start.

#pragma once

#include <type_traits>

#define QUANTKIT_INLINE __attribute__((always_inline))

namespace {

// f(0), f(1) ... f(N - 1), the indices known to the compiler. Write f as [&](auto i) QUANTKIT_INLINE {...}.
template <int N, int I = 0, typename F>
QUANTKIT_INLINE inline void each(const F& f) {
    if constexpr (I < N) {
        f(std::integral_constant<int, I>{});
        each<N, I + 1>(f);
    }
}

// The same over pairs (0, 0), (0, 1) ... (N - 1, M - 1).
template <int N, int M, typename F>
QUANTKIT_INLINE inline void pairs(const F& f) {
    each<N>([&](auto i) QUANTKIT_INLINE { each<M>([&](auto j) QUANTKIT_INLINE { f(i, j); }); });
}

}  // namespace
