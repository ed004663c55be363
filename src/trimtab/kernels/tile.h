// Sums of one panel for a few rows of x at once, held in registers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

#include "kernel.h"
#include "vec.h"

namespace trimtab::ISA {

// Bytes from what is multiplied now to what is asked of memory: the hardware stops at the end of a page, and a page and a half is what
// codes of few bits gain by.
constexpr int64_t AHEAD = 6144;

// Rows of x a tile takes: as many sums as there are registers, two vectors left for weights.
template <int HEIGHT>
constexpr int tile_rows() {
    constexpr int vectors = HEIGHT / Vec::N, sums = Vec::N == 16 ? 24 : 12;
    return vectors >= sums ? 1 : sums / vectors;
}

// Calls f(0) .. f(N - 1) with constants. Sums that a loop indexes, even one that is unrolled later, are kept in memory.
template <int N, class F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) { (f(std::integral_constant<int, I>()), ...); }
    (std::make_integer_sequence<int, N>());
}
#define EACH(i) [&](auto i) __attribute__((always_inline))

template <int HEIGHT, int ROWS>
struct Tile {
    static constexpr int V = HEIGHT / Vec::N;
    Vec sum[ROWS][V];

    // From y [batch, out], or from zero; a panel at the end may have fewer than HEIGHT outputs.
    [[gnu::always_inline]] void open(const float* y, int64_t out, int64_t first, bool fresh) {
        if (fresh) {
            unrolled<ROWS>(EACH(r) { unrolled<V>(EACH(v) { sum[r][v] = Vec::zero(); }); });
            return;
        }
        unrolled<ROWS>(EACH(r) {
            float part[HEIGHT] = {};
            const int64_t n = std::min<int64_t>(HEIGHT, out - first);
            std::copy_n(y + r * out + first, n, part);
            unrolled<V>(EACH(v) { sum[r][v] = Vec::load(part + v * Vec::N); });
        });
    }
    [[gnu::always_inline]] void close(float* y, int64_t out, int64_t first) const {
        unrolled<ROWS>(EACH(r) {
            float* to = y + r * out + first;
            if (first + HEIGHT <= out) {
                unrolled<V>(EACH(v) { sum[r][v].store(to + v * Vec::N); });
            } else {
                float part[HEIGHT];
                unrolled<V>(EACH(v) { sum[r][v].store(part + v * Vec::N); });
                std::copy_n(part, out - first, to);
            }
        });
    }
    // Many rows leave memory the time to be asked ahead; with few it is busy as it is.
    [[gnu::always_inline]] static void ask_ahead(const void* w) {
        if (ROWS > 4)
            for (int k = 0; k < HEIGHT * 4; k += 64) __builtin_prefetch(static_cast<const std::byte*>(w) + AHEAD + k);
    }
    // w [k, HEIGHT] float32: each input's weights side by side; x [k, ROWS].
    [[gnu::always_inline]] void add(const float* w, const float* x, int64_t k) {
        for (int64_t i = 0; i < k; ++i, w += HEIGHT) {
            Vec a[V];
            unrolled<V>(EACH(v) { a[v] = Vec::load(w + v * Vec::N); });
            ask_ahead(w);
            unrolled<ROWS>(EACH(r) {
                const Vec b = Vec::all(x[i * ROWS + r]);
                unrolled<V>(EACH(v) { sum[r][v] = sum[r][v].fma(a[v], b); });
            });
        }
    }
#if defined(__AVX512BF16__)
    // The same with x [ceil(k / 2), ROWS, 2] in bfloat16.
    [[gnu::always_inline]] void add(const uint16_t* w, const uint16_t* x, int64_t k) {
        for (int64_t i = 0; i < k; i += 2, w += 2 * HEIGHT, x += 2 * ROWS) {
            Vec a[V];
            unrolled<V>(EACH(v) { a[v] = Vec::load(reinterpret_cast<const float*>(w + 2 * v * Vec::N)); });
            ask_ahead(w);
            unrolled<ROWS>(EACH(r) {
                const Vec b = Vec::all(peek<float>(x + 2 * r));
                unrolled<V>(EACH(v) { sum[r][v] = sum[r][v].dot(a[v], b); });
            });
        }
    }
#endif
    // w [ceil(k / 2), HEIGHT, 2] bfloat16: inputs in pairs.
    [[gnu::always_inline]] void add(const uint16_t* w, const float* x, int64_t k) {
        for (int64_t i = 0; i + 1 < k; i += 2, w += 2 * HEIGHT) pair<true>(w, x + i * ROWS, x + (i + 1) * ROWS);
        if (k % 2) pair<false>(w, x + (k - 1) * ROWS, nullptr);
    }
    // One pair, or the first of it.
    template <bool BOTH>
    [[gnu::always_inline]] void pair(const uint16_t* w, const float* first, const float* second) {
        unrolled<V>(EACH(v) {
            const Vec low = Vec::low(w + 2 * v * Vec::N), high = Vec::high(w + 2 * v * Vec::N);
            unrolled<ROWS>(EACH(r) {
                sum[r][v] = sum[r][v].fma(low, Vec::all(first[r]));
                if constexpr (BOTH) sum[r][v] = sum[r][v].fma(high, Vec::all(second[r]));
            });
        });
    }
};

// Calls f<ROWS>(first row) until `batch` rows are done: full tiles, then what is left in fours, twos and ones.
template <int HEIGHT, class F>
inline void tiles(int64_t batch, const F& f) {
    constexpr int most = tile_rows<HEIGHT>();
    int64_t row = 0;
    for (; row + most <= batch; row += most) f.template operator()<most>(row);
    if constexpr (most > 4)
        for (; row + 4 <= batch; row += 4) f.template operator()<4>(row);
    if constexpr (most > 2)
        for (; row + 2 <= batch; row += 2) f.template operator()<2>(row);
    for (; row < batch; ++row) f.template operator()<1>(row);
}

// Inputs k .. k + some of panel p, laid out as in a dense panel, for ROWS rows of x from `row` on, each `width` units of X long.
template <int ROWS, class T, class X>
inline void add_tile(const Weights& w, const T* panel, const X* x, int64_t width, int64_t k, int64_t some, int64_t row, float* y, int64_t p) {
    Tile<PANEL, ROWS> tile;
    tile.open(y + row * w.out, w.out, p * PANEL, k == 0);
    tile.add(panel, x + row * width + k * ROWS, some);
    tile.close(y + row * w.out, w.out, p * PANEL);
}
// The same for all rows.
template <class T, class X>
inline void add_panel(const Weights& w, const T* panel, const X* x, int64_t width, int64_t k, int64_t some, int64_t batch, float* y, int64_t p) {
    tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) { add_tile<ROWS>(w, panel, x, width, k, some, row, y, p); });
}

}  // namespace trimtab::ISA
