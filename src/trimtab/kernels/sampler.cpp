#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace trimtab {
namespace {

// Neighbouring numbers in, unrelated numbers out: two rounds of multiply and shift on 64 bits.
uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

}  // namespace

double uniform(uint64_t seed, uint64_t sequence, uint64_t step) {
    return double(mixed(mixed(mixed(seed) ^ sequence) ^ step) >> 11) * 0x1p-53;
}

int64_t Sampler::choose(const float* logits, int64_t n, const Sampling& how, double drawn) {
    int64_t best = 0;
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
        finite &= std::isfinite(logits[i]);
        if (logits[i] > logits[best]) best = i;
    }
    if (!finite) throw std::runtime_error("the model's scores are not finite numbers; its weights overflow, or are damaged");
    if (how.temperature <= 0 || how.top_k == 1) return best;
    const double peak = logits[best];
    auto higher = [](const Candidate& a, const Candidate& b) { return a.score != b.score ? a.score > b.score : a.token < b.token; };
    candidates_.clear();
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
        candidates_.push_back({logits[i], i, std::exp((logits[i] - peak) / how.temperature)});
        total += candidates_.back().weight;
    }
    if (how.top_k > 0 && how.top_k < n) {
        std::nth_element(candidates_.begin(), candidates_.begin() + how.top_k, candidates_.end(), higher);
        candidates_.resize(size_t(how.top_k));
        std::sort(candidates_.begin(), candidates_.end(), higher);
        total = 0;
        for (const Candidate& c : candidates_) total += c.weight;
    }
    if (how.top_p < 1) {
        // All that are this small have less than 1 - p together: none of them is needed, and few are left to sort.
        const double least = (1 - how.top_p) * total / double(candidates_.size());
        std::erase_if(candidates_, [&](const Candidate& c) { return c.weight < least; });
        std::sort(candidates_.begin(), candidates_.end(), higher);
        double share = 0;
        size_t kept = 0;
        while (kept < candidates_.size() && share < how.top_p * total) share += candidates_[kept++].weight;
        candidates_.resize(std::max<size_t>(kept, 1));
        total = std::max(share, candidates_[0].weight);
    }
    double left = drawn * total;
    for (const Candidate& c : candidates_)
        if ((left -= c.weight) < 0) return c.token;
    return candidates_.back().token;  // what rounding left over
}

}  // namespace trimtab
