// Blocks of HEIGHT outputs by `cols` inputs, each block's weights stored input by input. Dense is one block a panel.
#pragma once
#include "input.h"
#include "tile.h"

namespace trimtab::ISA {

// Bytes of weights that stay in the second-level cache while the rows of x go by.
constexpr int64_t KEEP = 256 << 10;

// X: float, or uint16_t for bfloat16, whose inputs are filled up to pairs; in tiles.
template <int HEIGHT, class T, class X>
inline void blocks(const Weights& w, const X* x, int64_t batch, float* y, int64_t begin, int64_t end) {
    constexpr int64_t step = sizeof(T) == 2 ? 2 : 1;  // bfloat16 inputs come in pairs
    const T* values = reinterpret_cast<const T*>(w.values);
    const int64_t cols = w.cols, block = (cols + step - 1) / step * step * HEIGHT;
    const int64_t width = sizeof(X) == 2 ? (w.in + 1) / 2 * 2 : w.in;
    const int64_t inputs = std::max<int64_t>(step, KEEP / (HEIGHT * int64_t(sizeof(T))) / step * step);
    for (int64_t p = begin; p < end; ++p) {
        const int64_t first = w.pointers ? w.pointers[p] : p, last = w.pointers ? w.pointers[p + 1] : p + 1;
        bool fresh = true;
        // Some blocks, or a part of a wide one, for all rows of x; then the next.
        const int64_t some = std::max<int64_t>(1, inputs / cols), part = std::min(cols, inputs);
        for (int64_t b = first; b < last || fresh; b += some) {
            const int64_t until = std::min(last, b + some);
            for (int64_t k = 0; k < cols; k += part) {
                tiles<HEIGHT>(batch, [&]<int ROWS>(int64_t row) {
                    Tile<HEIGHT, ROWS> tile;
                    tile.open(y + row * w.out, w.out, p * HEIGHT, fresh);
                    for (int64_t i = b; i < until; ++i) {
                        const int64_t at = w.columns ? int64_t(w.columns[i]) * cols : 0;
                        tile.add(values + i * block + k * HEIGHT, x + row * width + (at + k) * ROWS, std::min(part, cols - k));
                    }
                    tile.close(y + row * w.out, w.out, p * HEIGHT);
                });
                fresh = false;
            }
        }
    }
}

// Dense with one row of x.
template <class T, class X>
inline void one_row(const Weights& w, const X* x, float* y, int64_t p) {
    constexpr int64_t some = sizeof(T) == 2 ? 2 : 1;  // inputs that lie side by side
    const int64_t each = (w.in + some - 1) / some * some * PANEL;
    const T* at = reinterpret_cast<const T*>(w.values) + p * each;
    Tile<PANEL, 1> tile;
    tile.open(y, w.out, 0, true);
    for (int64_t i = 0; i + some <= w.in; i += some, at += some * PANEL) {
        for (int k = 0; k < some * PANEL * int(sizeof(T)); k += 64) __builtin_prefetch(reinterpret_cast<const std::byte*>(at) + AHEAD + k);
        tile.add(at, x + i, some);
    }
    if (const int64_t left = w.in % some) tile.add(at, x + w.in - left, left);
    tile.close(y, w.out, p * PANEL);
}

template <class T, class X>
inline void dense(const Weights& w, const X* x, int64_t batch, float* y, int64_t begin, int64_t end) {
    if (batch > 1) return blocks<PANEL, T>(w, x, batch, y, begin, end);
    for (int64_t p = begin; p < end; ++p) one_row<T>(w, x, y, p);
}

template <class T>
void linear_dense(const Weights& w, const void* x, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    dense<T>(w, static_cast<const float*>(x), batch, y, begin, end);
}

template <int HEIGHT, class T>
void linear_block(const Weights& w, const void* x, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    blocks<HEIGHT, T>(w, static_cast<const float*>(x), batch, y, begin, end);
}

#if defined(__AVX512BF16__)
// x was rounded to bfloat16, which loses nothing where it came as bfloat16: two products an instruction and lane.
inline void linear_dense_bf16(const Weights& w, const void* x, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    dense<uint16_t>(w, static_cast<const uint16_t*>(x), batch, y, begin, end);
}

template <int HEIGHT>
void linear_block_bf16(const Weights& w, const void* x, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    blocks<HEIGHT, uint16_t>(w, static_cast<const uint16_t*>(x), batch, y, begin, end);
}
#endif

}  // namespace trimtab::ISA
