// Which token comes next, given what each one scored.
#pragma once
#include <cstdint>
#include <vector>

namespace trimtab {

struct Sampling {
    double temperature = 0;    // 0: the token with the highest score
    int64_t top_k = 0;         // only the k highest; 0: all
    double top_p = 1;          // only the highest that have this share together
    uint64_t seed = 0;
};

// A number from 0 up to 1 that depends on nothing but the seed and the place where it is drawn.
double uniform(uint64_t seed, uint64_t sequence, uint64_t step);

class Sampler {
public:
    // The token that `drawn`, from 0 up to 1, falls on. Throws std::runtime_error where a score is not a finite number.
    int64_t choose(const float* logits, int64_t n, const Sampling& how, double drawn);

private:
    struct Candidate { float score; int64_t token; double weight; };
    std::vector<Candidate> candidates_;
};

}  // namespace trimtab
