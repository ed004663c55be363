// Codes of 8, 4 or 2 bits, or ternary, times x in eight bits: integer sums inside a group, then one scale of each.
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
    if constexpr (BITS == TRITS) return Vec::all(1);
    else return w.zeros ? Ints::bytes(w.zeros + i).floats() : Vec::all(float(1 << (BITS - 1)));
}

// The groups of x a kernel of codes wants: the weights' own, or some of whole words that are short enough to be exact.
inline int64_t group_of(const Weights& w) { return std::min(w.in, w.group < w.in ? w.group : GROUP / in_a_word(w.type) * in_a_word(w.type)); }
inline Input in_tiles(const Weights& w) { return {Type::i8, group_of(w), tile_rows<PANEL>(), 0, w.type == Type::t ? 20 : 64}; }
inline Input in_rows(const Weights& w) { return {Type::i8, group_of(w), 0}; }
// Whether a group's sum of bytes times x, three times, stays inside 32 bits.
inline bool in_short_groups(const Weights& w) { return w.rows == PANEL && group_of(w) <= 1 << 14; }
template <int HEIGHT>
inline Input by_block(const Weights& w) { return {Type::i8, w.cols, tile_rows<HEIGHT>()}; }

// What `count` words of codes, HEIGHT outputs side by side, add to the sums `total` [ROWS, HEIGHT] of ROWS rows of x from
// `input` on, in group g of x. `first` is where their scales are. The sums are in memory: integers take all the registers.
template <int BITS, int HEIGHT, int ROWS>
inline void add_codes(float* total, const Weights& w, const std::byte* words, int64_t count, const Codes& x, int64_t row,
                      int64_t input, int64_t g, int64_t first) {
    constexpr int V = HEIGHT / Vec::N, FIELDS = in_word<BITS>() / 4;
    Ints sum[ROWS][V];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = Ints::zero();
    const int8_t* at = x.x + row * x.stride + input * ROWS;
    for (int64_t i = 0; i < count; ++i, words += HEIGHT * 4, at += 4 * FIELDS * ROWS) {
        Ints word[V];
        for (int v = 0; v < V; ++v) word[v] = Ints::load(words + v * Vec::N * 4);
        for (int f = 0; f < FIELDS; ++f) {
            Ints codes[V];
            for (int v = 0; v < V; ++v) codes[v] = next_field<BITS>(word[v]);
            for (int r = 0; r < ROWS; ++r) {
                const Ints its = Ints::all(peek<int>(at + 4 * (f * ROWS + r)));
                for (int v = 0; v < V; ++v) sum[r][v] = sum[r][v].template dot<BITS>(codes[v], its);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < V; ++v) {
            const int64_t its = (row + r) * x.groups + g, side = first + v * Vec::N;
            const Vec whole = sum[r][v].floats() - zero_at<BITS>(w, side) * Vec::all(x.sums[its]);
            float* to = total + r * HEIGHT + v * Vec::N;
            Vec::load(to).fma(whole, scale_at(w, side) * Vec::all(x.scales[its])).store(to);
        }
}

// Sums of a tile, in memory.
template <int HEIGHT>
inline int64_t total_scratch(const Weights&, int64_t) { return HEIGHT * tile_rows<HEIGHT>(); }

template <int HEIGHT, int ROWS>
inline void close_total(const float* total, const Weights& w, float* y, int64_t first) {
    for (int r = 0; r < ROWS; ++r) std::copy_n(total + r * HEIGHT, std::min<int64_t>(HEIGHT, w.out - first), y + r * w.out + first);
}

// One row of x.
template <int BITS>
inline void one_row_codes(const Weights& w, const Codes& x, int64_t group, float* y, int64_t p) {
    constexpr int P = in_word<BITS>(), FIELDS = P / 4, V = PANEL / Vec::N;
    const int64_t words = (w.in + P - 1) / P, groups = w.groups();
    const std::byte* at = w.values + p * words * PANEL * 4;
    Tile<PANEL, 1> total;
    total.open(y, w.out, 0, true);
    for (int64_t g = 0; g < x.groups; ++g) {
        FieldSum<BITS> sum[V];
        const int64_t from = g * group / P, until = (std::min(w.in, (g + 1) * group) + P - 1) / P;
        for (int64_t i = from; i < until; ++i) {
            const std::byte* here = at + i * PANEL * 4;
            for (int k = 0; k < PANEL * 4; k += 64) __builtin_prefetch(here + AHEAD + k);
            for (int v = 0; v < V; ++v) {
                Ints word = Ints::load(here + v * Vec::N * 4);
                for (int f = 0; f < FIELDS; ++f) sum[v].add(word, Ints::all(peek<int>(x.x + i * P + 4 * f)));
            }
        }
        for (int v = 0; v < V; ++v) {
            const int64_t side = (p * groups + (groups > 1 ? g : 0)) * PANEL + v * Vec::N;
            const Vec whole = sum[v].floats() - zero_at<BITS>(w, side) * Vec::all(x.sums[g]);
            total.sum[0][v] = total.sum[0][v].fma(whole, scale_at(w, side) * Vec::all(x.scales[g]));
        }
    }
    total.close(y, w.out, p * PANEL);
}

// Dense: a panel is all inputs of 32 outputs.
template <int BITS>
void linear_codes(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* total) {
    constexpr int P = in_word<BITS>();
    const Input input = in_tiles(w);
    const Codes x(ready, input, w.in, batch);
    if (batch == 1) {
        for (int64_t p = begin; p < end; ++p) one_row_codes<BITS>(w, x, input.group, y, p);
        return;
    }
    const int64_t words = (w.in + P - 1) / P, groups = w.groups();
    for (int64_t p = begin; p < end; ++p) {
        const std::byte* at = w.values + p * words * PANEL * 4;
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
            std::fill_n(total, ROWS * PANEL, 0.0f);
            for (int64_t g = 0; g < x.groups; ++g) {
                const int64_t first = g * input.group, last = std::min(w.in, first + input.group), from = first / P;
                add_codes<BITS, PANEL, ROWS>(total, w, at + from * PANEL * 4, (last + P - 1) / P - from, x, row, first, g,
                                             (p * groups + (groups > 1 ? g : 0)) * PANEL);
            }
            close_total<PANEL, ROWS>(total, w, y + row * w.out, p * PANEL);
        });
    }
}

