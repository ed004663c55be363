// Codes times x as it is: some inputs of a panel become floats in the first-level cache and are multiplied there.
#pragma once
#include "linear_codes.h"

namespace trimtab::ISA {

constexpr int64_t EXPAND = 128;  // inputs at once: 16 KB of a panel of 32

// The zero point of codes as floats: a table has none.
template <int BITS>
inline Vec middle_at(const Weights& w, int64_t i) {
    if constexpr (BITS > LOOKUP) return Vec::zero();
    else return zero_at<BITS>(w, i);
}

// Inputs `k` .. `k + count` of a column of units with one scale an output, as floats [count, HEIGHT], the last unit to its end.
template <int BITS, int HEIGHT>
inline void expand(const Weights& w, const std::byte* units, int64_t k, int64_t count, int64_t first, float* to) {
    constexpr int P = inputs_in<BITS>();
    const Table<BITS> table(w);
    for (int v = 0; v < HEIGHT / Vec::N; ++v) {
        const Vec scale = scale_at(w, first + v * Vec::N), zero = middle_at<BITS>(w, first + v * Vec::N);
        for (int64_t i = 0; i < count; i += P)
            each_code<BITS>(Unit<BITS>(units + ((k + i) / P * words_in<BITS>() * HEIGHT + v * Vec::N) * 4, HEIGHT * 4), table, [&](int j, Vec code) {
                ((code - zero) * scale).store(to + (i + j) * HEIGHT + v * Vec::N);
            });
    }
}

// One row of x: the sum of codes times x in a group, less the zero point times the sum of x, which is in `met`.
template <int BITS>
inline void one_row_expand(const Weights& w, const float* x, const float* met, float* y, int64_t p) {
    constexpr int P = inputs_in<BITS>(), V = PANEL / Vec::N, SIZE = PANEL * 4 * words_in<BITS>();
    constexpr int CHAINS = Vec::N == 16 ? 4 : 2;  // sums of an output that do not wait for each other
    const int64_t units = (w.in + P - 1) / P, groups = w.groups();
    const Table<BITS> table(w);
    float end[P] = {};  // what the last unit meets, and zeros behind it
    std::copy(x + (units - 1) * P, x + w.in, end);
    Tile<PANEL, 1> total;
    total.open(y, w.out, 0, true);
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = g * w.group, until = std::min(w.in, from + w.group);
        Tile<PANEL, CHAINS> part;
        part.open(y, w.out, 0, true);
        for (int64_t i = from; i < until; i += P) {
            const float* at = i + P <= w.in ? x + i : end;
            const std::byte* here = w.values + (p * units + i / P) * SIZE;
            for (int k = 0; k < SIZE; k += 64) __builtin_prefetch(here + AHEAD + k);
            unrolled<V>(EACH(v) {
                each_code<BITS>(Unit<BITS>(here + v * Vec::N * 4, PANEL * 4), table, [&](auto k, Vec code) __attribute__((always_inline)) {
                    part.sum[k % CHAINS][v] = part.sum[k % CHAINS][v].fma(code, Vec::all(at[k]));
                });
            });
        }
        unrolled<V>(EACH(v) {
            const int64_t side = (p * groups + g) * PANEL + v * Vec::N;
            unrolled<CHAINS - 1>(EACH(k) { part.sum[0][v] = part.sum[0][v] + part.sum[k + 1][v]; });
            const Vec whole = part.sum[0][v] - middle_at<BITS>(w, side) * Vec::all(met[g]);
            total.sum[0][v] = total.sum[0][v].fma(whole, scale_at(w, side));
        });
    }
    total.close(y, w.out, p * PANEL);
}

// Inputs of a panel as floats, or what x sums up to in each group.
inline int64_t expand_scratch(const Weights& w, int64_t batch) { return batch == 1 ? w.groups() : EXPAND * w.rows; }

template <int BITS>
void linear_expand(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const float* x = static_cast<const float*>(ready);
    if (batch == 1) {
        for (int64_t g = 0; g < w.groups(); ++g) {
            float four[4] = {};
            for (int64_t i = g * w.group, until = std::min(w.in, i + w.group); i < until; ++i) four[i % 4] += x[i];
            scratch[g] = (four[0] + four[1]) + (four[2] + four[3]);
        }
        for (int64_t p = begin; p < end; ++p) one_row_expand<BITS>(w, x, scratch, y, p);
        return;
    }
    constexpr int P = inputs_in<BITS>(), SIZE = PANEL * 4 * words_in<BITS>();
    constexpr int64_t most = EXPAND / P * P;
    const int64_t units = (w.in + P - 1) / P, groups = w.groups();
    for (int64_t p = begin; p < end; ++p) {
        for (int64_t k = 0; k < w.in;) {
            const int64_t g = k / w.group, some = std::min({most, w.in - k, (g + 1) * w.group - k});
            expand<BITS, PANEL>(w, w.values + p * units * SIZE, k, some, (p * groups + g) * PANEL, scratch);
            add_panel(w, scratch, x, w.in, k, some, batch, y, p);
            k += some;
        }
    }
}

// Inputs of blocks that become floats at once; for a few rows of x, as many as the first-level cache holds.
template <int HEIGHT>
inline int64_t expanded(int64_t batch) { return batch > tile_rows<HEIGHT>() ? kept<HEIGHT>(4) : EXPAND; }

// Where the values of block i lie that became floats.
template <int HEIGHT>
struct Expanded {
    float* values;
    float* operator()(int64_t i, Part part) const { return values + (i - part.b) * part.n * HEIGHT; }
};

template <int HEIGHT>
inline int64_t expand_bsr_scratch(const Weights&, int64_t batch) { return expanded<HEIGHT>(batch) * HEIGHT; }

template <int BITS, int HEIGHT>
void linear_expand_bsr(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const Expanded<HEIGHT> at{scratch};
    const int64_t size = w.cols * BITS / 8 * HEIGHT;
    auto load = [&](int64_t, int64_t from, int64_t to, Part part) {
        for (int64_t i = from; i < to; ++i) expand<BITS, HEIGHT>(w, w.values + i * size, part.k, part.n, i * HEIGHT, at(i, part));
    };
    in_parts<HEIGHT>(w, expanded<HEIGHT>(batch), batch, y, begin, end, load, add_blocks<HEIGHT>(w, static_cast<const float*>(ready), at));
}

}  // namespace trimtab::ISA
