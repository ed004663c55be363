// 2:4 and 4:8 in codes: a lane's word holds four codes, those of eight inputs, and two or three bits each say which they meet.
#pragma once
#include "linear_codes.h"
#include "linear_nm.h"

namespace trimtab::ISA {

constexpr int64_t PIECE = 256;  // inputs at once: what they sum up to is exact as a float

// x in eight bits: the eight codes of a step lie together.
inline Input in_steps(const Weights& w) { return {Type::i8, group_of(w), tile_rows<PANEL>(), 0, false, 2}; }

// Vectors of outputs that are gone through together: all of them, as they lie in memory, where their sums fit into registers.
template <int ROWS>
constexpr int together() { return ROWS * PANEL / Vec::N <= 8 ? PANEL / Vec::N : 1; }

// The codes of panel p in steps of eight inputs, a few vectors of outputs from the first on.
template <int BITS, int M, int VECTORS>
struct Steps {
    static constexpr int FIELDS = 8 / BITS;
    const std::byte *values, *low, *third;
    Steps(const Weights& w, int64_t p, int first) {
        const Places places(w, p);
        const int64_t lane = first * Vec::N * 4, words = (places.held + 32 / BITS - 1) / (32 / BITS);
        values = w.values + p * words * PANEL * 4 + lane;
        low = places.low + lane;
        third = places.third + lane;
    }
    // Calls f(step, vector, codes, places) for `count` steps, at most four, from step t on, a multiple of four: a byte a code.
    template <class F>
    void some(int64_t t, int count, const F& f) const {
        Ints two[VECTORS], one[VECTORS], word[VECTORS];  // what is next has the lowest bits, in `one` bit 2
        for (int v = 0; v < VECTORS; ++v) {
            const std::byte* at = low + (t / 4 * PANEL + v * Vec::N) * 4;
            __builtin_prefetch(at + AHEAD / 2);
            two[v] = Ints::load(at);
            if constexpr (M == 8) {
                at = third + (t / 8 * PANEL + v * Vec::N) * 4;
                __builtin_prefetch(at + AHEAD / 2);
                one[v] = t % 8 ? Ints::load(at) >> 2 : Ints::load(at) << 2;
            }
        }
        for (int i = 0; i < count; ++i)
            for (int v = 0; v < VECTORS; ++v) {
                if (i % FIELDS == 0) {
                    const std::byte* at = values + ((t + i) / FIELDS * PANEL + v * Vec::N) * 4;
                    if constexpr (BITS != 8) __builtin_prefetch(at + AHEAD);  // of eight bits each its own word: the hardware does it better
                    word[v] = Ints::load(at);
                }
                Ints places = two[v] & 0x03030303;
                if constexpr (M == 8) {
                    places = places | (one[v] & 0x04040404);
                    one[v] = one[v] >> 1;
                } else {
                    places = places | 0x04040000;  // the first two codes are those of the first four inputs
                }
                f(t + i, v, field<BITS>(word[v], 0), places);
                two[v] = two[v] >> 2;
                word[v] = word[v] >> BITS;
            }
    }
    template <class F>
    void each(int64_t from, int64_t until, const F& f) const {
        for (int64_t t = from; t < until; t += 4) {
            if (t + 4 <= until) some(t, 4, f);
            else some(t, int(until - t), f);
        }
    }
};

// Calls f(begin, end, group) for pieces of the inputs, none of which crosses from one group into the next.
template <class F>
inline void pieces(int64_t in, int64_t group, const F& f) {
    for (int64_t k = 0; k < in;) {
        const int64_t end = std::min({in, (k / group + 1) * group, k + PIECE});
        f(k, end, k / group);
        k = end;
    }
}

// Whether the codes of panel p less their zero points are bytes with a sign: of four bits they are, unless a zero point is strange.
template <int BITS>
inline bool fit(const Weights& w, int64_t p) {
    if (!w.zeros) return true;
    const int64_t count = w.groups() * PANEL;
    uint8_t most = 0;
    for (int64_t i = p * count; i < (p + 1) * count; ++i) most = std::max(most, w.zeros[i]);
    return BITS < 8 && most <= 1 << BITS;
}

// ROWS rows of x in eight bits, raised by 128, times codes less their zero points; where these do not FIT, less the middle, and
// what was met times the rest.
template <int BITS, int M, bool FIT, int ROWS>
inline void add_steps(Tile<PANEL, ROWS>& tile, const Weights& w, const Codes& x, int64_t row, int64_t p, int64_t group) {
    constexpr int MIDDLE = 1 << (BITS - 1), VECTORS = together<ROWS>();
    const int8_t* rows = x.x + row * x.stride;
    pieces(w.in, group, [&](int64_t begin, int64_t end, int64_t g) {
        const int64_t from = begin / 8, until = (end + 7) / 8;
        for (int first = 0; first < PANEL / Vec::N; first += VECTORS) {
            const int64_t side = (p * w.groups() + (w.groups() > 1 ? g : 0)) * PANEL + first * Vec::N;
            Ints sum[VECTORS][ROWS], met[VECTORS][ROWS], raised[VECTORS], zero[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                zero[v] = FIT && w.zeros ? Ints::bytes(w.zeros + side + v * Vec::N).four() : Ints::all(MIDDLE).four();
                raised[v] = Ints::zero();
                for (int r = 0; r < ROWS; ++r) sum[v][r] = met[v][r] = Ints::zero();
            }
            Steps<BITS, M, VECTORS>(w, p, first).each(from, until, [&](int64_t t, int v, Ints codes, Ints places) {
                codes = codes.less(zero[v]);
                raised[v] = raised[v].template dot<BITS>(Ints::all(int(0x80808080)), codes);
                const int8_t* at = rows + t * 8 * ROWS;
                for (int r = 0; r < ROWS; ++r) {
                    const Ints its = Ints::pick(at + r * 8, places);
                    sum[v][r] = sum[v][r].template dot<BITS>(its, codes);
                    if constexpr (!FIT) met[v][r] = met[v][r].template dot<1>(its, Ints::all(0x01010101));
                }
            });
            for (int v = 0; v < VECTORS; ++v) {
                const int64_t at = side + v * Vec::N;
                const Vec scale = scale_at(w, at), rest = zero_at<BITS>(w, at) - Vec::all(MIDDLE);
                for (int r = 0; r < ROWS; ++r) {
                    Vec whole = sum[v][r].floats() - raised[v].floats();
                    if constexpr (!FIT) whole = whole - rest * (met[v][r].floats() - Vec::all(float((until - from) * 4 * 128)));
                    Vec& total = tile.sum[r][first + v];
                    total = total.fma(whole, scale * Vec::all(x.scales[(row + r) * x.groups + g]));
                }
            }
        }
    });
}

template <int BITS, int M>
void linear_codes_nm(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    const Input input = in_steps(w);
    const Codes x(ready, input, w.in, batch);
    for (int64_t p = begin; p < end; ++p) {
        const bool small = fit<BITS>(w, p);
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
            Tile<PANEL, ROWS> tile;
            tile.open(y, w.out, 0, true);
            if (small) add_steps<BITS, M, true, ROWS>(tile, w, x, row, p, input.group);
            else add_steps<BITS, M, false, ROWS>(tile, w, x, row, p, input.group);
            tile.close(y + row * w.out, w.out, p * PANEL);
        });
    }
}