// Blocks: every block has a scale an output; x has one for every width of a block.
template <int BITS, int HEIGHT>
void linear_codes_bsr(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* total) {
    constexpr int P = 32 / BITS;
    const Codes x(ready, by_block<HEIGHT>(w), w.in, batch);
    const int64_t words = w.cols / P;
    for (int64_t p = begin; p < end; ++p) {
        tiles<HEIGHT>(batch, [&]<int ROWS>(int64_t row) {
            std::fill_n(total, ROWS * HEIGHT, 0.0f);
            for (int64_t b = w.pointers[p]; b < w.pointers[p + 1]; ++b)
                add_codes<BITS, HEIGHT, ROWS>(total, w, w.values + b * words * HEIGHT * 4, words, x, row, int64_t(w.columns[b]) * w.cols,
                                              w.columns[b], b * HEIGHT);
            close_total<HEIGHT, ROWS>(total, w, y + row * w.out, p * HEIGHT);
        });
    }
}

// 2:4. A lane holds two codes of each of two groups of four, and two bits each say which of the eight x they meet.
struct Pairs {
    int64_t words, places;  // of a panel: words of codes, words of places
    Pairs(const Weights& w) : words((w.in / 2 + in_a_word(w.type) - 1) / in_a_word(w.type)), places((w.in / 2 + 15) / 16) {}
};

