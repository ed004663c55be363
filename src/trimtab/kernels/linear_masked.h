// Codes of eight bits with unstructured zeros: a bit a place says which codes are there, in the order of the words of a dense
// panel. A hole is the zero point of its output, so that what is spread is a dense panel.
#pragma once
#include "linear_expand.h"

namespace trimtab::ISA {

constexpr int64_t ROW = PANEL * 4;  // bytes of a row of words: four inputs of a panel

// What the holes of a row of words are, in the group whose zero points begin at `first`.
struct Holes {
    alignas(64) uint8_t at[ROW];
    Holes(const Weights& w, int64_t first) {
        for (int64_t i = 0; i < PANEL; ++i) {
            const uint32_t four = (w.zeros ? w.zeros[first + i] : 128u) * 0x01010101u;
            std::memcpy(at + 4 * i, &four, 4);
        }
    }
};

// The next codes, each at the place of its bit: 64 places.
#if defined(__AVX512VBMI2__)
inline Ints spread64(const std::byte* bits, const uint8_t*& values, const uint8_t* holes) {
    const uint64_t mask = peek<uint64_t>(bits);
    const Ints codes{_mm512_mask_expand_epi8(_mm512_load_si512(holes), mask, _mm512_loadu_si512(values))};
    values += std::popcount(mask);
    return codes;
}
#endif

// `count` rows of words.
inline void spread_words(const std::byte* bits, const uint8_t*& values, const Holes& holes, int64_t count, std::byte* to) {
    for (int64_t i = 0; i < count; ++i, bits += ROW / 8, to += ROW) {
#if defined(__AVX512VBMI2__)
        for (int v = 0; v < 2; ++v) _mm512_storeu_si512(to + v * 64, spread64(bits + v * 8, values, holes.at + v * 64).v);
#elif defined(__AVX512F__)
        for (int v = 0; v < 8; ++v) {  // as integers of 32 bits, which are spread without VBMI2
            const uint16_t mask = peek<uint16_t>(bits + v * 2);
            const __m512i some = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)values));
            const __m512i hole = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)(holes.at + v * 16)));
            _mm_storeu_si128((__m128i*)(to + v * 16), _mm512_cvtepi32_epi8(_mm512_mask_expand_epi32(hole, mask, some)));
            values += std::popcount(mask);
        }
#else
        for (int v = 0; v < 4; ++v) {
            uint32_t mask = peek<uint32_t>(bits + v * 4);
            for (int k = v * 32; k < (v + 1) * 32; ++k, mask >>= 1) to[k] = std::byte(mask & 1 ? *values++ : holes.at[k]);
        }
#endif
    }
}

struct Masked {  // a panel
    const std::byte* bits;
    const uint8_t* values;
    Masked(const Weights& w, int64_t p)
        : bits(w.bits + p * ((w.in + 3) / 4) * (ROW / 8)), values(reinterpret_cast<const uint8_t*>(w.values) + w.pointers[p]) {}
};

