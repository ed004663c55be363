// n of every 4 weights of a row: their values, and two bits each that pick the input they meet.
#pragma once
#include "tile.h"

namespace trimtab::ISA {

template <class T>
inline Vec widen(const T* p) {
    if constexpr (sizeof(T) == 2) return Vec::bf16(p);
    else return Vec::load(p);
}

template <class T, int ROWS>
inline void nm_tile(const Weights& w, const T* values, const std::byte* bits, const float* x, float* y, int64_t first) {
    constexpr int V = PANEL / Vec::N;
    Tile<PANEL, ROWS> tile;
    tile.open(y, w.out, first, true);
    for (int64_t g = 0; g < w.in; g += 4) {
        for (int j = 0; j < w.n; ++j, values += PANEL, bits += PANEL / 4) {
            for (int v = 0; v < V; ++v) {
                const Vec a = widen(values + v * Vec::N);
                for (int r = 0; r < ROWS; ++r)
                    tile.sum[r][v] = tile.sum[r][v].fma(a, Vec::pick(x + r * w.in + g, bits + v * Vec::N / 4));
            }
        }
    }
    tile.close(y, w.out, first);
}

template <class T>
void linear_nm(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    const float* x = static_cast<const float*>(ready);
    const int64_t each = w.in / 4 * w.n * PANEL;  // values a panel has
    for (int64_t p = begin; p < end; ++p) {
        const T* values = reinterpret_cast<const T*>(w.values) + p * each;
        const std::byte* bits = w.bits + p * each / 4;
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
            nm_tile<T, ROWS>(w, values, bits, x + row * w.in, y + row * w.out, p * PANEL);
        });
    }
}

}  // namespace trimtab::ISA