// Up to four steps (eight inputs each, from step `t` on, a multiple of four) of one vector of outputs, for ROWS rows of x.
// sum: products with the codes; met: the sum of the x met, of which the zero point is taken off.
template <int BITS, int ROWS>
inline void pair_steps(const std::byte* values, const std::byte* bits, const int8_t* x, int64_t stride, int64_t t, int steps, Ints* sum, Ints* met) {
    constexpr int FIELDS = 8 / BITS;
    const Ints which = Ints::load(bits + t / 4 * PANEL * 4);
    for (int i = 0; i < steps; ++i) {
        const Ints codes = field<BITS>(Ints::load(values + (t + i) / FIELDS * PANEL * 4), (int(t) + i) % FIELDS);
        const Ints at = ((which >> 2 * i) & 0x03030303) | 0x04040000;
        for (int r = 0; r < ROWS; ++r) {
            const Ints its = Ints::pick(x + r * stride + 8 * (t + i), at);
            sum[r] = sum[r].template dot<BITS>(codes, its);
            met[r] = met[r].template dot<1>(Ints::all(0x01010101), its);
        }
    }
}

template <int BITS, int ROWS>
inline void pair_group(const Weights& w, const Pairs& pairs, const Codes& x, int64_t row, int64_t p, int64_t g, int64_t group, Tile<PANEL, ROWS>& tile) {
    constexpr int V = PANEL / Vec::N;
    const std::byte* values = w.values + p * pairs.words * PANEL * 4;
    const std::byte* bits = w.bits + p * pairs.places * PANEL * 4;
    const int64_t from = g * group / 8, until = (std::min(w.in, (g + 1) * group) + 7) / 8;
    Ints sum[V][ROWS], met[V][ROWS];
    for (int v = 0; v < V; ++v)
        for (int r = 0; r < ROWS; ++r) sum[v][r] = met[v][r] = Ints::zero();
    for (int64_t t = from; t < until; t += 4) {
        if constexpr (ROWS == 1) {
            for (int k = 0; k < PANEL * 4; k += 64) __builtin_prefetch(bits + t * PANEL + AHEAD + k);
            for (int k = 0; k < PANEL * 4 * BITS / 2; k += 64) __builtin_prefetch(values + t * PANEL * BITS / 2 + AHEAD + k);
        }
        for (int v = 0; v < V; ++v) {
            const int64_t lane = v * Vec::N * 4;
            const int8_t* at = x.x + row * x.stride;
            if (t + 4 <= until) pair_steps<BITS, ROWS>(values + lane, bits + lane, at, x.stride, t, 4, sum[v], met[v]);
            else pair_steps<BITS, ROWS>(values + lane, bits + lane, at, x.stride, t, int(until - t), sum[v], met[v]);
        }
    }
    for (int v = 0; v < V; ++v) {
        const int64_t side = (p * w.groups() + (w.groups() > 1 ? g : 0)) * PANEL + v * Vec::N;
        const Vec scale = scale_at(w, side), zero = zero_at<BITS>(w, side);
        for (int r = 0; r < ROWS; ++r) {
            const Vec whole = sum[v][r].floats() - zero * met[v][r].floats();
            tile.sum[r][v] = tile.sum[r][v].fma(whole, scale * Vec::all(x.scales[(row + r) * x.groups + g]));
        }
    }
}

template <int BITS>
void linear_codes_nm(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    const Input input = in_rows(w);
    const Codes x(ready, input, w.in, batch);
    const Pairs pairs(w);
    for (int64_t p = begin; p < end; ++p)
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
            Tile<PANEL, ROWS> tile;
            tile.open(y, w.out, 0, true);
            for (int64_t g = 0; g < x.groups; ++g) pair_group<BITS, ROWS>(w, pairs, x, row, p, g, input.group, tile);
            tile.close(y + row * w.out, w.out, p * PANEL);
        });
}

}  // namespace trimtab::ISA