#if defined(__AVX512VBMI2__)
// One row of x: from the stream into the sums. X: float as it is, int8_t for codes, which lie in groups of `group`.
template <class X>
inline void one_row_masked(const Weights& w, const X* x, const Codes* codes, int64_t group, float* y, int64_t p) {
    const int64_t groups = w.groups();
    Masked panel(w, p);
    Tile<PANEL, 1> total;
    total.open(y, w.out, 0, true);
    for (int64_t g = 0; g * group < w.in; ++g) {
        const int64_t from = g * group, until = std::min(w.in, from + group), first = (p * groups + (groups > 1 ? g : 0)) * PANEL;
        const Holes holes(w, first);
        Ints whole[2] = {Ints::zero(), Ints::zero()};
        Vec part[2] = {Vec::zero(), Vec::zero()};
        float met = codes ? codes->sums[g] : 0;
        for (int64_t i = from; i < until; i += 4, panel.bits += ROW / 8) {
            __builtin_prefetch(panel.bits + AHEAD / 8);
            __builtin_prefetch(panel.values + AHEAD);
            __builtin_prefetch(panel.values + AHEAD + 64);
            for (int v = 0; v < 2; ++v) {
                const Ints word = spread64(panel.bits + v * 8, panel.values, holes.at + v * 64);
                if constexpr (sizeof(X) == 1) {
                    whole[v] = whole[v].dot<8>(word, Ints::all(peek<int>(x + i)));
                } else {
                    const int some = int(std::min<int64_t>(4, until - i));
                    for (int k = 0; k < some; ++k) part[v] = part[v].fma(code_of<8>(word, k), Vec::all(x[i + k]));
                }
            }
        }
        if constexpr (sizeof(X) == 4)
            for (int64_t i = from; i < until; ++i) met += x[i];
        for (int v = 0; v < 2; ++v) {
            const int64_t side = first + v * Vec::N;
            const Vec sum = (codes ? whole[v].floats() : part[v]) - zero_at<8>(w, side) * Vec::all(met);
            total.sum[0][v] = total.sum[0][v].fma(sum, codes ? scale_at(w, side) * Vec::all(codes->scales[g]) : scale_at(w, side));
        }
    }
    total.close(y, w.out, p * PANEL);
}
#endif

// Floats of a few inputs, and the words they come from.
inline int64_t masked_scratch(const Weights&, int64_t) { return EXPAND * PANEL + EXPAND / 4 * PANEL; }

inline void linear_masked(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const float* x = static_cast<const float*>(ready);
#if defined(__AVX512VBMI2__)
    if (batch == 1) {
        for (int64_t p = begin; p < end; ++p) one_row_masked(w, x, nullptr, w.group, y, p);
        return;
    }
#endif
    const int64_t groups = w.groups();
    std::byte* words = reinterpret_cast<std::byte*>(scratch + EXPAND * PANEL);
    for (int64_t p = begin; p < end; ++p) {
        Masked panel(w, p);
        for (int64_t k = 0; k < w.in;) {
            const int64_t g = k / w.group, some = std::min({EXPAND, w.in - k, (g + 1) * w.group - k});
            const int64_t first = (p * groups + g) * PANEL, count = (some + 3) / 4;
            spread_words(panel.bits, panel.values, Holes(w, first), count, words);
            panel.bits += count * (ROW / 8);
            expand<8, PANEL>(w, words, 0, some, first, scratch);
            add_panel(w, scratch, x, w.in, k, some, batch, y, p);
            k += some;
        }
    }
}

// Sums of every row of x, and the words of a group.
inline int64_t masked_codes_scratch(const Weights& w, int64_t batch) { return batch * PANEL + (group_of(w) + 3) / 4 * PANEL; }

inline void linear_masked_codes(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* total) {
    const Input input = in_tiles(w);
    const Codes x(ready, input, w.in, batch);
#if defined(__AVX512VBMI2__)
    if (batch == 1) {
        for (int64_t p = begin; p < end; ++p) one_row_masked(w, x.x, &x, input.group, y, p);
        return;
    }
#endif
    const int64_t groups = w.groups();
    std::byte* words = reinterpret_cast<std::byte*>(total + batch * PANEL);
    for (int64_t p = begin; p < end; ++p) {
        Masked panel(w, p);
        std::fill_n(total, batch * PANEL, 0.0f);
        for (int64_t g = 0; g < x.groups; ++g) {
            const int64_t from = g * input.group, count = (std::min(w.in, from + input.group) - from + 3) / 4;
            const int64_t first = (p * groups + (groups > 1 ? g : 0)) * PANEL;
            spread_words(panel.bits, panel.values, Holes(w, first), count, words);
            panel.bits += count * (ROW / 8);
            tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
                add_codes<8, PANEL, ROWS>(total + row * PANEL, w, words, count, x, row, from, g, first);
            });
        }
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) { close_total<PANEL, ROWS>(total + row * PANEL, w, y + row * w.out, p * PANEL); });
    }
}

}  // namespace trimtab::ISA
