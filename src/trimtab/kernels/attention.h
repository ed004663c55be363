// Attention over pages of keys and values: scores and sums are tiles of panels, as in a dense map.
#pragma once
#include <cmath>
#include <limits>

#include "input.h"
#include "ops.h"
#include "tile.h"
#include "vecmath.h"

namespace trimtab::ISA {

template <class T>
inline void remember_as(const Heads& h, std::byte* page, int64_t position, const float* k, const float* v) {
    constexpr int64_t pair = sizeof(T) == 2 ? 2 : 1, ROUND = 64;
    const int64_t at = position % PAGE, wide = h.key_width();
    // f(i, value): element i of a row, as it is stored.
    auto stored = [&](const float* row, const auto& f) {
        if constexpr (pair == 1) {
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
        T* keys = reinterpret_cast<T*>(page) + n * h.elements();
        T* values = keys + PAGE * wide;
        stored(k, [&](int64_t i, T x) { keys[at / PANEL * PANEL * wide + i / pair * PANEL * pair + at % PANEL * pair + i % pair] = x; });
        stored(v, [&](int64_t i, T x) { values[i / PANEL * PANEL * PAGE + at / pair * PANEL * pair + i % PANEL * pair + at % pair] = x; });
    }
}

inline void remember(const Heads& h, std::byte* page, int64_t position, const float* k, const float* v) {
    h.exact ? remember_as<float>(h, page, position, k, v) : remember_as<uint16_t>(h, page, position, k, v);
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
    constexpr int64_t each = 4 / sizeof(X);
    auto at_home = [&](int64_t r) { return tile_at(r, rows, tile_rows<PANEL>()); };
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = a.q + r / a.group * a.stride + r % a.group * h.dim;
        float* scaled = sums + r * out;
        for (int64_t i = 0; i < h.dim; ++i) scaled[i] = from[i] * a.scale;
        as(scaled, h.dim, row);
        place(row, wide / each, at_home(r), r, wide / each, q);
        std::fill_n(sums + r * out, out, 0.0f);
        largest[r] = -std::numeric_limits<float>::infinity();
        total[r] = 0;
    }
    for (int64_t page = a.window ? std::max<int64_t>(0, a.begin - a.window + 1) / PAGE : 0; page <= last / PAGE; ++page) {
        const int64_t start = page * PAGE, n = std::min(PAGE, (last - start) / PANEL * PANEL + PANEL);
        const T* keys = reinterpret_cast<const T*>(a.pages[page]) + a.head * h.elements();
        const T* values = keys + PAGE * wide;
        for (int64_t k = 0; k < n; k += PANEL)
            tiles<PANEL>(rows, [&]<int ROWS>(int64_t r) {
                Tile<PANEL, ROWS> tile;
                tile.open(scores, PAGE, k, true);
                tile.add(keys + k * wide, q + r * wide, h.dim);
                tile.close(scores + r * PAGE, PAGE, k);
            });
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
            as(s, n, row);
            place(row, n / each, at_home(r), r, PAGE / each, shares);
        }
        for (int64_t c = 0; c < out; c += PANEL)
            tiles<PANEL>(rows, [&]<int ROWS>(int64_t r) {
                Tile<PANEL, ROWS> tile;
                tile.open(sums + r * out, out, c, false);
                tile.add(values + c * PAGE, shares + r * PAGE, n);
                tile.close(sums + r * out, out, c);
            });
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* to = a.y + r / a.group * a.stride + r % a.group * h.dim;
        const float inverse = 1.0f / total[r];
        for (int64_t i = 0; i < h.dim; ++i) to[i] = sums[r * out + i] * inverse;
    }
}

inline void attend(const Attend& a, float* scratch) { a.heads.exact ? attend_as<float>(a, scratch) : attend_as<uint16_t>(a, scratch); }

}  // namespace trimtab::ISA
