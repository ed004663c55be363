// Linear maps with their biases: alone, as the factors of one, or several of the same input.
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
using Map = std::vector<Affine>;
inline int64_t inputs(const Map& m) { return m.front().linear->weights().in; }
inline int64_t outputs(const Map& m) { return m.back().linear->weights().out; }
int64_t bytes(const Map& m);  // of all its weights

// Up to three maps of the same x [rows, in]. Their first factors run together, what is left of each one after the other.
struct Target { const Map* map; float* y; };
void apply(std::span<const Target> targets, const float* x, int64_t rows, const With& with);

}  // namespace trimtab
