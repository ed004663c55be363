#include "map.h"

#include <array>
#include <utility>

#include "pool.h"

namespace trimtab {

int64_t bytes(const Map& m) {
    int64_t all = 0;
    for (const Affine& a : m) all += a.linear->bytes();
    return all;
}

void apply(std::span<const Target> targets, const float* x, int64_t rows, const With& with) {
    thread_local std::vector<float> between[6];
    std::array<Job, 3> jobs;
    std::array<float*, 3> at;
    for (size_t i = 0; i < targets.size(); ++i) {
        const Map& m = *targets[i].map;
        const Linear& first = *m[0].linear;
        at[i] = m.size() == 1 ? targets[i].y : sized(between[2 * i], rows * first.weights().out);
        jobs[i] = {&first.weights(), first.best(with.narrowest, rows), at[i]};
    }
    run({jobs.data(), targets.size()}, x, rows, with.threads);
    for (size_t i = 0; i < targets.size(); ++i) {
        const Map& m = *targets[i].map;
        for (size_t s = 0; s < m.size(); ++s) {
            const Linear& linear = *m[s].linear;
            const int64_t width = linear.weights().out;
            if (s) {
                float* y = s + 1 == m.size() ? targets[i].y : sized(between[2 * i + s % 2], rows * width);
                const Job job{&linear.weights(), linear.best(with.narrowest, rows), y};
                run({&job, 1}, std::exchange(at[i], y), rows, with.threads);
            }
            if (!m[s].bias.empty())
                each_row(rows, width, with.threads, [&](int64_t r) { with.ops->add(at[i] + r * width, m[s].bias.data(), width); });
        }
    }
}

}  // namespace trimtab
