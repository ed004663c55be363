// Blocks of one input: a panel keeps whole columns. Those stored one after the other lie side by side as the inputs of a dense
// panel do: bfloat16 in pairs, codes in words of four.
#pragma once
#include "linear_expand.h"

namespace trimtab::ISA {

// bfloat16 times x as it is.
template <int HEIGHT>
void linear_column_pairs(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    const float* x = static_cast<const float*>(ready);
    const Stored<HEIGHT, uint16_t> at{reinterpret_cast<const uint16_t*>(w.values), HEIGHT};
    auto add = [&]<int ROWS>(Tile<HEIGHT, ROWS>& tile, int64_t row, int64_t from, int64_t to, Part part) __attribute__((always_inline)) {
        for (int64_t i = from; i < to; i += 2)
            tile.template pair<true>(at(i, part), x + row * w.in + int64_t(w.columns[i]) * ROWS, x + row * w.in + int64_t(w.columns[i + 1]) * ROWS);
    };
    in_parts<HEIGHT>(w, kept<HEIGHT>(2), batch, y, begin, end, as_stored, add);
}

// Codes, one scale an output, that become floats.
template <int HEIGHT>
void linear_expand_column(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const Expanded<HEIGHT> at{scratch};
    auto load = [&](int64_t p, int64_t from, int64_t to, Part part) {
        expand<8, HEIGHT>(w, w.values + from * HEIGHT, 0, to - from, p * HEIGHT, at(from, part));
    };
    in_parts<HEIGHT>(w, expanded<HEIGHT>(batch), batch, y, begin, end, load, add_blocks<HEIGHT>(w, static_cast<const float*>(ready), at));
}

// Where x is rounded, what several columns meet shares a unit: it is gathered, and with that they are a dense panel.
constexpr int64_t GATHER = 128;  // columns at once: their x stays in the first-level cache

// The x of the columns of a pair or word, for the rows of a tile; a lane each, no more than a vector has.
template <int ROWS, int BITS>
[[gnu::always_inline]] inline Ints gathered(const void* x, const int32_t* columns) {
    static_assert(ROWS <= Vec::N);
    constexpr int P = 32 / BITS;
    Ints unit = Ints::zero();
    unrolled<P>(EACH(k) {
        const Ints its = Ints::some<ROWS>(static_cast<const std::byte*>(x) + int64_t(columns[k] / P) * ROWS * 4);
        unit = unit.template take<BITS, k>(its, columns[k] % P);
    });
    return unit;
}

// Gathered x, the sums of a vector of rows of it, and sums of a tile.
template <int HEIGHT>
constexpr int64_t GATHERED = GATHER / 2 * tile_rows<HEIGHT>() + Vec::N;
template <int HEIGHT>
inline int64_t column_scratch(const Weights&, int64_t) { return GATHERED<HEIGHT> + Vec::N + HEIGHT * tile_rows<HEIGHT>(); }

#if defined(__AVX512BF16__)
template <int HEIGHT>
void linear_column_bf16(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* met) {
    const uint16_t* x = static_cast<const uint16_t*>(ready);
    const Stored<HEIGHT, uint16_t> at{reinterpret_cast<const uint16_t*>(w.values), HEIGHT};
    auto add = [&]<int ROWS>(Tile<HEIGHT, ROWS>& tile, int64_t row, int64_t from, int64_t to, Part part) __attribute__((always_inline)) {
        for (int64_t i = from; i < to; i += GATHER) {
            const int64_t some = std::min(GATHER, to - i);
            for (int64_t k = 0; k < some; k += 2)
                gathered<ROWS, 16>(x + row * width_of<uint16_t>(w), w.columns + i + k).store(met + k / 2 * ROWS);
            tile.add(at(i, part), reinterpret_cast<const uint16_t*>(met), some);
        }
    };
    in_parts<HEIGHT>(w, kept<HEIGHT>(2), batch, y, begin, end, as_stored, add);
}
#endif

// x in one group a row: what meets a word of codes comes from anywhere.
template <int HEIGHT>
inline Input by_row(const Weights& w) { return {Type::i8, w.in, tile_rows<HEIGHT>()}; }

template <int HEIGHT>
void linear_codes_column(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const Codes x(ready, by_row<HEIGHT>(w), w.in, batch);
    float* total = scratch + GATHERED<HEIGHT> + Vec::N;
    Codes met = x;
    met.x = reinterpret_cast<int8_t*>(scratch);
    met.sums = scratch + GATHERED<HEIGHT>;
    in_runs(w, kept<HEIGHT>(1), begin, end, [&](int64_t first, int64_t last) {
        tiles<HEIGHT>(batch, [&]<int ROWS>(int64_t row) {
            met.scales = x.scales + row;
            for (int64_t p = first; p < last; ++p) {
                open_total<HEIGHT, ROWS>(total);
                for (int64_t i = w.pointers[p]; i < w.pointers[p + 1]; i += GATHER) {
                    const int64_t words = std::min(GATHER, w.pointers[p + 1] - i) / 4;
                    Ints sum = Ints::zero();  // of the x met, of which the zero point is taken off
                    for (int64_t k = 0; k < words; ++k) {
                        const Ints its = gathered<ROWS, 8>(x.x + row * x.stride, w.columns + i + 4 * k);
                        its.store(met.x + k * ROWS * 4);
                        sum = sum.template dot<1>(Ints::all(0x01010101), its);
                    }
                    sum.floats().store(met.sums);
                    add_codes<8, HEIGHT, ROWS>(total, w, w.values + i * HEIGHT, words, met, 0, 0, 0, p * HEIGHT);
                }
                close_total<HEIGHT, ROWS>(total, w, y + row * w.out, p * HEIGHT);
            }
        });
    });
}

}  // namespace trimtab::ISA
