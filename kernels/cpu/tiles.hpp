// AMX tiles of 16 rows by 64 bytes, and scratch memory.

#pragma once

#include <immintrin.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#define QUANTKIT_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8")))

namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// For the calling thread; the state is its own, so every parallel region configures and releases. Tiles 0 to 5, sums and
// A, have `rows` rows: a product takes a cycle for each.
QUANTKIT_AMX inline void configure_tiles(int64_t rows = 16) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.bytes[tile] = 64;
        config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : 16);
    }
    // The intrinsic reads 64 bytes, but GCC is told of eight and would drop the other stores.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

QUANTKIT_AMX inline void release_tiles() { _tile_release(); }

// Memory that starts at a line of the cache; much of it in large pages, which panels far apart need.
template <typename T>
T* scratch(int64_t count) {
    constexpr int64_t kLine = 64, kLarge = 2 << 20;
    const int64_t wanted = count * static_cast<int64_t>(sizeof(T));
    const int64_t unit = wanted < kLarge ? kLine : kLarge;
    const int64_t bytes = (wanted + unit - 1) / unit * unit;
    void* memory = std::aligned_alloc(unit, bytes ? bytes : unit);
    if (memory && unit == kLarge) madvise(memory, bytes, MADV_HUGEPAGE);
    return static_cast<T*>(memory);
}

}  // namespace
