// Codes of 8, 4 or 2 bits times x in eight bits: integer sums inside a group, then one scale of each.
#pragma once
#include "input.h"
#include "ints.h"
#include "tile.h"

namespace trimtab::ISA {

inline Vec scale_at(const Weights& w, int64_t i) {
    return w.scale_type == Type::f32 ? Vec::load(reinterpret_cast<const float*>(w.scales) + i)
                                     : Vec::f16(reinterpret_cast<const uint16_t*>(w.scales) + i);
}

template <int BITS>
inline Vec zero_at(const Weights& w, int64_t i) {
    return w.zeros ? Ints::bytes(w.zeros + i).floats() : Vec::all(float(1 << (BITS - 1)));
}

// The groups of x a kernel of codes wants: the weights' own, or some that are short enough to be exact.
inline Input in_groups(const Weights& w) { return {Type::i8, std::min(w.in, w.group < w.in ? w.group : GROUP)}; }

// `words` words of codes, `HEIGHT` outputs side by side, with ROWS rows of x; what they add to the sums.
// `first` is where their scales are; group g of x.
template <int BITS, int HEIGHT, int ROWS>
inline void add_codes(Tile<HEIGHT, ROWS>& tile, const Weights& w, const std::byte* words, int64_t count, const Codes& x,
                      int64_t row, int64_t input, int64_t g, int64_t first) {
    constexpr int V = HEIGHT / Vec::N, FIELDS = 8 / BITS;
    Ints sum[ROWS][V];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = Ints::zero();
    const int8_t* at = x.x + row * x.stride + input;
    for (int64_t i = 0; i < count; ++i, words += HEIGHT * 4, at += 4 * FIELDS) {
        if constexpr (ROWS == 1) __builtin_prefetch(words + AHEAD);
        if constexpr (ROWS == 1 && HEIGHT * 4 > 64) __builtin_prefetch(words + AHEAD + 64);
        for (int v = 0; v < V; ++v) {
            const Ints word = Ints::load(words + v * Vec::N * 4);
            for (int f = 0; f < FIELDS; ++f) {
                const Ints codes = field<BITS>(word, f);
                for (int r = 0; r < ROWS; ++r) sum[r][v] = sum[r][v].template dot<BITS>(codes, Ints::all(peek<int>(at + r * x.stride + 4 * f)));
            }
        }
    }
    for (int v = 0; v < V; ++v) {
        const Vec scale = scale_at(w, first + v * Vec::N), zero = zero_at<BITS>(w, first + v * Vec::N);
        for (int r = 0; r < ROWS; ++r) {
            const int64_t its = (row + r) * x.groups + g;
            const Vec whole = sum[r][v].floats() - zero * Vec::all(x.sums[its]);
            tile.sum[r][v] = tile.sum[r][v].fma(whole, scale * Vec::all(x.scales[its]));
        }
    }
}

// Dense: a panel is all inputs of 32 outputs.
template <int BITS>
void linear_codes(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    constexpr int P = 32 / BITS;
    const Input input = in_groups(w);
    const Codes x(ready, w.in, input.group, batch);
    const int64_t words = (w.in + P - 1) / P, groups = w.groups();
    for (int64_t p = begin; p < end; ++p) {
        const std::byte* at = w.values + p * words * PANEL * 4;
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
            Tile<PANEL, ROWS> tile;
            tile.open(y, w.out, p * PANEL, true);
            for (int64_t g = 0; g < x.groups; ++g) {
                const int64_t first = g * input.group, last = std::min(w.in, first + input.group), from = first / P;
                add_codes<BITS>(tile, w, at + from * PANEL * 4, (last + P - 1) / P - from, x, row, first, g,
                                (p * groups + (groups > 1 ? g : 0)) * PANEL);
            }
            tile.close(y + row * w.out, w.out, p * PANEL);
        });
    }
}

