// n of every m weights of a row, m 4 or 8: their values, and of each its place among the m. The x of a group lie together, and a
// shuffle picks for every output the one it meets, so that what was dropped costs nothing, however many rows of x there are.
#pragma once
#include <vector>

#include "input.h"
#include "ints.h"
#include "linear_block.h"
#include "tile.h"

namespace trimtab::ISA {

// Where panel p keeps the places of its values: words of sixteen, two bits each, of m = 8 words of 32 third bits behind them.
struct Places {
    int64_t held;  // values of an output
    const std::byte* low;
    const std::byte* third;
    Places(const Weights& w, int64_t p) : held(w.in / w.m * w.n) {
        const int64_t words = (held + 15) / 16, thirds = w.m == 8 ? (held + 31) / 32 : 0;
        low = w.bits + p * (words + thirds) * PANEL * 4;
        third = low + words * PANEL * 4;
    }
};

// Rows of units, `stride` apart, side by side among `rows`, SIDE units of each in turn.
template <int SIDE>
inline void interleave(const uint32_t* from, int64_t stride, int64_t count, int64_t units, uint32_t* to, int64_t rows) {
    for (int64_t u = 0; u < units; u += SIDE)
        for (int64_t r = 0; r < count; ++r) std::memcpy(to + u * rows + r * SIDE, from + r * stride + u, SIDE * 4);
}

// x in tiles in which `input.side` units of a row stay together: a group, or the eight codes of a step. Codes are raised by 128, so
// that they have no sign; the kernel takes that off again.
inline void prepare_groups(const Input& input, const float* x, int64_t in, int64_t batch, int64_t begin, int64_t end, std::byte* to) {
    const int64_t units = input.units(in), stride = units + 16;  // of lines: a whole number of pages apart they would share cache sets
    thread_local std::vector<uint32_t> lines;
    for (int64_t r = begin; r < end;) {
        const TileAt tile = tile_at(r, batch, input.tile);
        const int64_t some = std::min(end, tile.first + tile.rows) - r;
        lines.resize(size_t(some * stride));
        for (int64_t i = 0; i < some; ++i) {
            uint32_t* line = lines.data() + i * stride;
            const float* row = x + (r + i) * in;
            if (input.type == Type::f32) {
                std::memcpy(line, row, size_t(in) * 4);
            } else if (input.type == Type::bf16) {
                to_bf16(row, in, reinterpret_cast<uint16_t*>(line));
            } else {
                const Codes c(to, input, in, batch);
                const int64_t side = (r + i) * c.groups;
                to_codes(input, row, in, reinterpret_cast<int8_t*>(line), c.stride, c.scales + side, c.sums + side, 1);
                for (int64_t u = 0; u < units; ++u) line[u] ^= 0x80808080;
            }
        }
        uint32_t* at = reinterpret_cast<uint32_t*>(to) + tile.first * units + (r - tile.first) * input.side;
        switch (input.side) {
            case 2: interleave<2>(lines.data(), stride, some, units, at, tile.rows); break;
            case 4: interleave<4>(lines.data(), stride, some, units, at, tile.rows); break;
            default: interleave<8>(lines.data(), stride, some, units, at, tile.rows);
        }
        r += some;
    }
}

template <int M>
inline Input in_groups(const Weights&) { return {Type::f32, 0, tile_rows<PANEL>(), 0, false, M}; }
template <int M>
inline Input in_groups_bf16(const Weights&) { return {Type::bf16, 0, tile_rows<PANEL>(), 0, false, M / 2}; }

// Value s of the outputs of vector v.
inline Vec value_of(const float* values, int64_t s, int v) { return Vec::load(values + s * PANEL + v * Vec::N); }
inline Vec value_of(const uint16_t* values, int64_t s, int v) {
    const uint16_t* pair = values + (s / 2 * PANEL + v * Vec::N) * 2;
    return s % 2 ? Vec::high(pair) : Vec::low(pair);
}

// `count` values of a panel, from the first of a group and of a word of third bits on. x begins at that group.
template <int M, class T, int ROWS>
inline void add_values(Tile<PANEL, ROWS>& tile, const T* values, const std::byte* low, const std::byte* third, int64_t count, int n,
                       const float* x) {
    constexpr int V = PANEL / Vec::N;
    int j = 0;
    for (int64_t s = 0; s < count;) {
        Ints two[V], one[V];  // the next place is in the lowest bits of `two`, and in bit 2 of `one`
        for (int v = 0; v < V; ++v) {
            two[v] = Ints::load(low + (s / 16 * PANEL + v * Vec::N) * 4);
            if constexpr (M == 8) {
                const Ints word = Ints::load(third + (s / 32 * PANEL + v * Vec::N) * 4);
                one[v] = s % 32 ? word >> 14 : word << 2;
            }
        }
        if constexpr (ROWS == 1) {
            for (int k = 0; k < PANEL * 4; k += 64) __builtin_prefetch(low + s / 16 * PANEL * 4 + AHEAD / 8 + k);
            if constexpr (M == 8) __builtin_prefetch(third + s / 32 * PANEL * 4 + AHEAD / 8 + s % 32 * 4);
        }
        for (const int64_t until = std::min(count, s + 16); s < until; ++s) {
            if constexpr (ROWS == 1)
                for (int k = 0; k < PANEL * int(sizeof(T)); k += 64)
                    __builtin_prefetch(reinterpret_cast<const std::byte*>(values + s * PANEL) + AHEAD + k);
            Vec value[V];
            Ints place[V];
            for (int v = 0; v < V; ++v) {
                value[v] = value_of(values, s, v);
                place[v] = two[v];
                if constexpr (M == 8) {
                    place[v] = (two[v] & 3) | (one[v] & 4);
                    one[v] = one[v] >> 1;
                }
                two[v] = two[v] >> 2;
            }
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < V; ++v) tile.sum[r][v] = tile.sum[r][v].fma(value[v], place[v].template of<M>(x + r * M));
            if (++j == n) {
                j = 0;
                x += M * ROWS;
            }
        }
    }
}

