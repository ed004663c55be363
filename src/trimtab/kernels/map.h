// Linear maps with their biases: alone, made of several, or several of the same input.
#pragma once
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

// One of the maps that are added: the inputs it takes (all, if none is named), the bases around it, what it is, and from which of the
// sum's outputs on it is added.
struct Term {
    std::vector<int32_t> taken;
    const Turn *inside = nullptr, *outside = nullptr;
    std::vector<Affine> chain;
    int64_t begin = 0;
    bool plain() const { return taken.empty() && !inside && !outside; }
    int64_t out() const { return chain.back().linear->weights().out; }
};

struct Map {
    int64_t in, out;
    std::vector<Term> terms;
    std::vector<float> bias;  // of the sum
    // A linear map and nothing else.
    static Map of(const Linear& l) { return {l.weights().in, l.weights().out, {{{}, nullptr, nullptr, {{&l, {}}}, 0}}, {}}; }
    // Whether every term gives all outputs; else each some of them.
    bool whole() const { return terms[0].out() == out; }
    // That linear map; null for what has more to it.
    const Linear* alone() const;
};
int64_t bytes(const Map& m);  // of all its weights

// Up to three maps of the same x [rows, in]. What reads the same input runs together, what is left of each one after the other.
struct Target { const Map* map; float* y; };
void apply(std::span<const Target> targets, const float* x, int64_t rows, const With& with);

}  // namespace trimtab
