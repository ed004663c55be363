// Blocks of one input: a panel keeps whole columns. Those stored one after the other lie side by side as the inputs of a dense
// panel do, so that with the x that they meet gathered they are one.
#pragma once
#include "linear_expand.h"

namespace trimtab::ISA {

constexpr int64_t GATHER = 128;  // columns at once: their x stays in the first-level cache

// The x that `count` columns meet, from one tile into another: floats, pairs of bfloat16, or words of four codes.
template <int ROWS>
inline void gather(const float* x, const int32_t* columns, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * ROWS, x + int64_t(columns[i]) * ROWS, ROWS * 4);
}

// Inputs of BITS bits, several in a unit of x.
template <int ROWS, int BITS>
inline void gather_parts(const void* x, const int32_t* columns, int64_t count, void* to) {
    constexpr int P = 32 / BITS;
    for (int64_t i = 0; i < count; i += P) {
        uint32_t unit[ROWS] = {};
        for (int k = 0; k < P; ++k) {
            const std::byte* from = static_cast<const std::byte*>(x) + int64_t(columns[i + k] / P) * ROWS * 4;
            const int shift = columns[i + k] % P * BITS;
            for (int r = 0; r < ROWS; ++r) unit[r] |= (peek<uint32_t>(from + r * 4) >> shift & ((1u << BITS) - 1)) << k * BITS;
        }
        std::memcpy(static_cast<std::byte*>(to) + i / P * ROWS * 4, unit, sizeof unit);
    }
}

template <int ROWS>
inline void gather(const uint16_t* x, const int32_t* columns, int64_t count, uint16_t* to) {
    gather_parts<ROWS, 16>(x, columns, count, to);
}

// Gathered x in tiles; and behind it, of codes, floats they became or sums.
template <int HEIGHT>
constexpr int64_t GATHERED = GATHER * tile_rows<HEIGHT>();
template <int HEIGHT>
inline int64_t column_scratch(const Weights&, int64_t) { return GATHERED<HEIGHT>; }
template <int HEIGHT>
inline int64_t expand_column_scratch(const Weights&, int64_t batch) { return GATHERED<HEIGHT> + expanded<HEIGHT>(batch) * HEIGHT; }
template <int HEIGHT>
inline int64_t codes_column_scratch(const Weights&, int64_t) { return GATHERED<HEIGHT> + HEIGHT * tile_rows<HEIGHT>(); }

template <int HEIGHT, class X, class F>
inline auto add_columns(const Weights& w, const X* x, const F& at, X* met) {
    return [&w, x, at, met, width = width_of<X>(w)]<int ROWS>(Tile<HEIGHT, ROWS>& tile, int64_t row, int64_t from, int64_t to, Part part) {
        for (int64_t i = from; i < to; i += GATHER) {
            const int64_t some = std::min(GATHER, to - i);
            gather<ROWS>(x + row * width, w.columns + i, some, met);
            tile.add(at(i, part), met, some);
        }
    };
}

template <int HEIGHT, class T, class X>
inline void columns(const Weights& w, const X* x, int64_t batch, float* y, int64_t begin, int64_t end, X* met) {
    const Stored<HEIGHT, T> at{reinterpret_cast<const T*>(w.values), HEIGHT};
    in_parts<HEIGHT>(w, kept<HEIGHT>(sizeof(T)), batch, y, begin, end, as_stored, add_columns<HEIGHT>(w, x, at, met));
}

template <int HEIGHT, class T>
void linear_column(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    columns<HEIGHT, T>(w, static_cast<const float*>(ready), batch, y, begin, end, scratch);
}

#if defined(__AVX512BF16__)
template <int HEIGHT>
void linear_column_bf16(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    columns<HEIGHT, uint16_t>(w, static_cast<const uint16_t*>(ready), batch, y, begin, end, reinterpret_cast<uint16_t*>(scratch));
}
#endif

// Codes, one scale an output, that become floats.
template <int HEIGHT>
void linear_expand_column(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const Expanded<HEIGHT> at{scratch + GATHERED<HEIGHT>};
    auto load = [&](int64_t p, int64_t from, int64_t to, Part part) {
        expand<8, HEIGHT>(w, w.values + from * HEIGHT, 0, to - from, p * HEIGHT, at(from, part));
    };
    in_parts<HEIGHT>(w, expanded<HEIGHT>(batch), batch, y, begin, end, load,
                     add_columns<HEIGHT>(w, static_cast<const float*>(ready), at, scratch));
}

// x in one group a row: what meets a word of codes comes from anywhere.
template <int HEIGHT>
inline Input by_row(const Weights& w) { return {Type::i8, w.in, tile_rows<HEIGHT>()}; }

template <int HEIGHT>
void linear_codes_column(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const Codes x(ready, by_row<HEIGHT>(w), w.in, batch);
    int8_t* met = reinterpret_cast<int8_t*>(scratch);
    float* sums = scratch + GATHERED<HEIGHT> / 2;  // of the x met, a row each: a quarter would hold met, and a vector is read behind it
    float* total = scratch + GATHERED<HEIGHT>;
    in_runs(w, kept<HEIGHT>(1), begin, end, [&](int64_t from, int64_t to) {
        tiles<HEIGHT>(batch, [&]<int ROWS>(int64_t row) {
            Codes its = x;
            its.x = met;
            its.scales += row;
            its.sums = sums;
            for (int64_t p = from; p < to; ++p) {
                std::fill_n(total, ROWS * HEIGHT, 0.0f);
                for (int64_t i = w.pointers[p]; i < w.pointers[p + 1]; i += GATHER) {
                    const int64_t words = std::min(GATHER, w.pointers[p + 1] - i) / 4;
                    gather_parts<ROWS, 8>(x.x + row * x.stride, w.columns + i, words * 4, met);
                    for (int r = 0; r < ROWS; r += Vec::N) {
                        Ints sum = Ints::zero();
                        for (int64_t k = 0; k < words; ++k) sum = sum.template dot<1>(Ints::all(0x01010101), Ints::load(met + (k * ROWS + r) * 4));
                        sum.floats().store(sums + r);
                    }
                    add_codes<8, HEIGHT, ROWS>(total, w, w.values + i * HEIGHT, words, its, 0, 0, 0, p * HEIGHT);
                }
                close_total<HEIGHT, ROWS>(total, w, y + row * w.out, p * HEIGHT);
            }
        });
    });
}

}  // namespace trimtab::ISA