template <int M, class T>
void linear_nm(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    const float* x = static_cast<const float*>(ready);
    // Values that stay in the second-level cache while the rows of x go by: whole groups and whole words of places.
    const int64_t whole = 32 * w.n, part = std::max<int64_t>(1, KEEP / (PANEL * int64_t(sizeof(T)) * whole)) * whole;
    for (int64_t p = begin; p < end; ++p) {
        const Places places(w, p);
        const int64_t held = places.held, each = sizeof(T) == 2 ? held + held % 2 : held;
        const T* values = reinterpret_cast<const T*>(w.values) + p * each * PANEL;
        for (int64_t s = 0; s < held; s += part)
            tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
                Tile<PANEL, ROWS> tile;
                tile.open(y + row * w.out, w.out, p * PANEL, s == 0);
                add_values<M, T, ROWS>(tile, values + s * PANEL, places.low + s / 16 * PANEL * 4, places.third + s / 32 * PANEL * 4,
                                       std::min(part, held - s), w.n, x + row * w.in + s / w.n * M * ROWS);
                tile.close(y + row * w.out, w.out, p * PANEL);
            });
    }
}

#if defined(__AVX512BF16__)
// Half of every group is stored: values in pairs, both of one group, and x in bfloat16.

// For the places of a pair, which bytes of the x of its group it meets: of four inputs as four bits say, and where the third
// bits are set eight bytes further.
struct Controls { uint32_t low[16], third[16]; };
constexpr Controls controls() {
    Controls c{};
    for (uint32_t i = 0; i < 16; ++i) {
        c.low[i] = (i % 4 * 0x0202 + 0x0100) | (i / 4 * 0x0202 + 0x0100) << 16;
        c.third[i] = (i & 1 ? 0x0808u : 0) | (i & 2 ? 0x08080000u : 0);
    }
    return c;
}
alignas(64) constexpr Controls CONTROLS = controls();

// The x of a group in every part of a vector that a shuffle of bytes stays in.
template <int M>
inline __m512i group_at(const uint16_t* x) {
    if constexpr (M == 4) return _mm512_set1_epi64(peek<long long>(x));
    else return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)x));
}

// COUNT pairs of one group, from pair q of a panel on; x begins with the panel. A pair's controls lie side by side.
template <int M, int ROWS, int COUNT>
inline void add_pairs(Tile<PANEL, ROWS>& tile, const uint16_t* values, int64_t q, const Ints* controls, const uint16_t* x) {
    constexpr int V = PANEL / Vec::N;
    x += q * 4 / M * M * ROWS;
    values += q * PANEL * 2;
    for (int r = 0; r < ROWS; ++r) {
        const __m512i group = group_at<M>(x + r * M);
        for (int i = 0; i < COUNT * V; ++i) {
            const Vec met{_mm512_castsi512_ps(_mm512_shuffle_epi8(group, controls[i].v))};
            tile.sum[r][i % V] = tile.sum[r][i % V].dot(Vec::load(reinterpret_cast<const float*>(values + i * Vec::N * 2)), met);
        }
    }
}

