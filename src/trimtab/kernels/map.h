// Linear maps with their biases: alone, made of several, or several of the same input.
#pragma once
#include <optional>
#include <span>
#include <string>
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
    bool operator==(const Affine&) const = default;
};

// What a gate scores: x itself; the gate of the MLP that the map ends, activated; or by a router what is given to the sublayer it ends.
enum class Source { input, hidden, router };
Source source_of(const std::string& name);  // std::invalid_argument says which there are

// Which inputs of a row are computed, the others counting as zero: those whose score is above the threshold, or the `count` largest, of equal
// ones the first. A score is |v| * scale, v being what is scored; a router's are its own, as they are: the largest of `pool` decides for
// `group` inputs, and `count` counts such groups. What is no number is computed.
struct Gate {
    Source of = Source::input;
    int64_t count = 0;            // 0: by the threshold
    float threshold = 0;
    std::vector<float> scale;     // empty: 1
    std::vector<Affine> router{};
    int64_t group = 1, pool = 1;  // of a router
    int64_t scores(int64_t n) const { return n / group * pool; }  // of n inputs
    bool operator==(const Gate&) const = default;
};
// y [rows, n] is x where `scored` [rows, scores(n)] passes; y may be x.
void pass(const Gate& g, const float* x, const float* scored, int64_t rows, int64_t n, float* y, const With& with);
// What the router of a gate makes of x, which is not rounded; it lies there until the next call.
const float* routed(const Gate& g, const float* x, int64_t rows, const With& with);

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
    // The gate of all that is added, where it scores what only who runs the sublayer has; who does lets x pass it.
    const Gate* told() const { return terms[0].gate && terms[0].gate->of != Source::input ? &*terms[0].gate : nullptr; }
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
