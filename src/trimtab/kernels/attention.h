// Attention over pages of keys and values: scores and sums are tiles of panels, as in a dense map.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "input.h"
#include "ints.h"
#include "ops.h"
#include "tile.h"
#include "vecmath.h"

namespace trimtab::ISA {

// The place of key t and of value t of channel i in a head's page of T, the values behind the keys.
template <class T>
inline int64_t key_at(const Heads& h, int64_t t, int64_t i) {
    constexpr int64_t pair = sizeof(T) == 2 ? 2 : 1;
    return t / PANEL * PANEL * h.key_width() + i / pair * PANEL * pair + t % PANEL * pair + i % pair;
}
template <class T>
inline int64_t value_at(const Heads& h, int64_t t, int64_t i) {
    constexpr int64_t pair = sizeof(T) == 2 ? 2 : 1;
    return PAGE * h.key_width() + i / PANEL * PANEL * PAGE + t / pair * PANEL * pair + i % PANEL * pair + t % pair;
}

template <class T>
inline void remember_as(const Heads& h, std::byte* page, int64_t position, const float* k, const float* v) {
    constexpr int64_t ROUND = 64;
    const int64_t at = position % PAGE;
    // f(i, value): element i of a row, as it is stored.
    auto stored = [&](const float* row, const auto& f) {
        if constexpr (sizeof(T) == 4) {
            for (int64_t i = 0; i < h.dim; ++i) f(i, row[i]);
        } else {
            uint16_t part[ROUND];
            for (int64_t i = 0; i < h.dim; i += ROUND) {
                const int64_t some = std::min(ROUND, h.dim - i);
                to_bf16(row + i, some, part);
                for (int64_t j = 0; j < some; ++j) f(i + j, part[j]);
            }
        }
    };
    for (int64_t n = 0; n < h.count; ++n, k += h.dim, v += h.dim) {
        T* to = reinterpret_cast<T*>(page) + n * h.elements();
        stored(k, [&](int64_t i, T x) { to[key_at<T>(h, at, i)] = x; });
        stored(v, [&](int64_t i, T x) { to[value_at<T>(h, at, i)] = x; });
    }
}

inline void remember(const Heads& h, std::byte* page, int64_t position, const float* k, const float* v) {
    h.exact ? remember_as<float>(h, page, position, k, v) : remember_as<uint16_t>(h, page, position, k, v);
}

// Codes of n numbers that share a grid from the smallest to the largest, to `put(j, code)`. The base is whole, so that any offset costs
// the scale nothing; where it is more than 32000 steps, the step is larger. What is not finite makes all of them NaN.
template <int BITS, class F>
inline Grid encode_row(const float* x, int64_t n, const F& put) {
    constexpr float top = (1 << BITS) - 1, ROUND = 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
    float low = x[0], high = x[0];
    uint32_t most = 0;  // as bits: what is not finite is above all that is
    for (int64_t j = 0; j < n; ++j) {
        low = std::min(low, x[j]);
        high = std::max(high, x[j]);
        most = std::max(most, peek<uint32_t>(x + j) & 0x7fffffff);
    }
    const float size = std::bit_cast<float>(most), step = std::max((high - low) / top, size / 32000.0f);
    Grid grid{0, 0};
    if (!(size <= std::numeric_limits<float>::max() / 4)) grid.scale = 0x7fc0;
    else if (step > 1e-30f) grid.scale = uint16_t((std::bit_cast<uint32_t>(step) + 0x8000) >> 16);
    if (grid.scale == 0 || grid.scale == 0x7fc0) return grid;
    const float inverse = 1.0f / std::bit_cast<float>(uint32_t(grid.scale) << 16);
    const float base = low * inverse + ROUND - ROUND;
    grid.base = int16_t(base);
    for (int64_t j = 0; j < n; ++j) put(j, uint32_t(std::clamp((x[j] * inverse + ROUND - ROUND) - base, 0.0f, top)));
    return grid;
}

template <int BITS, class T>
void encode_as(const Heads& h, const T* from, std::byte* to) {
    constexpr int P = 32 / BITS;
    thread_local std::vector<float> row;
    row.resize(size_t(std::max(h.dim, PAGE)));
    uint32_t* keys = reinterpret_cast<uint32_t*>(to);
    uint32_t* values = keys + PAGE * h.channels() / P;
    Grid* grids = reinterpret_cast<Grid*>(keys + h.code_words());
    std::fill_n(to, h.code_bytes(), std::byte(0));
    auto wide = [](T x) {
        if constexpr (sizeof(T) == 4) return x;
        else return std::bit_cast<float>(uint32_t(x) << 16);
    };
    for (int64_t i = 0; i < h.dim; ++i) {
        for (int64_t t = 0; t < PAGE; ++t) row[size_t(t)] = wide(from[key_at<T>(h, t, i)]);
        grids[i] = encode_row<BITS>(row.data(), PAGE, [&](int64_t t, uint32_t code) {
            keys[(t / PANEL * h.channels() / P + i / P) * PANEL + t % PANEL] |= code << shift_of<BITS>(int(i % P));
        });
    }
    for (int64_t t = 0; t < PAGE; ++t) {
        for (int64_t i = 0; i < h.dim; ++i) row[size_t(i)] = wide(from[value_at<T>(h, t, i)]);
        grids[h.channels() + t] = encode_row<BITS>(row.data(), h.dim, [&](int64_t i, uint32_t code) {
            values[(i / PANEL * (PAGE / P) + t / P) * PANEL + i % PANEL] |= code << shift_of<BITS>(int(t % P));
        });
    }
}

inline void encode(const Heads& h, int64_t head, const std::byte* page, std::byte* to) {
    to += head * h.code_bytes();
    auto with = [&]<int BITS>() {
        if (h.exact) encode_as<BITS>(h, reinterpret_cast<const float*>(page) + head * h.elements(), to);
        else encode_as<BITS>(h, reinterpret_cast<const uint16_t*>(page) + head * h.elements(), to);
    };
    h.bits == 8 ? with.template operator()<8>() : with.template operator()<4>();
}

// The grids of n inputs as floats: scales, and behind them the values of code 0.
inline void floats(const Grid* grids, int64_t n, float* scales) {
    for (int64_t i = 0; i < n; ++i) {
        scales[i] = std::bit_cast<float>(uint32_t(grids[i].scale) << 16);
        scales[n + i] = scales[i] * float(grids[i].base);
    }
}

// What codes are multiplied by in place of x, and what is added then; n fills whole vectors.
inline float folded(const float* x, const float* scales, int64_t n, float* to) {
    Vec offset = Vec::zero();
    for (int64_t i = 0; i < n; i += Vec::N) {
        (Vec::load(x + i) * Vec::load(scales + i)).store(to + i);
        offset = offset.fma(Vec::load(x + i), Vec::load(scales + n + i));
    }
    return sum(offset);
}

// Adds a panel of codes times x [inputs, ROWS].
template <int BITS, int ROWS>
[[gnu::always_inline]] inline void add_codes(Tile<PANEL, ROWS>& tile, const uint32_t* words, const float* x, int64_t inputs) {
    constexpr int P = 32 / BITS, V = PANEL / Vec::N;
    for (int64_t i = 0; i < inputs; i += P, words += PANEL, x += P * ROWS) {
        Ints word[V];
        unrolled<V>(EACH(v) { word[v] = Ints::load(words + v * Vec::N); });
        for (int k = 0; k < PANEL * 4; k += 64) __builtin_prefetch(reinterpret_cast<const std::byte*>(words) + AHEAD + k);
        unrolled<P>(EACH(j) {
            Vec code[V];
            unrolled<V>(EACH(v) { code[v] = code_of<BITS>(word[v], j); });
            unrolled<ROWS>(EACH(r) {
                const Vec b = Vec::all(x[j * ROWS + r]);
                unrolled<V>(EACH(v) { tile.sum[r][v] = tile.sum[r][v].fma(code[v], b); });
            });
        });
    }
}

// The same for all rows of x, onto y [rows, out] from `first` on.
inline void add_codes(const Heads& h, const uint32_t* words, const float* x, int64_t inputs, int64_t rows, float* y, int64_t out, int64_t first) {
    tiles<PANEL>(rows, [&]<int ROWS>(int64_t r) {
        Tile<PANEL, ROWS> tile;
        tile.open(y + r * out, out, first, false);
        if (h.bits == 8) add_codes<8>(tile, words, x + r * inputs, inputs);
        else add_codes<4>(tile, words, x + r * inputs, inputs);
        tile.close(y + r * out, out, first);
    });
}

inline void as(const float* x, int64_t n, float* to) { std::copy_n(x, n, to); }
inline void as(const float* x, int64_t n, uint16_t* to) { to_bf16(x, n, to); }

// A softmax that goes over the pages once: sums are scaled down when a larger score comes. What a row gets does not depend
// on which rows are computed with it: a key that it does not see adds nothing at all.
template <class T>
void attend_as(const Attend& a, float* scratch) {
#if defined(__AVX512BF16__)
    using X = T;               // what keys and values are multiplied by: rounded like them where there is an instruction
#else
    using X = float;
#endif
    const Heads& h = a.heads;
    const int64_t rows = a.count * a.group, wide = h.key_width(), out = h.value_width(), last = a.begin + a.count - 1;
    float* scores = scratch;                             // [rows, PAGE]
    float* sums = scores + rows * PAGE;                  // [rows, out]
    float* largest = sums + rows * out;                  // [rows]
    float* total = largest + rows;                       // [rows]
    X* q = reinterpret_cast<X*>(total + rows);           // [rows, wide] in tiles
    X* shares = q + rows * wide;                         // [rows, PAGE] in tiles
    X* row = shares + rows * PAGE;                       // one of either
    // What meets pages of codes, which are never rounded.
    const int64_t own = h.bits ? a.begin / PAGE : 0, channels = h.channels(), wider = std::max(channels, PAGE);  // pages before `own` are codes
    float* whole = largest + rows * (2 + wide + PAGE) + PAGE + wide;  // [rows, channels] q
    float* scales = whole + rows * channels;             // [2, wider]
    float* met = scales + 2 * wider;                      // [rows, channels or PAGE] in tiles
    float* one = met + rows * wider;                      // a row of it
    constexpr int64_t each = 4 / sizeof(X);
    auto at_home = [&](int64_t r) { return tile_at(r, rows, tile_rows<PANEL>()); };
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = a.q + r / a.group * a.stride + r % a.group * h.dim;
        float* scaled = sums + r * out;
        for (int64_t i = 0; i < h.dim; ++i) scaled[i] = from[i] * a.scale;
        as(scaled, h.dim, row);
        place(row, wide / each, at_home(r), r, wide / each, q);
        if (own) std::fill(std::copy_n(scaled, h.dim, whole + r * channels), whole + (r + 1) * channels, 0.0f);
        std::fill_n(sums + r * out, out, 0.0f);
        largest[r] = -std::numeric_limits<float>::infinity();
        total[r] = 0;
    }
    for (int64_t page = a.window ? std::max<int64_t>(0, a.begin - a.window + 1) / PAGE : 0; page <= last / PAGE; ++page) {
        const int64_t start = page * PAGE, n = std::min(PAGE, (last - start) / PANEL * PANEL + PANEL);
        const bool coded = page < own;
        const T* keys = coded ? nullptr : reinterpret_cast<const T*>(a.pages[page]) + a.head * h.elements();
        const uint32_t* codes = coded ? reinterpret_cast<const uint32_t*>(a.codes[page] + a.head * h.code_bytes()) : nullptr;
        const Grid* grids = coded ? reinterpret_cast<const Grid*>(codes + h.code_words()) : nullptr;
        if (coded) {
            floats(grids, channels, scales);
            for (int64_t r = 0; r < rows; ++r) {
                std::fill_n(scores + r * PAGE, PAGE, folded(whole + r * channels, scales, channels, one));
                place(one, channels, at_home(r), r, channels, met);
            }
            for (int64_t k = 0; k < PAGE; k += PANEL) add_codes(h, codes + k * channels * h.bits / 32, met, channels, rows, scores, PAGE, k);
            floats(grids + channels, PAGE, scales);
        } else {
            for (int64_t k = 0; k < n; k += PANEL)
                tiles<PANEL>(rows, [&]<int ROWS>(int64_t r) {
                    Tile<PANEL, ROWS> tile;
                    tile.open(scores, PAGE, k, true);
                    tile.add(keys + k * wide, q + r * wide, h.dim);
                    tile.close(scores + r * PAGE, PAGE, k);
                });
        }
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = a.begin + r / a.group - start;  // of the query, seen from the page's first key
            const int64_t from = a.window ? std::clamp<int64_t>(at - a.window + 1, 0, n) : 0, to = std::clamp<int64_t>(at + 1, 0, n);
            float* s = scores + r * PAGE;
            if (from < to) {
                std::fill(s, s + from, -std::numeric_limits<float>::infinity());
                std::fill(s + to, s + n, -std::numeric_limits<float>::infinity());
                Vec peak = Vec::load(s);
                for (int64_t i = Vec::N; i < n; i += Vec::N) peak = peak.max(Vec::load(s + i));
                const float top = std::max(largest[r], most(peak)), kept = std::exp(largest[r] - top);
                for (int64_t i = 0; i < n; i += Vec::N) exp(Vec::load(s + i) - Vec::all(top)).store(s + i);
                std::fill(s, s + from, 0.0f);
                std::fill(s + to, s + n, 0.0f);
                Vec all = Vec::zero();
                for (int64_t i = 0; i < n; i += Vec::N) all = all + Vec::load(s + i);
                total[r] = total[r] * kept + sum(all);
                if (kept != 1.0f)
                    for (int64_t i = 0; i < out; i += Vec::N) (Vec::load(sums + r * out + i) * Vec::all(kept)).store(sums + r * out + i);
                largest[r] = top;
            } else {
                std::fill_n(s, n, 0.0f);
            }
            if (coded) {
                const Vec offset = Vec::all(folded(s, scales, PAGE, one));
                for (int64_t i = 0; i < out; i += Vec::N) (Vec::load(sums + r * out + i) + offset).store(sums + r * out + i);
                place(one, PAGE, at_home(r), r, PAGE, met);
            } else {
                as(s, n, row);
                place(row, n / each, at_home(r), r, PAGE / each, shares);
            }
        }
        for (int64_t c = 0; c < out; c += PANEL) {
            if (coded) {
                add_codes(h, codes + PAGE * (channels + c) * h.bits / 32, met, PAGE, rows, sums, out, c);
                continue;
            }
            tiles<PANEL>(rows, [&]<int ROWS>(int64_t r) {
                Tile<PANEL, ROWS> tile;
                tile.open(sums + r * out, out, c, false);
                tile.add(keys + PAGE * wide + c * PAGE, shares + r * PAGE, n);
                tile.close(sums + r * out, out, c);
            });
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* to = a.y + r / a.group * a.stride + r % a.group * h.dim;
        const float inverse = 1.0f / total[r];
        for (int64_t i = 0; i < h.dim; ++i) to[i] = sums[r * out + i] * inverse;
    }
}

inline void attend(const Attend& a, float* scratch) { a.heads.exact ? attend_as<float>(a, scratch) : attend_as<uint16_t>(a, scratch); }

}  // namespace trimtab::ISA
