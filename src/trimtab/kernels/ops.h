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
struct Heads {
    int64_t count, dim;        // key/value heads, and the width of one
    bool exact;                // float32, or else bfloat16
    int64_t key_width() const { return (dim + 1) / 2 * 2; }
    int64_t value_width() const { return (dim + PANEL - 1) / PANEL * PANEL; }
    int64_t elements() const { return PAGE * (key_width() + value_width()); }  // of one head
    int64_t bytes() const { return count * elements() * (exact ? 4 : 2); }
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
    int64_t scratch() const {  // floats
        return count * group * (2 * PAGE + heads.value_width() + heads.key_width() + 2) + PAGE + heads.key_width();
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
    // Keys and values [heads, dim] of one position go into its page.
    void (*remember)(const Heads& heads, std::byte* page, int64_t position, const float* k, const float* v);
    void (*attend)(const Attend& a, float* scratch);
};

}  // namespace trimtab