// Calls f(pair, controls) for `pairs` pairs, from the first of a word of third bits on.
template <int M, class F>
inline void each_pair(const std::byte* low, const std::byte* third, int64_t pairs, const F& f) {
    constexpr int V = PANEL / Vec::N;
    const Ints of_low = Ints::load(CONTROLS.low), of_third = Ints::load(CONTROLS.third);
    for (int64_t q = 0; q < pairs;) {
        Ints four[V], two[V];
        for (int v = 0; v < V; ++v) {
            const std::byte* at = low + (q / 8 * PANEL + v * Vec::N) * 4;
            __builtin_prefetch(at + AHEAD / 8);
            four[v] = Ints::load(at);
            if constexpr (M == 8) {
                at = third + (q / 16 * PANEL + v * Vec::N) * 4;
                __builtin_prefetch(at + AHEAD / 16);
                two[v] = q % 16 ? Ints::load(at) >> 16 : Ints::load(at);
            }
        }
        for (const int64_t until = std::min(pairs, q + 8); q < until; ++q) {
            Ints control[V];
            for (int v = 0; v < V; ++v) {
                control[v] = {_mm512_permutexvar_epi32(four[v].v, of_low.v)};  // the lowest four bits of every lane count
                four[v] = four[v] >> 4;
                if constexpr (M == 8) {
                    control[v] = control[v] | Ints{_mm512_permutexvar_epi32(two[v].v, of_third.v)};
                    two[v] = two[v] >> 2;
                }
            }
            f(q, control);
        }
    }
}

// Rows of x from which on places are turned into controls once, and not in every tile.
constexpr int64_t MANY = tile_rows<PANEL>() + 1;
constexpr int64_t PAIRS = 128;  // whose values and controls, 32 KB, stay near while the rows of x go by

inline int64_t pairs_scratch(const Weights& w, int64_t batch) { return batch < MANY ? 0 : std::min(PAIRS, w.in / w.m * w.n / 2) * PANEL; }

template <int M>
inline void few_rows_pairs(const Weights& w, const uint16_t* values, const Places& places, const uint16_t* x, int64_t batch, float* y,
                           int64_t first) {
    tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
        Tile<PANEL, ROWS> tile;
        tile.open(y, w.out, 0, true);
        each_pair<M>(places.low, places.third, places.held / 2, [&, x = x + row * w.in](int64_t q, const Ints* control) {
            const std::byte* here = reinterpret_cast<const std::byte*>(values + q * PANEL * 2);
            for (int k = 0; k < PANEL * 4; k += 64) __builtin_prefetch(here + AHEAD + k);
            add_pairs<M, ROWS, 1>(tile, values, q, control, x);
        });
        tile.close(y + row * w.out, w.out, first);
    });
}

// The same for all of `pairs`; it asks memory for those that come next.
template <int M, int ROWS>
inline void add_controlled(Tile<PANEL, ROWS>& tile, const uint16_t* values, const float* controls, int64_t pairs, const uint16_t* x) {
    constexpr int COUNT = M / 4, VECTORS = COUNT * PANEL / Vec::N;
    for (int64_t q = 0; q < pairs; q += COUNT) {
        Ints control[VECTORS];
        for (int i = 0; i < VECTORS; ++i) {
            __builtin_prefetch(reinterpret_cast<const std::byte*>(values + ((q + PAIRS) * PANEL + i * Vec::N) * 2));
            control[i] = Ints::load(controls + q * PANEL + i * Vec::N);
        }
        add_pairs<M, ROWS, COUNT>(tile, values, q, control, x);
    }
}

template <int M>
inline void many_rows_pairs(const Weights& w, const uint16_t* values, const Places& places, const uint16_t* x, int64_t batch, float* y,
                            int64_t first, float* controls) {
    for (int64_t q = 0; q < places.held / 2; q += PAIRS) {
        const int64_t some = std::min(PAIRS, places.held / 2 - q);
        each_pair<M>(places.low + q / 8 * PANEL * 4, places.third + q / 16 * PANEL * 4, some, [&](int64_t i, const Ints* control) {
            for (int v = 0; v < PANEL / Vec::N; ++v) _mm512_storeu_si512(controls + i * PANEL + v * Vec::N, control[v].v);
        });
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
            Tile<PANEL, ROWS> tile;
            tile.open(y + row * w.out, w.out, first, q == 0);
            add_controlled<M, ROWS>(tile, values + q * PANEL * 2, controls, some, x + row * w.in + q * 4 * ROWS);
            tile.close(y + row * w.out, w.out, first);
        });
    }
}

template <int M>
void linear_nm_bf16(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const uint16_t* x = static_cast<const uint16_t*>(ready);
    for (int64_t p = begin; p < end; ++p) {
        const Places places(w, p);
        const uint16_t* values = reinterpret_cast<const uint16_t*>(w.values) + p * places.held * PANEL;
        if (batch < MANY) few_rows_pairs<M>(w, values, places, x, batch, y, p * PANEL);
        else many_rows_pairs<M>(w, values, places, x, batch, y, p * PANEL, scratch);
    }
}
#endif

}  // namespace trimtab::ISA