// Blocks: every block has a scale an output; x has one for every width of a block.
template <int BITS, int HEIGHT>
void linear_codes_bsr(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    constexpr int P = 32 / BITS;
    const Codes x(ready, w.in, w.cols, batch);
    const int64_t words = w.cols / P;
    for (int64_t p = begin; p < end; ++p) {
        tiles<HEIGHT>(batch, [&]<int ROWS>(int64_t row) {
            Tile<HEIGHT, ROWS> tile;
            tile.open(y, w.out, p * HEIGHT, true);
            for (int64_t b = w.pointers[p]; b < w.pointers[p + 1]; ++b)
                add_codes<BITS>(tile, w, w.values + b * words * HEIGHT * 4, words, x, row, int64_t(w.columns[b]) * w.cols,
                                w.columns[b], b * HEIGHT);
            tile.close(y + row * w.out, w.out, p * HEIGHT);
        });
    }
}

// 2:4. A lane holds two codes of each of two groups of four, and two bits each say which of the eight x they meet.
template <int BITS>
void linear_codes_nm(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    constexpr int P = 32 / BITS, FIELDS = 8 / BITS, V = PANEL / Vec::N;
    const Input input = in_groups(w);
    const Codes x(ready, w.in, input.group, batch);
    const int64_t steps = (w.in + 7) / 8;  // of four codes, eight inputs
    const int64_t words = (w.in / 2 + P - 1) / P, places = (w.in / 2 + 15) / 16, groups = w.groups();
    for (int64_t p = begin; p < end; ++p) {
        const std::byte* values = w.values + p * words * PANEL * 4;
        const std::byte* bits = w.bits + p * places * PANEL * 4;
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
            Tile<PANEL, ROWS> tile;
            tile.open(y, w.out, p * PANEL, true);
            for (int64_t g = 0; g < x.groups; ++g) {
                const int64_t from = g * input.group / 8, until = std::min(steps, from + input.group / 8 + (input.group % 8 != 0));
                for (int v = 0; v < V; ++v) {
                    Ints sum[ROWS], met[ROWS];  // products with the codes, and of what the zero point is taken off
                    for (int r = 0; r < ROWS; ++r) sum[r] = met[r] = Ints::zero();
                    for (int64_t s = from; s < until; s += 4) {
                        const Ints which = Ints::load(bits + (s / 4 * PANEL + v * Vec::N) * 4);
                        if constexpr (ROWS == 1) __builtin_prefetch(bits + (s / 4 * PANEL + v * Vec::N) * 4 + AHEAD);
                        for (int64_t t = s; t < std::min(until, s + 4); ++t) {
                            const std::byte* word = values + (t / FIELDS * PANEL + v * Vec::N) * 4;
                            if constexpr (ROWS == 1) __builtin_prefetch(word + AHEAD);
                            const Ints codes = field<BITS>(Ints::load(word), int(t % FIELDS));
                            const Ints at = ((which >> int(2 * (t - s))) & 0x03030303) | 0x04040000;
                            for (int r = 0; r < ROWS; ++r) {
                                const Ints its = Ints::pick(x.x + (row + r) * x.stride + 8 * t, at);
                                sum[r] = sum[r].template dot<BITS>(codes, its);
                                met[r] = met[r].template dot<1>(Ints::all(0x01010101), its);
                            }
                        }
                    }
                    const int64_t first = (p * groups + (groups > 1 ? g : 0)) * PANEL + v * Vec::N;
                    const Vec scale = scale_at(w, first), zero = zero_at<BITS>(w, first);
                    for (int r = 0; r < ROWS; ++r) {
                        const Vec whole = sum[r].floats() - zero * met[r].floats();
                        tile.sum[r][v] = tile.sum[r][v].fma(whole, scale * Vec::all(x.scales[(row + r) * x.groups + g]));
                    }
                }
            }
            tile.close(y + row * w.out, w.out, p * PANEL);
        });
    }
}

}  // namespace trimtab::ISA
