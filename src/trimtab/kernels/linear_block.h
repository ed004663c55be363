// Blocks of HEIGHT outputs by `cols` inputs, each block's weights stored input by input. Dense is one block a panel.
#pragma once
#include "input.h"
#include "tile.h"

namespace trimtab::ISA {

// Bytes of weights that stay in the second-level cache while the rows of x go by.
constexpr int64_t KEEP = 256 << 10;

// Calls f(first, last) for runs of panels begin .. end: as many as have no more than `most` blocks, or one that has more.
template <class F>
inline void in_runs(const Weights& w, int64_t most, int64_t begin, int64_t end, const F& f) {
    for (int64_t p = begin, q; p < end; p = q) {
        for (q = p + 1; q < end && w.first(q + 1) - w.first(p) <= most;) ++q;
        f(p, q);
    }
}

// Inputs of panels HEIGHT high whose values, of this size, stay in the second-level cache.
template <int HEIGHT>
constexpr int64_t kept(int64_t size) { return KEEP / (HEIGHT * size); }

// Inputs k .. k + n of blocks from b on.
struct Part { int64_t b, k, n; };

// Goes over the blocks of panels begin .. end in parts of about `inputs` inputs, each for all rows of x. `load`(panel, from, to, part)
// makes blocks from .. to of a panel ready; `add`(tile, first row, from, to, part) adds them to a tile of it.
template <int HEIGHT, class L, class A>
inline void in_parts(const Weights& w, int64_t inputs, int64_t batch, float* y, int64_t begin, int64_t end, const L& load, const A& add) {
    const int64_t some = std::max<int64_t>(1, inputs / w.cols), most = std::min<int64_t>(w.cols, inputs);
    in_runs(w, some, begin, end, [&](int64_t first, int64_t last) {
        bool fresh = true;
        for (int64_t b = w.first(first); b < w.first(last) || fresh; b += some) {
            auto from = [&](int64_t p) { return std::max(w.first(p), b); };
            auto to = [&](int64_t p) { return std::min(w.first(p + 1), b + some); };
            for (int64_t k = 0; k < w.cols; k += most) {
                const Part part{b, k, std::min(most, w.cols - k)};
                for (int64_t p = first; p < last; ++p) load(p, from(p), to(p), part);
                tiles<HEIGHT>(batch, [&]<int ROWS>(int64_t row) {
                    for (int64_t p = first; p < last; ++p) {
                        Tile<HEIGHT, ROWS> tile;
                        tile.open(y + row * w.out, w.out, p * HEIGHT, fresh);
                        add(tile, row, from(p), to(p), part);
                        tile.close(y + row * w.out, w.out, p * HEIGHT);
                    }
                });
                fresh = false;
            }
        }
    });
}

// Where the values of block i lie as they are stored: `each` to a block, of bfloat16 filled up to pairs of inputs.
template <int HEIGHT, class T>
struct Stored {
    const T* values;
    int64_t each;
    const T* operator()(int64_t i, Part part) const { return values + i * each + part.k * HEIGHT; }
};
constexpr auto as_stored = [](int64_t, int64_t, int64_t, Part) {};

// Elements of a row of x, float, or uint16_t for bfloat16, whose inputs are filled up to pairs.
template <class X>
inline int64_t width_of(const Weights& w) { return sizeof(X) == 2 ? (w.in + 1) / 2 * 2 : w.in; }

// Blocks, whose values `at` finds, times x in tiles.
template <int HEIGHT, class X, class F>
inline auto add_blocks(const Weights& w, const X* x, const F& at) {
    return [&w, x, at, width = width_of<X>(w)]<int ROWS>(Tile<HEIGHT, ROWS>& tile, int64_t row, int64_t from, int64_t to, Part part)
               __attribute__((always_inline)) {
        for (int64_t i = from; i < to; ++i) {
            const int64_t column = w.columns ? int64_t(w.columns[i]) * w.cols : 0;
            tile.add(at(i, part), x + row * width + (column + part.k) * ROWS, part.n);
        }
    };
}

template <int HEIGHT, class T, class X>
inline void blocks(const Weights& w, const X* x, int64_t batch, float* y, int64_t begin, int64_t end) {
    constexpr int64_t step = sizeof(T) == 2 ? 2 : 1;
    const Stored<HEIGHT, T> at{reinterpret_cast<const T*>(w.values), (w.cols + step - 1) / step * step * HEIGHT};
    in_parts<HEIGHT>(w, kept<HEIGHT>(sizeof(T)), batch, y, begin, end, as_stored, add_blocks<HEIGHT>(w, x, at));
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