// x as it is. The last step of 2:4 may be half a one.
constexpr float NOTHING[4 * tile_rows<PANEL>()] = {};

template <int BITS, int M>
void linear_expand_nm(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    const float* x = static_cast<const float*>(ready);
    for (int64_t p = begin; p < end; ++p)
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
            Tile<PANEL, ROWS> tile;
            tile.open(y, w.out, 0, true);
            pieces(w.in, w.group, [&](int64_t from, int64_t until, int64_t g) {
                constexpr int VECTORS = together<ROWS>();
                for (int first = 0; first < PANEL / Vec::N; first += VECTORS) {
                    const int64_t side = (p * w.groups() + g) * PANEL + first * Vec::N;
                    Vec sum[VECTORS][ROWS], zero[VECTORS];
                    for (int v = 0; v < VECTORS; ++v) {
                        zero[v] = zero_at<BITS>(w, side + v * Vec::N);
                        for (int r = 0; r < ROWS; ++r) sum[v][r] = Vec::zero();
                    }
                    Steps<BITS, M, VECTORS>(w, p, first).each(from / 8, (until + 7) / 8, [&](int64_t t, int v, Ints codes, Ints places) {
                        for (int b = 0; b < 4; ++b) {
                            const int64_t input = t * 8 + (M == 4 ? b / 2 * 4 : 0);  // where the group begins
                            const float* at = M == 8 || input < w.in ? x + row * w.in + input * ROWS : NOTHING;
                            const Vec value = ((codes >> 8 * b) & 255).floats() - zero[v];
                            const Ints place = places >> 8 * b;
                            for (int r = 0; r < ROWS; ++r) sum[v][r] = sum[v][r].fma(value, place.template of<M>(at + r * M));
                        }
                    });
                    for (int v = 0; v < VECTORS; ++v) {
                        const Vec scale = scale_at(w, side + v * Vec::N);
                        for (int r = 0; r < ROWS; ++r) tile.sum[r][first + v] = tile.sum[r][first + v].fma(sum[v][r], scale);
                    }
                }
            });
            tile.close(y + row * w.out, w.out, p * PANEL);
        });
}

}  // namespace trimtab::ISA
