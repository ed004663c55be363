// Blocks of HEIGHT outputs by `cols` inputs, each block's weights stored input by input. Dense is one block a panel.
#pragma once
#include "tile.h"

namespace trimtab::ISA {

// Bytes of weights that stay in the second-level cache while the rows of x go by.
constexpr int64_t KEEP = 256 << 10;

template <int HEIGHT, class T>
void linear_block(const Weights& w, const float* x, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    constexpr int64_t step = sizeof(T) == 2 ? 2 : 1;  // bfloat16 inputs come in pairs
    const T* values = reinterpret_cast<const T*>(w.values);
    const int64_t cols = w.cols, block = (cols + step - 1) / step * step * HEIGHT;
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
                        tile.add(values + i * block + k * HEIGHT, x + row * w.in + at + k, w.in, std::min(part, cols - k));
                    }
                    tile.close(y + row * w.out, w.out, p * HEIGHT);
                });
                fresh = false;
            }
        }
    }
}

}  // namespace trimtab::ISA
