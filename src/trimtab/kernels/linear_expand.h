// Codes times x as it is: some inputs of a panel become floats in the first-level cache and are multiplied there.
#pragma once
#include "linear_codes.h"

namespace trimtab::ISA {

constexpr int64_t EXPAND = 128;  // inputs at once: 16 KB of a panel of 32

// Inputs `k` .. `k + count` of a column of words with one scale an output, as floats [count, HEIGHT], the last word to its end.
template <int BITS, int HEIGHT>
inline void expand(const Weights& w, const std::byte* words, int64_t k, int64_t count, int64_t first, float* to) {
    constexpr int P = in_word<BITS>();
    for (int v = 0; v < HEIGHT / Vec::N; ++v) {
        const Vec scale = scale_at(w, first + v * Vec::N), zero = zero_at<BITS>(w, first + v * Vec::N);
        for (int64_t i = 0; i < count; i += P)
            each_code<BITS>(Ints::load(words + ((k + i) / P * HEIGHT + v * Vec::N) * 4), [&](int j, Vec code) {
                ((code - zero) * scale).store(to + (i + j) * HEIGHT + v * Vec::N);
            });
    }
}

// One row of x: the sum of codes times x in a group, less the zero point times the sum of x.
template <int BITS>
inline void one_row_expand(const Weights& w, const float* x, float* y, int64_t p) {
    constexpr int P = in_word<BITS>(), V = PANEL / Vec::N;
    const int64_t words = (w.in + P - 1) / P, groups = w.groups();
    float end[P] = {};  // what the last word meets, and zeros behind it
    std::copy(x + (words - 1) * P, x + w.in, end);
    Tile<PANEL, 1> total;
    total.open(y, w.out, 0, true);
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = g * w.group, until = std::min(w.in, from + w.group);
        Tile<PANEL, 1> part;
        part.open(y, w.out, 0, true);
        float met = 0;
        for (int64_t i = from; i < until; i += P) {
            const float* at = i + P <= w.in ? x + i : end;
            for (int k = 0; k < P; ++k) met += at[k];
            const std::byte* here = w.values + (p * words + i / P) * PANEL * 4;
            for (int k = 0; k < PANEL * 4; k += 64) __builtin_prefetch(here + AHEAD + k);
            for (int v = 0; v < V; ++v)
                each_code<BITS>(Ints::load(here + v * Vec::N * 4), [&](int k, Vec code) {
                    part.sum[0][v] = part.sum[0][v].fma(code, Vec::all(at[k]));
                });
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
    constexpr int P = in_word<BITS>();
    constexpr int64_t most = EXPAND / P * P;
    const int64_t words = (w.in + P - 1) / P, groups = w.groups();
    for (int64_t p = begin; p < end; ++p) {
        for (int64_t k = 0; k < w.in;) {
            const int64_t g = k / w.group, some = std::min({most, w.in - k, (g + 1) * w.group - k});
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

template <int BITS>
void linear_expand_nm(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    constexpr int P = 32 / BITS, FIELDS = 8 / BITS, MASK = (1 << BITS) - 1;
    const float* x = static_cast<const float*>(ready);
    const int64_t words = (w.in / 2 + P - 1) / P, places = (w.in / 2 + 15) / 16, groups = w.groups();
    for (int64_t p = begin; p < end; ++p) {
        for (int64_t k = 0; k < w.in;) {
            const int64_t g = k / w.group, some = std::min({EXPAND, w.in - k, (g + 1) * w.group - k});
            for (int v = 0; v < PANEL / Vec::N; ++v) {
                const int64_t first = (p * groups + g) * PANEL + v * Vec::N;
                const Vec scale = scale_at(w, first), zero = zero_at<BITS>(w, first);
                for (int64_t i = k; i < k + some; i += 4) {
                    const int64_t s = i / 8;  // the second group of four has the upper two bytes
                    const int half = i % 8 ? 16 : 0;
                    const Ints code = Ints::load(w.values + (p * words + s / FIELDS) * PANEL * 4 + v * Vec::N * 4) >> int(BITS * (s % FIELDS) + half);
                    const Ints which = Ints::load(w.bits + (p * places + s / 4) * PANEL * 4 + v * Vec::N * 4) >> int(2 * (s % 4) + half);
                    const Vec a = ((code & MASK).floats() - zero) * scale, b = (((code >> 8) & MASK).floats() - zero) * scale;
                    const Ints at_a = which & 3, at_b = (which >> 8) & 3;
                    for (int j = 0; j < 4; ++j)
                        (at_a.where(j, a) + at_b.where(j, b)).store(scratch + (i - k + j) * PANEL + v * Vec::N);
                }
            }
            add_panel(w, scratch, x, w.in, k, some, batch, y, p);
            k += some;
        }
    }
}

}  // namespace trimtab::ISA
