// Linear maps with their biases: alone, made of several, or several of the same input.
#pragma once
#include <optional>
#include <span>
#include <vector>

#include "linear.h"
#include "ops.h"

namespace trimtab {

// What a map is run with: what x may be rounded to, on how many threads, by which instruction set beside the kernels.
struct With {
    Type narrowest;
    int threads;
    const Ops* ops;
};

// Linear maps applied in turn, each with a bias or none: one, or the factors of one.
struct Affine {
    const Linear* linear;
    std::vector<float> bias;
};

// Which inputs of a row are computed, the others counting as zero: those whose score |v| * scale is above the threshold, or the `count`
// largest, v being x itself or, `hidden`, the gate of the MLP that the map ends, activated. What is no number is computed.
struct Gate {
    bool hidden = false;
    int64_t count = 0;         // 0: by the threshold
    float threshold = 0;
    std::vector<float> scale;  // empty: 1
    bool operator==(const Gate&) const = default;
};
// y [rows, n] is x where `scored` [rows, n] passes; y may be x.
void pass(const Gate& g, const float* x, const float* scored, int64_t rows, int64_t n, float* y, const With& with);

// One of the maps that are added: the inputs it computes, and takes (all, if none is named), the bases around it, what it is, and from
// which of the sum's outputs on it is added.
struct Term {
    std::vector<int32_t> taken;
    const Turn *inside = nullptr, *outside = nullptr;
    std::vector<Affine> chain;
    int64_t begin = 0;
    std::optional<Gate> gate{};
    bool plain() const { return taken.empty() && !inside && !outside; }
    int64_t out() const { return chain.back().linear->weights().out; }
};

struct Map {
    int64_t in, out;
    std::vector<Term> terms;
    std::vector<float> bias;  // of the sum
    // A linear map and nothing else.
    static Map of(const Linear& l) { return {l.weights().in, l.weights().out, {{{}, nullptr, nullptr, {{&l, {}}}, 0}}, {}}; }
    // The gate of all that is added, where the MLP it ends has to tell what it scores.
    const Gate* hidden() const { return terms[0].gate && terms[0].gate->hidden ? &*terms[0].gate : nullptr; }
    // Whether every term gives all outputs; else each some of them.
    bool whole() const { return terms[0].out() == out; }
    // That linear map; null for what has more to it, a gate aside.
    const Linear* alone() const;
};
int64_t bytes(const Map& m);  // of all its weights

// Up to three maps of the same x [rows, in]. What reads the same input runs together, what is left of each one after the other.
struct Target { const Map* map; float* y; };
void apply(std::span<const Target> targets, const float* x, int64_t rows, const With& with);

}  // namespace trimtab
