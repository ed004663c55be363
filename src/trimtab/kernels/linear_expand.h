// Codes times x as it is: some inputs of a panel become floats in the first-level cache and are multiplied there.
#pragma once
#include "linear_codes.h"

namespace trimtab::ISA {

constexpr int64_t EXPAND = 128;  // inputs at once: 16 KB of a panel of 32

// Inputs `k` .. `k + count` of a column of words with one scale an output, as floats [count, HEIGHT].
template <int BITS, int HEIGHT>
inline void expand(const Weights& w, const std::byte* words, int64_t k, int64_t count, int64_t first, float* to) {
    constexpr int P = 32 / BITS;
    for (int v = 0; v < HEIGHT / Vec::N; ++v) {
        const Vec scale = scale_at(w, first + v * Vec::N), zero = zero_at<BITS>(w, first + v * Vec::N);
        for (int64_t i = k; i < k + count;) {
            const Ints word = Ints::load(words + (i / P * HEIGHT + v * Vec::N) * 4);
            for (const int64_t until = std::min(k + count, (i / P + 1) * P); i < until; ++i)
                ((code_of<BITS>(word, int(i % P)) - zero) * scale).store(to + (i - k) * HEIGHT + v * Vec::N);
        }
    }
}

// One row of x: the sum of codes times x in a group, less the zero point times the sum of x.
template <int BITS>
inline void one_row_expand(const Weights& w, const float* x, float* y, int64_t p) {
    constexpr int P = 32 / BITS, V = PANEL / Vec::N;
    const int64_t words = (w.in + P - 1) / P, groups = w.groups();
    Tile<PANEL, 1> total;
    total.open(y, w.out, 0, true);
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = g * w.group, until = std::min(w.in, from + w.group);
        Tile<PANEL, 1> part;
        part.open(y, w.out, 0, true);
        float met = 0;
        for (int64_t i = from; i < until; i += P) {
            const int some = int(std::min<int64_t>(P, until - i));
            for (int k = 0; k < some; ++k) met += x[i + k];
            const std::byte* here = w.values + (p * words + i / P) * PANEL * 4;
            for (int k = 0; k < PANEL * 4; k += 64) __builtin_prefetch(here + AHEAD + k);
            for (int v = 0; v < V; ++v) {
                const Ints word = Ints::load(here + v * Vec::N * 4);
                if (some == P)
                    for (int k = 0; k < P; ++k) part.sum[0][v] = part.sum[0][v].fma(code_of<BITS>(word, k), Vec::all(x[i + k]));
                else
                    for (int k = 0; k < some; ++k) part.sum[0][v] = part.sum[0][v].fma(code_of<BITS>(word, k), Vec::all(x[i + k]));
            }
        }
        for (int v = 0; v < V; ++v) {
            const int64_t side = (p * groups + g) * PANEL + v * Vec::N;
            const Vec whole = part.sum[0][v] - zero_at<BITS>(w, side) * Vec::all(met);
            total.sum[0][v] = total.sum[0][v].fma(whole, scale_at(w, side));
        }
    }
    total.close(y, w.out, p * PANEL);
}

inline int64_t expand_scratch(const Weights& w, int64_t) { return EXPAND * w.rows; }

template <int BITS>
void linear_expand(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const float* x = static_cast<const float*>(ready);
    if (batch == 1) {
        for (int64_t p = begin; p < end; ++p) one_row_expand<BITS>(w, x, y, p);
        return;
    }
    const int64_t words = (w.in * BITS + 31) / 32, groups = w.groups();
    for (int64_t p = begin; p < end; ++p) {
        for (int64_t k = 0; k < w.in;) {
            const int64_t g = k / w.group, some = std::min({EXPAND, w.in - k, (g + 1) * w.group - k});
            expand<BITS, PANEL>(w, w.values + p * words * PANEL * 4, k, some, (p * groups + g) * PANEL, scratch);
            add_panel(w, scratch, x, w.in, k, some, batch, y, p);
            k += some;
        }
    }
}

template <int BITS, int HEIGHT>
void linear_expand_bsr(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const float* x = static_cast<const float*>(ready);
    const int64_t size = w.cols * BITS / 8 * HEIGHT;
    for (int64_t p = begin; p < end; ++p) {
        bool fresh = true;
        for (int64_t b = w.pointers[p]; b < w.pointers[p + 1] || fresh; ++b) {
            const bool any = b < w.pointers[p + 1];
            for (int64_t k = 0; k < w.cols; k += EXPAND) {
                const int64_t some = any ? std::min(EXPAND, w.cols - k) : 0;
                if (any) expand<BITS, HEIGHT>(w, w.values + b * size, k, some, b * HEIGHT, scratch);
                tiles<HEIGHT>(batch, [&]<int ROWS>(int64_t row) {
                    Tile<HEIGHT, ROWS> tile;
                    tile.open(y + row * w.out, w.out, p * HEIGHT, fresh);
                    if (any) tile.add(scratch, x + row * w.in + (w.columns[b] * w.cols + k) * ROWS, some);
                    tile.close(y + row * w.out, w.out, p * HEIGHT);
                });
                fresh = false;
            }
        }
    }
}

}  // namespace trimtab::ISA
