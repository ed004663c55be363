// What a decoder does beside its linear maps, once for every instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernel.h"

namespace trimtab {

enum class Activation { silu, gelu, gelu_tanh, relu };

// Positions of a page of keys and values: whole panels, and few enough that a page stays in the second-level cache.
constexpr int64_t PAGE = 128;

// How the keys and values of one attention lie in a page: head after head, the keys and then the values of each. Both are
// in panels that the kernels of dense maps read: keys [PAGE / PANEL, dim, PANEL], values [dim / PANEL, PAGE, PANEL], in
// bfloat16 with pairs side by side (of inputs for keys, of positions for values).
//
// With `bits`, a page that is full and behind the position that is computed is codes: x = scale * (base + code), the scale in
// bfloat16 and the base a whole number of 16 bits, shared by a channel's keys over the page and by a position's values. Channels of
// keys differ in size and stay as they are from one position to the next, so that each has a scale of its own (KIVI, arXiv
// 2402.02750; KVQuant, arXiv 2401.18079); a position's values are of one size. Both are known once a page is full: nothing is
// calibrated, and what a position gets does not depend on how many were fed together. KVQuant keeps keys as they are before RoPE; over
// the 128 positions of a page, each with scales of its own, that was no better here (benchmarks/cache.py), and it would have to be
// turned every time it is read. Nor does the first page, or a scale for every 32 of a head's values, gain what its bytes would elsewhere.
// The codes lie in words of 32 / bits inputs (ints.h), of channels for keys [PAGE / PANEL, words, PANEL] and of positions for values
// [dim / PANEL, words, PANEL]; behind them the grids, of keys and of values.
struct Grid { uint16_t scale; int16_t base; };
struct Heads {
    int64_t count, dim;        // key/value heads, and the width of one
    bool exact;                // float32, or else bfloat16
    int bits;                  // 8 or 4, of pages of codes; 0: there are none
    int64_t key_width() const { return (dim + 1) / 2 * 2; }
    int64_t value_width() const { return (dim + PANEL - 1) / PANEL * PANEL; }
    int64_t elements() const { return PAGE * (key_width() + value_width()); }  // of one head
    int64_t bytes() const { return count * elements() * (exact ? 4 : 2); }
    // The same of a page of codes.
    int64_t channels() const { return (dim + 15) / 16 * 16; }  // of keys, in whole vectors
    int64_t code_words() const { return PAGE * (channels() + value_width()) * bits / 32; }
    int64_t code_bytes() const { return (code_words() * 4 + (channels() + PAGE) * int64_t(sizeof(Grid)) + 63) / 64 * 64; }  // of one head
};

// Some positions of one sequence with one key/value head and the query heads that share it.
struct Attend {
    Heads heads;
    int64_t head, group;       // which key/value head; query heads it serves
    int64_t begin, count;      // positions
    int64_t window;            // positions a query sees, itself among them; 0: all before it
    float scale;
    const float* q;            // of the first position and query head; the heads of a position side by side
    float* y;                  // as q
    int64_t stride;            // from one position to the next, of q and y
    const std::byte* const* pages;
    const std::byte* const* codes;  // with `bits`: the pages before the one that all of these positions lie in
    int64_t scratch() const {  // floats
        const int64_t most = std::max(heads.channels(), PAGE), coded = heads.bits ? count * group * (heads.channels() + most) + 3 * most : 0;
        return count * group * (2 * PAGE + heads.value_width() + heads.key_width() + 2) + PAGE + heads.key_width() + coded;
    }
};

// A vector of n in another basis: as a matrix [a, b] it becomes left (x * before) right, times `after`.
struct Turn {
    int64_t size, a = 0, b = 0;          // a of 0: no matrices
    std::vector<float> before, after;    // [n], or empty
    std::vector<float> left, right;      // [a, a]; [b, wide], filled up with zeros
    int64_t wide() const { return (b + 15) / 16 * 16; }
    int64_t cost() const { return a + b + 1; }  // steps an entry
    bool operator==(const Turn&) const = default;
};

struct Ops {
    // y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
    void (*rms)(const float* x, const float* weight, int64_t n, float eps, float* y);
    // Pairs (i, i + half) of x turned by an angle.
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
    void (*add)(float* x, const float* y, int64_t n);
    // y = x in the basis; y may be x.
    void (*turn)(const Turn& t, const float* x, float* y);
    // x = f(gate) * x, or f(x) where there is no gate.
    void (*activate)(Activation f, const float* gate, float* x, int64_t n);
    // y = x where |scored| * scale is above the threshold, or is no number, and 0 elsewhere; null scales are 1; y may be x.
    void (*pass)(const float* x, const float* scored, const float* scale, float threshold, int64_t n, float* y);
    // Keys and values [heads, dim] of one position go into its page.
    void (*remember)(const Heads& heads, std::byte* page, int64_t position, const float* k, const float* v);
    // A head's page becomes codes.
    void (*encode)(const Heads& heads, int64_t head, const std::byte* page, std::byte* to);
    void (*attend)(const Attend& a, float* scratch);
};

}  // namespace trimtab
