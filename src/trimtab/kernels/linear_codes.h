// Codes of 8 to 1 bits, of a table, or ternary, times x in eight bits: integer sums inside a group, then one scale of each.
#pragma once
#include "input.h"
#include "ints.h"
#include "linear_block.h"

namespace trimtab::ISA {

inline Vec scale_at(const Weights& w, int64_t i) {
    return w.scale_type == Type::f32 ? Vec::load(reinterpret_cast<const float*>(w.scales) + i)
                                     : Vec::f16(reinterpret_cast<const uint16_t*>(w.scales) + i);
}

// The zero point where none is given; of a table that of its bytes.
template <int BITS>
constexpr float middle() {
    if constexpr (BITS == TRITS) return 1;
    else if constexpr (BITS > LOOKUP) return 128;
    else return float(1 << (BITS - 1));
}

template <int BITS>
inline Vec zero_at(const Weights& w, int64_t i) {
    return BITS != TRITS && BITS < LOOKUP && w.zeros ? Ints::bytes(w.zeros + i).floats() : Vec::all(middle<BITS>());
}

// The same of a single block or output of eight bits.
inline float one_scale(const Weights& w, int64_t i) {
    return w.scale_type == Type::f32 ? peek<float>(w.scales + i * 4) : Vec::whole(peek<uint16_t>(w.scales + i * 2));
}
inline float one_zero(const Weights& w, int64_t i) { return w.zeros ? float(w.zeros[i]) : 128.0f; }

// The groups of x a kernel of codes wants: the weights' own, or some of whole words that are short enough to be exact.
inline int64_t group_of(const Weights& w) { return std::min(w.in, w.group < w.in ? w.group : GROUP / unit_inputs(w.type) * unit_inputs(w.type)); }
inline Input in_tiles(const Weights& w) { return {Type::i8, group_of(w), tile_rows<PANEL>(), 0, false, 1, w.type == Type::t ? 20 : 64}; }
// Whether a group's sum of bytes times x, three times, stays inside 32 bits.
inline bool in_short_groups(const Weights& w) { return w.rows == PANEL && group_of(w) <= 1 << 14; }
template <int HEIGHT>
inline Input by_block(const Weights& w) { return {Type::i8, w.cols, tile_rows<HEIGHT>()}; }

// What `count` units of codes, HEIGHT outputs side by side, add to the sums `total` [ROWS, HEIGHT] of ROWS rows of x from
// `input` on, in group g of x. `first` is where their scales are. What they are added to is in memory: integers take all the registers.
template <int BITS, int HEIGHT, int ROWS>
inline void add_codes(float* total, const Weights& w, const std::byte* units, int64_t count, const Codes& x, int64_t row,
                      int64_t input, int64_t g, int64_t first) {
    constexpr int V = HEIGHT / Vec::N, FIELDS = inputs_in<BITS>() / 4;
    const Table<BITS> table(w);
    Ints sum[ROWS][V];
    unrolled<ROWS>(EACH(r) { unrolled<V>(EACH(v) { sum[r][v] = Ints::zero(); }); });
    const int8_t* at = x.x + row * x.stride + input * ROWS;
    for (int64_t i = 0; i < count; ++i, units += HEIGHT * 4 * words_in<BITS>(), at += 4 * FIELDS * ROWS)
        [&]<int... K>(std::integer_sequence<int, K...>) __attribute__((always_inline)) {
            Unit<BITS> unit[V]{Unit<BITS>(units + K * Vec::N * 4, HEIGHT * 4)...};
            unrolled<FIELDS>(EACH(f) {
                Ints codes[V]{unit[K].template next<f>(table)...};
                unrolled<ROWS>(EACH(r) {
                    const Ints its = Ints::all(peek<int>(at + 4 * (f * ROWS + r)));
                    unrolled<V>(EACH(v) { sum[r][v] = sum[r][v].template dot<as_wide<BITS>()>(codes[v], its); });
                });
            });
        }(std::make_integer_sequence<int, V>());
    Vec scale[V], zero[V];
    unrolled<V>(EACH(v) {
        scale[v] = scale_at(w, first + v * Vec::N);
        if constexpr (BITS > LOOKUP) scale[v] = scale[v] * Vec::all(w.step);
        zero[v] = zero_at<BITS>(w, first + v * Vec::N);
    });
    unrolled<ROWS>(EACH(r) {
        const int64_t its = (row + r) * x.groups + g;
        const Vec met = Vec::all(x.sums[its]), step = Vec::all(x.scales[its]);
        unrolled<V>(EACH(v) {
            float* to = total + r * HEIGHT + v * Vec::N;
            Vec::load(to).fma(sum[r][v].floats() - zero[v] * met, scale[v] * step).store(to);
        });
    });
}

// Sums of a tile, in memory.
template <int HEIGHT>
inline int64_t total_scratch(const Weights&, int64_t) { return HEIGHT * tile_rows<HEIGHT>(); }

template <int HEIGHT, int ROWS>
inline void open_total(float* total) {
    unrolled<ROWS * HEIGHT / Vec::N>(EACH(i) { Vec::zero().store(total + i * Vec::N); });
}

// What is in y already.
template <int HEIGHT, int ROWS>
inline void take_total(float* total, const Weights& w, const float* y, int64_t first) {
    for (int r = 0; r < ROWS; ++r) std::copy_n(y + r * w.out + first, std::min<int64_t>(HEIGHT, w.out - first), total + r * HEIGHT);
}

template <int HEIGHT, int ROWS>
inline void close_total(const float* total, const Weights& w, float* y, int64_t first) {
    if (first + HEIGHT <= w.out) {
        for (int r = 0; r < ROWS; ++r, y += w.out, total += HEIGHT)
            unrolled<HEIGHT / Vec::N>(EACH(v) { Vec::load(total + v * Vec::N).store(y + first + v * Vec::N); });
        return;
    }
    for (int r = 0; r < ROWS; ++r) std::copy_n(total + r * HEIGHT, std::min<int64_t>(HEIGHT, w.out - first), y + r * w.out + first);
}

// A sum of codes times x, which sums up to `met`, less the zero point's share. Of a table of two, whose codes were summed up as they
// are: what they stand for.
template <int BITS>
inline Vec less_zero(Vec sum, const Weights& w, int64_t side, const float* met) {
#if defined(__AVX2__)
    if constexpr (BITS == LOOKUP + 1) {
        const float low = float(w.bytes[0]) - 128, step = float(w.bytes[1]) - float(w.bytes[0]);
        return Vec::all(low * *met).fma(sum, Vec::all(step));
    }
#endif
    if (w.zeros) return sum - zero_at<BITS>(w, side) * Vec::all(*met);
    return sum.fma(Vec::all(-middle<BITS>()), Vec::all(*met));
}

// One row of x.
template <int BITS>
inline void one_row_codes(const Weights& w, const Codes& x, int64_t group, float* y, int64_t p) {
    constexpr int P = inputs_in<BITS>(), FIELDS = P / 4, V = PANEL / Vec::N, SIZE = PANEL * 4 * words_in<BITS>();
    const int64_t units = (w.in + P - 1) / P, groups = w.groups(), scale = w.scale_type == Type::f32 ? 4 : 2;
    const std::byte* at = w.values + p * units * SIZE;
    const Table<BITS> table(w);
    Tile<PANEL, 1> total;
    total.open(y, w.out, 0, true);
    for (int64_t g = 0; g < x.groups; ++g) {
        FieldSum<BITS> sum[V];
        const int64_t from = g * group / P, until = (std::min(w.in, (g + 1) * group) + P - 1) / P;
        const int64_t first = (p * groups + (groups > 1 ? g : 0)) * PANEL;
        for (int k = 0; k < PANEL * scale; k += 64) __builtin_prefetch(w.scales + first * scale + AHEAD / 2 + k);
        for (int64_t i = from; i < until; ++i) {
            const std::byte* here = at + i * SIZE;
            for (int k = 0; k < SIZE; k += 64) __builtin_prefetch(here + AHEAD + k);
            Unit<BITS> unit[V];
            unrolled<V>(EACH(v) { unit[v] = Unit<BITS>(here + v * Vec::N * 4, PANEL * 4); });
            unrolled<FIELDS>(EACH(f) {
                const Ints its = Ints::all(peek<int>(x.x + i * P + 4 * f));
                unrolled<V>(EACH(v) { sum[v].template add<f>(unit[v], its, table); });
            });
        }
        unrolled<V>(EACH(v) {
            const int64_t side = first + v * Vec::N;
            const Vec whole = less_zero<BITS>(sum[v].floats(), w, side, x.sums + g);
            total.sum[0][v] = total.sum[0][v].fma(whole, scale_at(w, side) * Vec::all(x.scales[g]));
        });
    }
    if constexpr (BITS > LOOKUP) unrolled<V>(EACH(v) { total.sum[0][v] = total.sum[0][v] * Vec::all(w.step); });
    total.close(y, w.out, p * PANEL);
}

// Dense: a panel is all inputs of 32 outputs.
template <int BITS>
void linear_codes(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* total) {
    constexpr int P = inputs_in<BITS>(), SIZE = PANEL * 4 * words_in<BITS>();
    const Input input = in_tiles(w);
    const Codes x(ready, input, w.in, batch);
    if (batch == 1) {
        for (int64_t p = begin; p < end; ++p) one_row_codes<BITS>(w, x, input.group, y, p);
        return;
    }
    const int64_t units = (w.in + P - 1) / P, groups = w.groups();
    const int64_t run = std::max<int64_t>(1, KEEP / (units * SIZE));  // a tile of x stays in the first-level cache, they in the second
    for (int64_t from = begin; from < end; from += run)
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
            for (int64_t p = from; p < std::min(end, from + run); ++p) {
                const std::byte* at = w.values + p * units * SIZE;
                open_total<PANEL, ROWS>(total);
                for (int64_t g = 0; g < x.groups; ++g) {
                    const int64_t first = g * input.group, last = std::min(w.in, first + input.group), unit = first / P;
                    add_codes<BITS, PANEL, ROWS>(total, w, at + unit * SIZE, (last + P - 1) / P - unit, x, row, first, g,
                                                 (p * groups + (groups > 1 ? g : 0)) * PANEL);
                }
                close_total<PANEL, ROWS>(total, w, y + row * w.out, p * PANEL);
            }
        });
}

// Blocks: every block has a scale an output; x has one for every width of a block.
template <int BITS, int HEIGHT>
void linear_codes_bsr(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* total) {
    constexpr int P = 32 / BITS;
    const Codes x(ready, by_block<HEIGHT>(w), w.in, batch);
    const int64_t words = w.cols / P;
    in_runs(w, KEEP / (words * HEIGHT * 4), begin, end, [&](int64_t from, int64_t to) {
        tiles<HEIGHT>(batch, [&]<int ROWS>(int64_t row) {
            for (int64_t p = from; p < to; ++p) {
                open_total<HEIGHT, ROWS>(total);
                for (int64_t b = w.pointers[p]; b < w.pointers[p + 1]; ++b)
                    add_codes<BITS, HEIGHT, ROWS>(total, w, w.values + b * words * HEIGHT * 4, words, x, row, int64_t(w.columns[b]) * w.cols,
                                                  w.columns[b], b * HEIGHT);
                close_total<HEIGHT, ROWS>(total, w, y + row * w.out, p * HEIGHT);
            }
        });
    });
}

}  // namespace trimtab::ISA
